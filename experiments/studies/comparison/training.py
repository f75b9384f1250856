"""Training against the clock: updates until the budget is spent, validated now and then, the best weights kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from experiments.studies.comparison.clock import Clock, rate_factor

VALIDATIONS = 20  # of a run


class Model(Protocol):
    """A trained model. All times of it are measured without compilation."""

    parameters: int

    def scores(self, examples: np.ndarray, seed: int, draws: int) -> np.ndarray:
        """The metric of the task for each of N examples in each draw, [draws, N]."""

    def sampler(self, number: int) -> Callable[[int], np.ndarray]:
        """A function from seeds to `number` samples."""

    def evaluator(self, x: np.ndarray) -> Callable[[int], np.ndarray]:
        """A function from seeds to log p of floats x."""

    def reconstruction(self, x: np.ndarray) -> tuple[float, int]:
        """max |x - f^-1(f(x))|, and the number of x whose inverse did not converge."""


class Contender(Protocol):
    """A model in training."""

    def prepare(self, batch: np.ndarray) -> None:
        """Builds, initialises and compiles, for batches like this one."""

    def step(self, batch: np.ndarray, learning_rate: float) -> bool:
        """Makes an update, and waits for it. Returns False if it was not finite, and was skipped."""

    def averaged(self) -> Model:
        """The model with averaged weights, which later updates leave alone."""


@dataclass
class Trained:
    """A finished training.

    Attributes:
      model: the one of least validation loss; None if no validation was finite.
      loss: its validation loss.
      at: fraction of the time for updates at which it was validated.
      steps: number of updates, with those that were skipped.
      skipped: number of updates that were not finite.
      set_up: seconds of building, initialisation and compilation.
      seconds: seconds in all.
      losses: all validation losses.
    """

    model: Any
    loss: float
    at: float
    steps: int
    skipped: int
    set_up: float
    seconds: float
    losses: list[float]

    @property
    def step_seconds(self) -> float:
        """Seconds of an update, on average."""
        return (self.seconds - self.set_up) / self.steps


def train(
    contender: Contender,
    batches: Iterator[np.ndarray],
    clock: Clock,
    learning_rate: float,
    validate: Callable[[Model], float],
    at_least: int = 0,
    set_up_counts: bool = True,
    validations: int = VALIDATIONS,
) -> Trained:
    """Trains until the budget is spent.

    Args:
      contender: what is trained.
      batches: batches of training examples.
      clock: clock with the budget; it is stopped during validations.
      learning_rate: peak of the schedule, `rate_factor` of the fraction of the time for updates.
      validate: from a model to its validation loss, which may be NaN.
      at_least: number of updates that are made however long they take.
      set_up_counts: whether the budget is that of set-up and updates, or of updates alone.
      validations: number of validations, at equal distances.

    Raises:
      TimeoutError: if the set-up has taken the whole budget.
    """
    with clock:
        batch = next(batches)
        contender.prepare(batch)
        clock.start_updates(set_up_counts=set_up_counts)
    set_up = clock.elapsed
    if clock.fraction >= 1 and not at_least:
        raise TimeoutError(f"the set-up took {set_up:.0f} s of CPU time, all of the budget of {clock.seconds:g} s")
    best, loss, at, losses, steps, skipped, due = None, math.inf, 0.0, [], 0, 0, 1
    while clock.fraction < 1 or steps < at_least:
        with clock:
            batch = batch if not steps else next(batches)
            skipped += not contender.step(batch, learning_rate * rate_factor(clock.fraction))
            steps += 1
        reached = math.floor(validations * clock.fraction)
        if reached >= due and (reached < validations or steps >= at_least):
            due = reached + 1
            model = contender.averaged()
            losses.append(validate(model))
            if losses[-1] < loss:
                best, loss, at = model, losses[-1], clock.fraction
    return Trained(best, loss, at, steps, skipped, set_up, clock.elapsed, losses)
