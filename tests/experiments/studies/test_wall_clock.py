"""The study of wall-clock on a tiny flow: its rows and files, how a flow is judged, and flows in PyTorch."""

import json
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.studies import wall_clock
from experiments.studies.comparison.datasets import batches_of
from experiments.studies.parts import wall_clock_run
from experiments.studies.parts.wall_clock_run import Settings
from experiments.studies.wall_clock import WallClockConfig
from tests.experiments import tiny

SMALL = wall_clock.tiny(WallClockConfig())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command with its run in this process, of a small flow: its config, what it returns, what it has trained."""
    config, settings = replace(SMALL, workdir=tmp_path_factory.mktemp("runs")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "digits", tiny.DIGITS)
        patch.setattr(wall_clock, "_done", lambda of: settings.append(of) or list(wall_clock_run.rows(of, time.time())))
        found = wall_clock.run(config), wall_clock.run(config)
    return config, found, settings


def test_a_run(finished):
    """It ends with its config, judged on test images; a second command reads its file."""
    config, (found, again), settings = finished
    assert len(settings) == 1 and found == again and list(found) == ["shipped"]
    *_, row = found["shipped"]  # on a busy machine, times pass before
    assert row["ended"] and row["steps"] == 2 and row["elapsed"] > 0
    assert row["weights"] == min(row["validation"], key=row["validation"].get)
    assert 0 < row["test"] < 20 and 0 < row["stderr"] < row["test"]
    directory = config.workdir / "digits"
    assert json.loads((directory / "shipped.json").read_text()) == {
        "settings": {**asdict(settings[0]), "seconds": list(settings[0].seconds)},
        "rows": found["shipped"],
    }
    assert (directory / "wall_clock.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_other_settings(finished):
    """Its file is not replaced."""
    config, _, _ = finished
    before = (config.workdir / "digits" / "shipped.json").read_text()
    with pytest.raises(ValueError, match=r"shipped.json to be of the same settings, got another settings"):
        wall_clock.run(replace(config, learning_rate=0.5))
    assert (config.workdir / "digits" / "shipped.json").read_text() == before


class Counting:
    """A flow under training that has no time: bits/dim fall with the updates, and are NaN for current weights."""

    def __init__(self, updates):
        self.left, self.steps = updates, 0

    def prepare(self, batch):
        """Does nothing."""

    def step(self, batch):
        self.steps += self.left > 0
        self.left -= 1
        return self.left >= 0

    def scores(self, weights, examples, seed):
        return np.full(len(examples), np.nan if weights == "current" else 10 - self.steps) + np.arange(len(examples))


def test_times(monkeypatch):
    """A time before the first update has no bits/dim; one that passes in a long update has those before the next."""
    clock = iter(np.cumsum([0, 0.5, 2.0, 1.0, 8.0, 1.0, 60.0]))  # set-up, and what updates take
    now = [0.0]

    class Clock:
        elapsed = 0.0

        def __init__(self, *_):
            pass

        def __enter__(self):
            next(clock)

        def __exit__(self, *_):
            now[0] += 4.0
            Clock.elapsed = now[0]

    monkeypatch.setattr(wall_clock_run, "Clock", Clock)
    monkeypatch.setattr(wall_clock_run, "Ours", lambda task: Counting(updates=3))
    settings = replace(SMALL.settings()[0], seconds=(0.0, 4.0, 7.0, 8.0, 50.0))
    rows = list(wall_clock_run.rows(settings, time.time()))
    assert [row["seconds"] for row in rows] == [0.0, 4.0, 7.0, 8.0, 50.0]
    assert [row["steps"] for row in rows] == [0, 1, 2, 2, 3] and [row["ended"] for row in rows] == [False] * 4 + [True]
    assert "test" not in rows[0] and all(row["weights"] == "averaged" for row in rows[1:])
    assert rows[1]["test"] - rows[-1]["test"] == pytest.approx(2)


def test_a_small_run_in_pytorch_ends_with_its_config(monkeypatch):
    """As those of this library, long before its last time."""
    module = "experiments.studies.parts.torch_residual"
    contender = Counting(updates=9)
    contender.step = lambda batch, learning_rate: Counting.step(contender, batch)
    contender.averaged = contender.current = lambda: SimpleNamespace(scores=lambda x, *_: np.ones((1, len(x))))
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(torch_residual=lambda *_: contender))
    (row,) = wall_clock_run.rows(replace(SMALL.settings()[0], run="normflows", seconds=(60.0,)), time.time())
    assert row["ended"] and row["steps"] == contender.steps == 2


def test_configs():
    """The shipped run is that of the command; the others have the papers' estimator and optimiser, without warm-up."""
    settings = Settings("digits", "shipped", (1.0,), 1e-3, 10, 10)
    assert settings.config() == CONFIGS["digits"]
    config = replace(settings, run="authors", learning_rate=2e-3).config()
    assert config.model == CONFIGS["digits_uniform"].model and config.estimator == CONFIGS["cifar10"].estimator
    assert config.optimizer == replace(CONFIGS["cifar10"].optimizer, learning_rate=2e-3, warmup=0)
    assert config.steps == 10**6  # the clock ends it


