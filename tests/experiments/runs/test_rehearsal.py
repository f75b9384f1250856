"""Programs are compiled side by side before the first step: none is compiled again, and nothing else changes."""

import dataclasses
import logging
import re
import threading
import warnings

import jax
import pytest

from experiments.configs.base import MeshConfig, OptimizerConfig
from experiments.runs import rehearsal, train
from experiments.runs.launch import run_config
from experiments.runs.tasks.images import ImageTask
from tests.experiments.outputs import read_metrics
from tests.experiments.tiny import TINY

LARGE = {"step", "_update_norms", "_batch_scores", "_solve", "_transform", "_kernels_and_limits"}


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(rehearsal, "number_of_cores", lambda: 2)


@pytest.fixture
def compiled(caplog):
    """The programs that were compiled before the steps of a run, and in them."""

    def names() -> tuple[set[str], set[str]]:
        lines = [record.getMessage() for record in caplog.records]
        middle = lines.index("steps begin")
        found = [
            {name[1] for line in part if (name := re.match(r"Finished XLA compilation of jit\((\w+)\)", line))}
            for part in (lines[:middle], lines[middle:])
        ]
        return tuple(found)

    caplog.set_level(logging.WARNING)
    jax.config.update("jax_log_compiles", True)  # in all threads
    yield names
    jax.config.update("jax_log_compiles", False)


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, 5),
        ({"parallel": "shard_map", "optimizer": OptimizerConfig(warmup=2, accumulate=2)}, 6),
        ({"mesh": MeshConfig(data=4, model=2, parameters="model")}, 8),
    ],
    ids=["jit", "shard_map, accumulated", "divided"],
)
def test_no_large_program_is_compiled_in_training(tmp_path, monkeypatch, cores, compiled, changes, channels):
    """The step, and all that a validation needs, are there before the first step.

    Each case has a size of its own, so that its programs are new.
    """
    train_from = train._train_from

    def marked(*arguments):
        logging.getLogger(__name__).warning("steps begin")
        return train_from(*arguments)

    monkeypatch.setattr(train, "_train_from", marked)
    model = dataclasses.replace(TINY.model, hidden_channels=channels)
    run_config(dataclasses.replace(TINY, workdir=tmp_path, model=model, **changes))
    before, after = compiled()
    assert before >= LARGE
    assert not LARGE & after


def test_the_run_is_the_same_with_and_without(tmp_path, monkeypatch, cores):
    """Metrics and result, bit for bit."""
    results = []
    for name, number in (("with", 2), ("without", 1)):
        monkeypatch.setattr(rehearsal, "number_of_cores", lambda number=number: number)
        results.append(run_config(dataclasses.replace(TINY, workdir=tmp_path / name)))
    assert results[0] == results[1]
    assert read_metrics(tmp_path / "with") == read_metrics(tmp_path / "without")


@pytest.mark.usefixtures("shared_steps")
@pytest.mark.parametrize("what", ["sketch", "scores", "batches"])
def test_what_fails_there_does_not_end_the_run(tmp_path, monkeypatch, cores, what):
    """An error of untrained weights, which the trained ones need not have, is left to the validation."""
    works, failures = getattr(ImageTask, what), []

    def fail_once(*arguments):
        if not failures:
            failures.append(what)
            raise ValueError("not yet")
        return works(*arguments)

    monkeypatch.setattr(ImageTask, what, fail_once)
    run_config(dataclasses.replace(TINY, workdir=tmp_path))
    assert failures == [what] and (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("cores", "processes", "backend", "compiles"),
    [(2, 1, "cpu", True), (1, 1, "cpu", False), (2, 2, "cpu", False), (2, 1, "gpu", False)],
)
def test_where_programs_are_compiled_side_by_side(monkeypatch, cores, processes, backend, compiles):
    """One core gains nothing, processes would have to agree, and a GPU's compiler measures kernels."""
    called = []
    monkeypatch.setattr(rehearsal, "_compile_step", lambda *_: called.append(threading.current_thread()))
    monkeypatch.setattr(rehearsal, "_judge_once", lambda *_: called.append(threading.current_thread()))
    monkeypatch.setattr(rehearsal, "number_of_cores", lambda: cores)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rehearsal.compile_programs(None, None, None, None)
    assert len(set(called)) == (2 if compiles else 0)


def test_warnings_of_a_trace_are_shown(monkeypatch, cores):
    """JAX traces once: a warning that is lost here never comes again. Those about weights do."""
    monkeypatch.setattr(rehearsal, "_compile_step", lambda *_: warnings.warn("infinite variance", stacklevel=1))
    monkeypatch.setattr(
        rehearsal, "_judge_once", lambda *_: warnings.warn("inverse: 3 of 8 examples did not converge", stacklevel=1)
    )
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        rehearsal.compile_programs(None, None, None, None)
    assert [str(warning.message) for warning in shown] == ["infinite variance"]
