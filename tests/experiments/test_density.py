"""The density experiment end to end, tiny: its files, its promises, cuts and resuming."""

import base64
import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from experiments.configs.base import OptimizerConfig
from experiments.runs import train
from experiments.runs.launch import run_config
from experiments.runs.saved import saved_flow
from experiments.runs.setup import set_up, tightened_flow
from experiments.runs.tasks.images import ImageTask
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.task import Drawing, Task
from resflow_jax import certify
from resflow_jax.data.batches import Batches
from resflow_jax.training.checkpoint_errors import DamagedCheckpointError
from resflow_jax.training.checkpoints import Checkpoints
from tests.experiments.outputs import events, read_metrics
from tests.experiments.tiny import TINY, run_and_cut

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps: its work directory and result."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run_config(dataclasses.replace(TINY, workdir=workdir))


def test_files_and_metrics(finished):
    """All promised files exist; metrics have the promised fields; the test split is evaluated once."""
    workdir, result = finished
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG"), name
    assert json.loads((workdir / "config.json").read_text())["model"]["blocks"] == [1]
    page = (workdir / "report.html").read_text()
    assert f"test bits/dim {result.mean:.4f} +- {result.stderr:.4f}</h1>" in page
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        assert base64.b64encode((workdir / name).read_bytes()).decode() in page
    assert 'src="http' not in page and "&quot;hidden_channels&quot;: 4" in page
    certificate = json.loads((workdir / "certificate.json").read_text())
    (block,) = certificate["blocks"]
    assert certificate["is_certified"] is True and block["bound"] <= block["target_bound"] < 1
    assert {"3", "6"} >= {p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()} >= {"6"}
    assert sorted(path.name for path in (workdir / "training").iterdir()) == [
        f"{step:07}_{kind}.png" for step in (3, 6) for kind in ("reconstructions", "samples")
    ]
    assert "samples at step 3" in page and "reconstructions at step 6" in page
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 3, 4, 6]
    assert all(np.isfinite(line["bits_per_dim"]) for line in lines)
    assert [line["step"] for line in lines if "validation_bits_per_dim" in line] == [3, 6]
    (test,) = [line for line in lines if line["split"] == "test"]
    assert (
        tuple(test[name] for name in ("bits_per_dim", "bits_per_dim_stderr", "data_stderr", "noise_stderr")) == result
    )
    for line in lines[:-1]:
        found = line["diagnostics"]
        assert len(found["length"]) == len(found["mean"]) == len(found["second_moment"]) == 1
        assert len(found["term_norms"][0]) == 16 and found["length"][0] >= 1
    assert {line["split"] for line in lines} == {"train", "test"}