def test_table():
    """A column for each time, and what a run that ended had."""
    rows = [
        {"seconds": 10, "elapsed": 11.0, "steps": 0, "ended": False},
        {"seconds": 60, "elapsed": 60.0, "steps": 10, "ended": False, "test": 3.0},
        {"seconds": 120, "elapsed": 80.0, "steps": 20, "ended": True, "test": 2.0},
    ]
    later = [{**rows[1], "seconds": time, "elapsed": time, "steps": time} for time in (60, 300)]
    assert wall_clock.table({"shipped": rows, "authors": later}).splitlines() == [
        "|  | 10 s | 1 min | 2 min | 5 min | ms an update |",
        "| --- | --- | --- | --- | --- | --- |",
        "| as it ships | - | 3.000 | 2.000 | ended at 80 s | 2e+03 |",
        "| the authors' code | - | 3.000 | - | 3.000 | 1e+03 |",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"minutes": 0}, "minutes: expected a positive number"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number"),
        ({"runs": ("ours",)}, "runs: expected one of shipped, papers, normflows, authors"),
        ({"runs": ("authors",)}, "runs: authors needs "),
        ({"examples": 1}, "examples: expected an integer of at least 2, got 1"),
    ],
)
def test_bad_settings_are_named(setting, message, tmp_path):
    """Each names its argument."""
    with pytest.raises(ValueError, match=message):
        WallClockConfig(**setting)
    with pytest.raises(ValueError, match=f"authors: expected a copy of rtqichen/residual-flows, got {tmp_path}"):
        WallClockConfig(authors=tmp_path)


def test_a_process_that_fails():
    """Its exit status is an error."""
    with pytest.raises(RuntimeError, match="shipped: expected a process that trains, got exit status 1"):
        wall_clock._done(replace(SMALL.settings()[0], data="nothing"))


def scales_in(flow):
    """The norms that the layers of a flow of normflows know of their weights."""
    return np.array([float(module.scale) for module in flow.modules() if hasattr(module, "scale")])


def test_normflows_under_training():
    """Updates change it and its norms; copies with current and with averaged weights are judged."""
    torch = pytest.importorskip("torch", reason="needs the extra bench")
    pytest.importorskip("normflows", reason="needs the extra bench")
    from experiments.studies.parts.torch_residual import torch_residual

    settings = replace(SMALL.settings()[0], run="normflows", learning_rate=0.01)
    task = wall_clock_run.task_of(settings.config())
    contender, batches = torch_residual("normflows", task), batches_of(task)
    contender.prepare(next(batches))
    x = torch.from_numpy(np.array(task.inputs(task.splits.test[:3]), np.float32))
    before, scales = contender.flow(x).detach(), scales_in(contender.flow)
    assert before.shape == (3,) and contender.flow.flow.training
    for _ in range(3):
        assert contender.step(next(batches), 0.01)
    assert (contender.flow(x) - before).abs().min() > 0
    current, averaged = contender.current(), contender.averaged()
    assert len(scales) > 1 and np.abs(scales_in(contender.flow) - scales).min() > 1e-4  # weights, and so norms, moved
    np.testing.assert_allclose(scales_in(current._flow), scales_in(contender.flow), rtol=0.05)
    assert not any(module.training for module in averaged._flow.modules())
    scores = [model.scores(task.splits.test[:4], 0, 1) for model in (current, averaged)]
    assert all(found.shape == (1, 4) and np.isfinite(found).all() for found in scores)
    assert np.abs(scores[0] - scores[1]).max() > 0
