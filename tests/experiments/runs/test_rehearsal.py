"""Programs are compiled side by side before the first step: none is compiled again, and nothing else changes."""

import dataclasses
import logging
import re

import jax
import pytest

from experiments.configs.base import OptimizerConfig
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
    """The programs that were compiled while the run took its steps."""

    def names() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        steps = lines[lines.index("steps begin") :] if "steps begin" in lines else lines
        return [found[1] for line in steps if (found := re.match(r"Finished XLA compilation of jit\((\w+)\)", line))]

    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        yield names


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": OptimizerConfig(warmup=2, accumulate=2)}, {"parallel": "shard_map"}]
)
def test_no_large_program_is_compiled_in_training(tmp_path, monkeypatch, cores, compiled, changes):
    """The step, and all that a validation needs, are there before the first step."""
    jax.clear_caches()
    train_from = train._train_from

    def marked(*arguments):
        logging.getLogger(__name__).warning("steps begin")
        return train_from(*arguments)

    monkeypatch.setattr(train, "_train_from", marked)
    run_config(dataclasses.replace(TINY, workdir=tmp_path, **changes))
    assert not LARGE & set(compiled())


def test_the_run_is_the_same_with_and_without(tmp_path, monkeypatch, cores):
    """Metrics and result, bit for bit."""
    results = []
    for name, number in (("with", 2), ("without", 1)):
        monkeypatch.setattr(rehearsal, "number_of_cores", lambda number=number: number)
        results.append(run_config(dataclasses.replace(TINY, workdir=tmp_path / name)))
    assert results[0] == results[1]
    assert read_metrics(tmp_path / "with") == read_metrics(tmp_path / "without")


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


@pytest.mark.parametrize(("cores", "processes", "backend"), [(1, 1, "cpu"), (2, 2, "cpu"), (2, 1, "gpu")])
def test_where_programs_are_compiled_as_they_come(monkeypatch, cores, processes, backend):
    """One core gains nothing, processes would have to agree, and a GPU's compiler measures kernels."""
    monkeypatch.setattr(rehearsal, "number_of_cores", lambda: cores)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rehearsal.compile_programs(None, None, None, None)  # looks at none of them