def test_events(finished):
    """TensorBoard shows the numbers of metrics.jsonl, the distributions of its lists, and the pictures."""
    workdir, result = finished
    numbers, others = events(workdir)
    lines = [line for line in read_metrics(workdir) if line["split"] == "train"]
    for name in ("bits_per_dim", "gradient_norm", "learning_rate", "validation_bits_per_dim"):
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert numbers[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name
    assert numbers["test/bits_per_dim"] == pytest.approx({max(numbers["test/bits_per_dim"]): result.mean}, rel=1e-6)
    assert others == {
        *("samples", "reconstructions", "train/lipschitz"),
        *(f"train/diagnostics/{name}" for name in lines[0]["diagnostics"]),
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The same run with its lengths fitted at every validation."""
    workdir = tmp_path_factory.mktemp("fitted")
    return workdir, run_config(dataclasses.replace(TINY, workdir=workdir, fit_lengths=True))


def test_lengths_are_fitted_between_validations(fitted):
    """The table of the length distribution is kept in the checkpoint; before the first fit it is the default's."""
    workdir, result = fitted
    assert np.isfinite(result.mean)
    config = dataclasses.replace(TINY, workdir=workdir, fit_lengths=True)
    _, start = set_up(task_of(config))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        end = checkpoints.restore(6, start)
    tables = [np.asarray(state.estimator.length.table) for state in (start, end)]
    assert tables[0].shape == tables[1].shape == (1, 16 - TINY.estimator.exact_terms) and tables[0][0, 0] == 1
    assert not np.allclose(*tables)


def test_checkpoints_hold_the_certificate_of_the_tightened_flow(finished):
    """The saved certificate is that of the restored, averaged and tightened weights, and within the target bound."""
    workdir, _ = finished
    trainer, state = set_up(task_of(TINY))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        flow = tightened_flow(trainer, checkpoints.restore(6, state))
        stored = checkpoints.certificate(6)
    certificate = certify(flow)
    assert [block["bound"] for block in stored["blocks"]] == pytest.approx(certificate.bounds, rel=1e-6)
    assert all(block["bound"] <= block["target_bound"] for block in stored["blocks"])


@pytest.mark.parametrize("fit_lengths", [False, True])
def test_a_cut_run_resumes_exactly(finished, fitted, tmp_path, capsys, fit_lengths):
    """A run that is interrupted after its first checkpoint and resumed ends as the uninterrupted one, bit for bit."""
    workdir, result = fitted if fit_lengths else finished
    config = dataclasses.replace(TINY, workdir=tmp_path, fit_lengths=fit_lengths)
    run_and_cut(config, batches=5)
    assert run_config(config) == result
    assert "resuming" in capsys.readouterr().out
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_a_run_that_is_cut_while_it_draws(finished, tmp_path, monkeypatch):
    """The checkpoint comes after the pictures: the resumed run draws them again, and ends as the other."""
    workdir, result = finished
    config, sketch = dataclasses.replace(TINY, workdir=tmp_path), train.sketch

    def cut(task, flow, step, metrics):
        if step == 6:
            raise KeyboardInterrupt
        sketch(task, flow, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "sketch", cut)
        run_config(config)
    assert not (tmp_path / "checkpoints" / "6").exists() and not list((tmp_path / "training").glob("*6*"))
    assert run_config(config) == result
    assert read_metrics(tmp_path) == read_metrics(workdir)
    for path in (workdir / "training").iterdir():
        assert (tmp_path / "training" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_checkpoint(finished, tmp_path):
    """The run goes on from the one before, names both, and ends as before; if none is good, nothing is touched."""
    workdir, result = finished
    config = dataclasses.replace(TINY, workdir=tmp_path / "run")
    shutil.copytree(workdir, config.workdir)
    directory = config.workdir / "checkpoints"
    (directory / "6" / "state" / "manifest.ocdbt").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint 6 is damaged, its file state/manifest.ocdbt .* step 3 is taken"):
        assert saved_flow(config.workdir, "latest").step == 3
    with pytest.warns(UserWarning, match=r"checkpoint 6 is damaged, its file state/manifest.ocdbt .* step 3 is taken"):
        assert run_config(config) == result
    assert read_metrics(config.workdir) == read_metrics(workdir)
    assert (directory / "aside" / "6" / "state" / "_METADATA").exists()
    for step in ("3", "6"):
        (directory / step / "state" / "_METADATA").write_text("{}")
    before = sorted(path for path in config.workdir.rglob("*") if path.name != ".lock")
    for call in (lambda: run_config(config), lambda: saved_flow(config.workdir)):
        with pytest.raises(DamagedCheckpointError, match=r"got none: checkpoint .* is damaged.*Nothing was deleted"):
            call()
    assert sorted(path for path in config.workdir.rglob("*") if path.name != ".lock") == before


def test_deleted_metrics(finished, tmp_path):
    """A finished run gives its result again, with a warning."""
    workdir, result = finished
    config = dataclasses.replace(TINY, workdir=tmp_path / "run")
    shutil.copytree(workdir, config.workdir)
    (config.workdir / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is missing: the run goes on at step 6 without its earlier"):
        assert run_config(config) == result


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop(finished, tmp_path, monkeypatch, capsys, number):
    """The step is finished, saved and logged with exit status 0; the resumed run ends as the uninterrupted one."""
    workdir, result = finished
    config = dataclasses.replace(TINY, workdir=tmp_path)
    starting_at = Batches.starting_at

    def with_signal(self, step, **options):
        for n, batch in enumerate(starting_at(self, step, **options)):
            if n == 4:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "starting_at", with_signal)
        with pytest.raises(SystemExit) as stop:
            run_config(config)
    assert not stop.value.code and signal.getsignal(number) is before
    assert "stopped at step 5 of 6; the same command goes on" in capsys.readouterr().out
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, 3)
    assert run_config(config) == result
    assert "resuming" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path)][:-1] == [2, 3, 4, 5, 6]
    state = set_up(task_of(TINY))[1]
    ends = []
    for directory in (workdir, tmp_path):
        with Checkpoints(directory / "checkpoints") as checkpoints:
            ends.append(checkpoints.restore(6, state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_patience(tmp_path, monkeypatch, capsys):
    """Two successive validations without an improvement end the run; it is evaluated, and not resumed."""
    values = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    monkeypatch.setattr(
        Task,
        "split_scores",
        lambda self, flow, split: np.full((1, 2), next(values) if split == "validation" else 9.0),
    )
    evaluation = dataclasses.replace(TINY.evaluation, every=1, patience=2)
    config = dataclasses.replace(TINY, workdir=tmp_path, evaluation=evaluation, save_every=5)
    for _ in range(2):
        assert run_config(config).mean == 9
        assert [line["step"] for line in read_metrics(tmp_path) if line["split"] == "train"] == [1, 2, 3, 4]
        assert "weights of step 2)" in capsys.readouterr().out
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (4, 2)


def test_checkpoints_between_validations(tmp_path, monkeypatch):
    """An interrupted run resumes from them; they are never the best, and newer ones replace them."""
    config = dataclasses.replace(TINY, workdir=tmp_path, save_every=2)
    save, saved = Checkpoints.save, []
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state, *rest: saved.append(int(state.step)) or save(self, state, *rest)
    )
    run_config(config)
    assert saved == [2, 3, 4, 6]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()} <= {"3", "4", "6"}


