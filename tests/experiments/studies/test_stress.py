"""The study of faults: its table, its end, and what its rows say; the faults themselves are tried by the study."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from experiments.studies import stress
from experiments.studies.parts import campaign, stress_kills, stress_soak, stress_storage
from experiments.studies.parts.campaign import Campaign, Deadline, Row
from tests.experiments.tiny import VECTORS, save_run


@pytest.fixture
def campaigns(monkeypatch):
    """Three campaigns: one that finds nothing wrong, one that does, and one that takes too long."""

    def late(config, directory, deadline):
        raise TimeoutError("over")

    def good(config, directory, deadline):
        return [Row("a | fault", config.kills, "nothing", True)]

    found = {
        "kills": Campaign("good", good),
        "storage": Campaign("bad", lambda *_: [Row("b", 1, "something", False)]),
        "soak": Campaign("late", late),
    }
    monkeypatch.setattr(stress, "CAMPAIGNS", found)
    monkeypatch.setattr(stress, "use_compilation_cache", lambda: None)


def test_the_table_and_the_status(campaigns, tmp_path, capsys):
    """A row that is not good ends the study with status 1, after the table and the file are written."""
    stress.main(["--campaigns", "kills", "--kills", "7", "--workdir", str(tmp_path)])
    assert "| a | fault | 7 | nothing | yes |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        stress.main(["--campaigns", "kills", "storage", "soak", "--workdir", str(tmp_path)])
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert "| b | 1 | something | **no** |" in out and "2 of 3 rows" in out
    content = json.loads((tmp_path / "stress.json").read_text())
    assert content["settings"]["kills"] == 5 and content["soak"][0]["found"] == "over"


def test_without_time_nothing_is_tried(campaigns, tmp_path):
    """It is said."""
    rows = stress.run(stress.StressConfig(campaigns=("kills", "storage", "soak"), seconds=1e-9, workdir=tmp_path))
    assert {found[0].found for found in rows.values()} == {"not tried: the time was over"}


def test_folders_of_others(campaigns, tmp_path):
    """They are refused before anything is deleted; those of the study itself are made anew."""
    config = stress.StressConfig(campaigns=("kills", "storage"), workdir=tmp_path)
    stress.run(config)
    (tmp_path / "kills" / "old").touch()
    stress.run(config)
    assert not (tmp_path / "kills" / "old").exists()
    (tmp_path / "kills" / "old").touch()
    (tmp_path / "soak").mkdir()
    (tmp_path / "soak" / "photograph").touch()
    with pytest.raises(FileExistsError, match=r"workdir: expected a new directory .* with another soak; name another"):
        stress.run(replace(config, campaigns=("kills", "soak")))
    assert (tmp_path / "soak" / "photograph").exists() and (tmp_path / "kills" / "old").exists()


def test_flips_end_with_the_time(tmp_path):
    """The row says how many were tried; without a deadline all are."""
    save_run(replace(VECTORS, workdir=tmp_path / "reference", steps=1))
    save_run(replace(VECTORS, workdir=tmp_path / "reference"))
    for seconds, tries, end in ((60, 1, "restored: 1 times"), (1e-9, 0, "none; then the time was over, 1 were not")):
        config = stress.StressConfig(flips=1)
        (row,) = stress_storage._flips(config, tmp_path / "reference", tmp_path / "copy", Deadline(seconds))
        assert row.tries == tries and end in row.found and row.is_good


def test_what_a_long_run_tells():
    """Growth, compilations and slower steps are found; noise and the warm-up are not."""
    steps = np.arange(1, 101) * 100
    noise = np.random.default_rng(0).normal(size=100)
    good = {"step": steps, "cpu": steps * 0.02, "memory": 500 + noise, "compilations": np.minimum(steps // 100, 10)}

    def is_good(**changed):
        columns = good | changed
        lines = [{name: float(values[n]) for name, values in columns.items()} for n in range(100)]
        rows = stress_soak.rows_of(lines)
        assert json.dumps(rows)  # plain values, for stress.json
        return [row.is_good for row in rows]

    assert is_good() == [True] * 3
    assert is_good(memory=500 + steps * 0.02 + noise) == [False, True, True]
    assert is_good(memory=500 + steps // 500 * 2.0) == [True] * 3
    assert is_good(memory=500 + steps // 500 * 9.0) == [False, True, True]
    assert is_good(compilations=steps // 1000) == [True, False, True]
    assert is_good(cpu=steps * 0.02 * (1 + steps / 50_000)) == [True, True, False]


def test_a_run_that_is_killed():
    """A process is killed at its moment; one that ends before is not; all end with the time of the study."""
    arguments = "import sys, time; print('begun', flush=True); time.sleep(float(sys.argv[1]))"

    def started(seconds):
        return subprocess.Popen([sys.executable, "-c", arguments, str(seconds)])

    assert stress_kills._kill(started(600), lambda: True, Deadline(60))
    assert not stress_kills._kill(started(0), lambda: False, Deadline(60))
    with pytest.raises(TimeoutError, match="the time of the study is over"):
        stress_kills._kill(started(600), lambda: False, Deadline(0.3))


def test_moments_and_differences(tmp_path):
    """Each moment comes with the file that tells of it; results are compared by name."""
    (tmp_path / "training").mkdir()
    (tmp_path / "checkpoints").mkdir()
    files = {"saving": "checkpoints/6.orbax-checkpoint-tmp", "drawing": "training/a.png", "reporting": "curves.png"}
    seen = set()
    for seed in range(40):
        name, is_reached = stress_kills._moment(random.Random(seed), 1e-6, tmp_path)
        seen.add(name)
        if name != "at any time":
            assert not is_reached()
            path = tmp_path / files[name.removeprefix("while ")]
            path.touch()
            is_reached()
            stress_kills.time.sleep(0.11)
            assert is_reached()
            path.unlink()
        else:
            assert is_reached()
        if len(seen) == 4:
            break
    assert len(seen) == 4
    assert stress_kills._difference({"a": b"1", "b": b"2"}, {"a": b"1", "b": b"3", "c": b""}) == "other b, c"
    (tmp_path / "checkpoints" / "12").mkdir()
    assert campaign.checkpoints_of(tmp_path) == [12] and campaign.checkpoints_of(tmp_path / "no") == []
    (tmp_path / "metrics.jsonl").write_text("x")
    assert campaign.files_of(tmp_path) == {"metrics.jsonl": b"x"}
