"""What `fit` records while it trains: losses in nats, and the flow with the best weights."""

import math
import time
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from resflow_jax.functional.estimators import Estimator, Exact, Roulette, check_estimator
from resflow_jax.models.flow import Flow
from resflow_jax.training.evaluation import image_bits_per_dim, vector_log_prob
from resflow_jax.training.examples import Examples
from resflow_jax.training.history import Ending, History
from resflow_jax.training.scores import log_prob_of_bits

Array = jax.Array

_EXACT_DIM = 32  # up to this dimension an exact log-det costs less than a long roulette


class FitResult(NamedTuple):
    """What `fit` returns: a pair (flow, history).

    Attributes:
      flow: a `Flow` with the best weights. Its norms are converged and it is tightened (see `Flow.tighten`).
      history: the `History` of the losses, in nats.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> result = rf.fit(flow, x, steps=2, progress=False)
      >>> result.flow.event_shape, result.history.ended
      ((2,), 'steps')
    """

    flow: Flow
    history: History


class FitProgress(NamedTuple):
    """The argument of the callback of `fit`, which is called at every validation point (see `History`).

    Attributes:
      step: number of steps done.
      train: mean -log p in nats of the training batches since the previous validation point.
      validation: mean -log p in nats of the validation examples; None if there are none.
      flow: a `Flow` with the present weights, or with their moving average if `fit` has `ema`. Its norms are converged;
        it is not tightened yet. Training does not change it afterwards, so that a callback may keep it.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> rf.fit(flow, x, steps=9, validate_every=3, callback=lambda at: at.step >= 6, progress=False).history.ended
      'callback'
    """

    step: int
    train: float
    validation: float | None
    flow: Flow

    def __str__(self) -> str:
        text = f"train {self.train:.3f}"
        return f"{text} nats" if self.validation is None else f"{text}, validation {self.validation:.3f} nats"


class FitDivergedError(FloatingPointError):
    """A loss or gradient of `fit` was not finite.

    Args:
      message: what was not finite, and at which step.
      result: the attribute.

    Attributes:
      result: the `FitResult` with the best weights before that, or the initial weights before the first validation
        point.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> try:
      ...     rf.fit(flow, x, steps=9, learning_rate=1e30, progress=False)
      ... except rf.FitDivergedError as error:
      ...     print(error.result.history.ended)
      diverged
    """

    def __init__(self, message: str, result: FitResult):
        super().__init__(message)
        self.result = result


class Scorer:
    """The loss of held-out examples in nats, with the same noise every time."""

    def __init__(
        self,
        flow: Flow,
        examples: Examples | None,
        levels: int | None,
        key: Array,
        estimator: Estimator | None,
        batch_size: int,
        mesh: Mesh | None,
    ):
        """estimator: by default `Exact` for flows of few dimensions, else `Roulette()`.

        Raises:
          ValueError: if `estimator` is not an estimator.
        """
        if estimator is None:
            estimator = Exact() if flow.dim <= _EXACT_DIM else Roulette()
        try:
            check_estimator(estimator)
        except ValueError as error:
            raise ValueError(f"evaluation_{error}") from error
        self.examples, self.levels, self.key, self.dim = examples, levels, key, math.prod(flow.event_shape)
        self._options = {"estimator": estimator, "draws": 1, "batch_size": batch_size, "mesh": mesh}

    def nats(self, loss: float) -> float:
        """Converts the loss of a training step (bits/dim for integer images, otherwise nats) to -log p in nats."""
        return loss if self.levels is None else -log_prob_of_bits(loss, self.dim, self.levels)

    def __call__(self, flow: Flow) -> float | None:
        """Mean -log p; None without examples.

        Raises:
          FloatingPointError: if it is not finite.
        """
        if self.examples is None:
            return None
        x, condition = self.examples
        if self.levels is None:
            scores = -vector_log_prob(flow, x, self.key, condition=condition, **self._options)
        else:
            options = self._options | {"levels": self.levels, "condition": condition}
            scores = image_bits_per_dim(flow, x, self.key, **options)
        found = self.nats(float(scores.mean()))
        if not math.isfinite(found):
            raise FloatingPointError(f"the loss of the validation examples is {found}.")
        return found


class Course:
    """The losses and the best weights of a training so far.

    Attributes:
      losses: validation losses, one for each validation point; empty without validation examples.
      best_step: the step of the kept weights; 0 before the first validation point.
    """

    def __init__(self, flow: Flow, score: Scorer):
        """flow: before training."""
        self.losses: list[float] = []
        self.best_step = 0
        self._best, self._score = flow, score
        self._lines: list[tuple[int, float, float]] = []
        self._began = time.perf_counter()

    def add(self, step: int, loss: float, flow: Flow) -> FitProgress:
        """Scores a flow at a validation point, and keeps it if it is the best; without validation, the latest is kept.

        Raises:
          FloatingPointError: if its score is not finite.
        """
        train, validation = self._score.nats(loss), self._score(flow)
        self._lines.append((step, train, time.perf_counter() - self._began))
        is_best = validation is None or validation < min(self.losses, default=math.inf)
        if validation is not None:
            self.losses.append(validation)
        if is_best:
            self._best, self.best_step = flow, step
        return FitProgress(step, train, validation, flow)

    def result(self, ended: Ending) -> FitResult:
        """The best flow, tightened, and the history."""
        best = nnx.clone(self._best)  # a callback may hold it
        best.tighten()
        steps, train, seconds = (np.array([line[n] for line in self._lines]) for n in range(3))
        validation = None if self._score.examples is None else np.array(self.losses)
        rest = self.best_step, ended, self._score.levels, best.event_shape
        return FitResult(best, History(steps.astype(int), train, validation, seconds, *rest))