def test_a_finished_run_is_only_evaluated_again(finished, capsys):
    """The same command on a finished run trains no more, gives the same result, and repeats no line."""
    workdir, result = finished
    before = read_metrics(workdir)
    assert run_config(dataclasses.replace(TINY, workdir=workdir)) == result
    assert read_metrics(workdir) == before
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"test bits/dim {result.mean:.4f} +- {result.stderr:.4f}"


def test_a_work_directory_of_another_config(finished):
    """The differences are listed and nothing is touched; more steps are allowed."""
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"(?s)workdir: .*another config.*batch_size: 16 there, 8 now.*seed: 0 there"):
        run_config(dataclasses.replace(TINY, workdir=workdir, batch_size=8, seed=3))
    assert before == ((workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text())


def test_divergence_is_reported(tmp_path):
    """Without a good step the run goes back to its start as often as it may, and ends with what was not finite."""
    config = dataclasses.replace(TINY, workdir=tmp_path, optimizer=OptimizerConfig(learning_rate=1e200, warmup=0))
    with pytest.raises(
        FloatingPointError, match=r"training diverged by step 3: bits/dim of the val.* Gave up after 3 rollbacks"
    ):
        run_config(config)
    lines = read_metrics(tmp_path)
    end = [("skipped", 2), ("train", 2), ("skipped", 3)]
    assert [(line["split"], line["step"]) for line in lines] == [("rollback", 0)] * 3 + end
    assert [[one["step"] for one in line["skipped"]] for line in lines[:3]] == [[2, 3]] * 3
    assert all(np.isfinite(line["bits_per_dim"]) for line in lines if line["split"] == "train")


def test_in_float32(tmp_path, monkeypatch):
    """Without float64, as users run it: the same promises, but for pictures, all in float32."""
    monkeypatch.setattr(ImageTask, "sketch", lambda *_: {})
    monkeypatch.setattr(ImageTask, "draw", lambda *_: Drawing({}, {}))
    monkeypatch.setattr(train, "compile_programs", lambda *_: None)  # its thread would compile in float64
    with jax.enable_x64(False):
        result = run_config(dataclasses.replace(TINY, workdir=tmp_path))
    assert np.isfinite(result.mean) and 2 < result.mean < 5
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 3, 4, 6, read_metrics(tmp_path)[-1]["step"]]


def test_fewer_steps_than_taken(finished):
    """A run refuses fewer steps than it has taken, and keeps its config."""
    before = (finished[0] / "config.json").read_text()
    with pytest.raises(ValueError, match="steps: expected at least 6, as many as taken, got 4"):
        run_config(dataclasses.replace(TINY, workdir=finished[0], steps=4))
    assert (finished[0] / "config.json").read_text() == before
