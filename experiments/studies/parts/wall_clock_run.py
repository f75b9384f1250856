"""The process of one run of the study of wall-clock: it trains a flow on all cores, and judges it at given times.

    python -m experiments.studies.parts.wall_clock_run < SETTINGS

reads {"settings": those of a run, "began": when the process was started} as a line of JSON, and prints a line of JSON
for each time. There is no cache of compiled programs, since a first user has none. The clock stands still while a flow
is judged. For runs of this library it starts with the process, so that imports, the reading of data, initialisation and
compilation count. For runs in PyTorch it starts with the first update.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from experiments.configs import CONFIGS
from experiments.configs.base import DensityConfig
from experiments.configs.published import ESTIMATOR, OPTIMIZER
from experiments.configs.tiny import tiny
from experiments.runs.devices import cores_for, use_all_cores, use_xla_flags
from experiments.runs.judging import judge
from experiments.runs.setup import place_on_devices, set_up
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.task import Task
from experiments.studies.comparison.clock import Clock
from experiments.studies.comparison.datasets import batches_of
from experiments.studies.comparison.making import machine
from resflow_jax import Estimate

SHIPPED, PAPERS, PEERS = "shipped", "papers", ("normflows", "authors")
RUNS = (SHIPPED, PAPERS, *PEERS)
WEIGHTS = ("averaged", "current")
MOST_STEPS = 10**6  # of a run with a constant learning rate, which the clock ends


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
      data: name of the data set.
      run: one of `RUNS`.
      seconds: the times at which the flow is judged, in ascending order.
      learning_rate: that of all runs but "shipped"; it is constant.
      examples: number of test images.
      validated: number of validation images, which choose between averaged and current weights.
      seed: random seed.
      data_dir: directory of TensorFlow data sets.
      authors: a checkout of the authors' repository.
      small: whether the flow is that of `--tiny`.
    """

    data: str
    run: str
    seconds: tuple[float, ...]
    learning_rate: float
    examples: int
    validated: int
    seed: int = 0
    data_dir: str | None = None
    authors: str | None = None
    small: bool = False

    def __post_init__(self):
        object.__setattr__(self, "seconds", tuple(self.seconds))

    def config(self) -> DensityConfig:
        """The config of the run: the shipped one, or the uniform one of the data with the papers' settings."""
        if self.run == SHIPPED:
            config = CONFIGS[self.data]
        else:
            optimizer = replace(OPTIMIZER, learning_rate=self.learning_rate, warmup=0)
            uniform = CONFIGS[f"{self.data}_uniform"]
            config = replace(uniform, estimator=ESTIMATOR, optimizer=optimizer, steps=MOST_STEPS)
        config = replace(config, data=replace(config.data, dir=self.data_dir), seed=self.seed)
        return tiny(config) if self.small else config


class Trained(Protocol):
    """A flow under training."""

    def prepare(self, batch: np.ndarray) -> None:
        """Builds, initialises and compiles, for batches like this one."""

    def step(self, batch: np.ndarray) -> bool:
        """Makes an update, and waits for it. Returns False if the run is at its end, and nothing was done."""

    def scores(self, weights: str, examples: np.ndarray, seed: int) -> np.ndarray:
        """Bits/dim [N] of N images with the "averaged" or the "current" weights."""


class Ours:
    """A run of this library, placed on all cores as `experiments.density` does."""

    def __init__(self, task: Task):
        self._task, self._key = task, jax.random.key(task.config.seed)

    def prepare(self, batch: np.ndarray) -> None:
        """Sets the run up, and compiles its step."""
        trainer, state = set_up(self._task)
        self._placement = place_on_devices(trainer, self._task.config)
        self._state = self._placement.place(state)
        batch = self._placement.place_batch(batch)
        self._step = self._placement.step.lower(self._state, batch, self._key).compile()
        self._left = self._task.config.steps

    def step(self, batch: np.ndarray) -> bool:
        """Makes an update, unless the steps of the config are done."""
        if not self._left:
            return False
        self._left -= 1
        self._state, metrics = self._step(self._state, self._placement.place_batch(batch), self._key)
        jax.block_until_ready(metrics)
        return True

    def scores(self, weights: str, examples: np.ndarray, seed: int) -> np.ndarray:
        """Bits/dim of the tightened flow, with the estimator of evaluations."""
        state = self._placement.to_checkpoint(self._state)
        flow_of = {"averaged": self._placement.averaged_flow, "current": self._placement.current_flow}[weights]
        flow, task = judge(flow_of(state)).flow, self._task
        estimator = task.config.evaluation.estimator
        return task.scores(flow, examples, jax.random.key(seed), estimator, 1, task.batch_size)[0]


