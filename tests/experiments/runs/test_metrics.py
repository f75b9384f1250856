"""Metrics on disk: a crash or a full disk does not damage written lines."""

import errno
import json
import os

import pytest

from experiments.runs.metrics import Metrics
from experiments.runs.metrics_file import MetricsFile, kept_lines
from experiments.runs.workdir import write_atomically
from tests.experiments.outputs import events, read_metrics


def test_a_full_disk(tmp_path, monkeypatch):
    """The error of a failed write names the file; the old file stays intact, and no partial file is left."""
    path = tmp_path / "config.json"
    path.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda number: "0")
    (tmp_path / f"config.json.{os.getpid()}-0.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*config\.json"):
        write_atomically(path, "new")
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    metrics = MetricsFile(tmp_path / "metrics.jsonl", keep_until=1)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        metrics.write(step=2, split="train")


def test_events_on_a_full_disk(tmp_path, monkeypatch):
    """A failed write raises an error that names the directory; the run does not wait forever."""
    with Metrics(tmp_path, keep_until=0) as metrics:
        with monkeypatch.context() as patch:
            patch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
            for n in range(20):
                with pytest.raises(OSError, match=r"No space left.*tensorboard"):
                    metrics.write(step=n, split="train", bits_per_dim=3.0)
        metrics.write(step=21, split="train", lipschitz=[0.5, float("inf")], orders=[float("nan")], none=float("nan"))
    assert len(read_metrics(tmp_path)) == 21
    assert read_metrics(tmp_path)[-1]["lipschitz"] == [0.5, None]
    assert events(tmp_path)[1] == {"train/lipschitz"}


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_metrics_survive_a_half_written_line(tmp_path):
    """A line cut off by a crash is dropped with a warning, complete ones stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "split": "train", "d": {"x": 1}')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 2, the last one, is incomplete and was dropped"):
        metrics = MetricsFile(path, keep_until=1)
    metrics.write(step=3, split="train")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_metrics_that_are_missing(tmp_path):
    """A run that resumes goes on without them, with a warning that says up to where."""
    path = tmp_path / "metrics.jsonl"
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is missing: the run goes on at step 5 without"):
        assert kept_lines(path, 5) == []
    path.write_text('{"step": 1, "split": "train"}\n{"step": 3, "split": "train"}\n{"step": 9, "split": "train"}\n')
    with pytest.warns(UserWarning, match=r"ends at step 3: the run goes on at step 5 without the lines between"):
        assert [line["step"] for line in kept_lines(path, 5)] == [1, 3]


@pytest.mark.parametrize(
    "damaged", ['{"step": 1, "spl', "[1, 2]", '{"split": "train"}', '{"step": "1", "split": "train"}', "\xff", ""]
)
def test_metrics_that_are_damaged(tmp_path, damaged):
    """The error names the file and the line, and what to do."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "split": "train"}\n' + damaged.encode("latin1") + b'\n{"step": 3, "split": "train"}\n'
    )
    with pytest.raises(ValueError, match=r"a line of metrics in line 2 of .*metrics\.jsonl: .*correct it, or delete"):
        kept_lines(path, 3)
    assert path.read_bytes().count(b"\n") == 3


def test_metrics_go_back(tmp_path):
    """Later lines are dropped on disk, too."""
    with Metrics(tmp_path, keep_until=0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step=step, split="train", loss=float(step))
        metrics.rewind(1)
        metrics.write(step=2, split="train", loss=7.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 7.0)]


def test_a_file_that_vanishes_is_written_again(tmp_path):
    """All lines are in it, and a warning tells; without its directory an error does."""
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    file = MetricsFile(path, keep_until=0)
    file.write(step=1, split="train", loss=2.0)
    path.unlink()
    with pytest.warns(UserWarning, match="metrics.jsonl vanished while the run went on"):
        file.write(step=2, split="train", loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    path.unlink()
    path.parent.rmdir()
    with (
        pytest.warns(UserWarning, match="vanished"),
        pytest.raises(OSError, match="its directory was removed while the run went on"),
    ):
        file.write(step=3, split="train", loss=0.5)