class InTorch:
    """A run in PyTorch with a constant learning rate, on all cores."""

    def __init__(self, name: str, task: Task, authors: str | None):
        from experiments.studies.parts.torch_residual import torch_residual

        self._contender = torch_residual(name, task, authors and Path(authors))
        self._rate, self._left = task.config.optimizer.learning_rate, task.config.steps

    def prepare(self, batch: np.ndarray) -> None:
        """Builds the flow, initialised on training images."""
        self._contender.prepare(batch)

    def step(self, batch: np.ndarray) -> bool:
        """Makes an update, unless all steps of the run are done."""
        if self._left == 0:
            return False
        self._contender.step(batch, self._rate)
        self._left -= 1
        return True

    def scores(self, weights: str, examples: np.ndarray, seed: int) -> np.ndarray:
        """Bits/dim by that code's own evaluation."""
        model = {"averaged": self._contender.averaged, "current": self._contender.current}[weights]()
        return model.scores(examples, seed, 1)[0]


def rows(settings: Settings, began: float) -> Iterator[dict[str, Any]]:
    """Trains, and yields for each time: what the clock said, the number of updates, and the bits/dim.

    A run that is at its end before a time yields its last row, and nothing for later times. A time before the first
    update has no bits/dim.

    Args:
      settings: settings of the run.
      began: `time.time()` at the start of the process.
    """
    config = settings.config()
    task = task_of(config)
    batches = batches_of(task)
    in_torch = settings.run in PEERS
    trained = InTorch(settings.run, task, settings.authors) if in_torch else Ours(task)
    trained.prepare(next(batches))
    earlier = 0.0 if in_torch else time.time() - began
    clock = Clock(settings.seconds[-1], time.perf_counter)
    steps, due, is_going = 0, list(settings.seconds), True
    while due and is_going:
        now = earlier + clock.elapsed
        if now < due[0]:
            with clock:
                is_going = trained.step(next(batches))
            steps += is_going
        if now >= due[0] or not is_going:
            judged = _judged(trained, task, settings) if steps else {}
            passed = [seconds for seconds in due if seconds <= now] or due[:1]
            for seconds in passed:
                yield {"seconds": seconds, "elapsed": now, "steps": steps, "ended": not is_going, **judged}
            due = due[len(passed) :]


def _judged(trained: Trained, task: Task, settings: Settings) -> dict[str, Any]:
    """Bits/dim of test images, with those of the weights that validation chooses."""
    validation, test = task.splits.validation[: settings.validated], task.splits.test[: settings.examples]
    with np.errstate(all="ignore"):
        losses = {weights: float(trained.scores(weights, validation, 1).mean()) for weights in WEIGHTS}
        weights = min(losses, key=lambda name: (not np.isfinite(losses[name]), losses[name]))
        estimate = Estimate.from_scores(trained.scores(weights, test, 2)[None])
    return {"weights": weights, "validation": losses, "test": estimate.mean, "stderr": estimate.stderr}


def main() -> None:
    """Does one run."""
    jax.config.update("jax_enable_compilation_cache", False)
    given = json.loads(sys.stdin.readline())
    settings = Settings(**given["settings"])
    use_xla_flags()
    use_all_cores(cores_for(settings.config().batch_size))
    answers, sys.stdout = sys.stdout, sys.stderr
    for row in rows(settings, given["began"]):
        print(json.dumps(row | {"machine": machine()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
