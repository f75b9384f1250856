"""What a run learns and how it is judged and drawn: the interface of every task."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments.configs.base import RunConfig
from resflow_jax import Estimate, Estimator, InverseStatus, ResidualFlow
from resflow_jax.training.step import Loss

Array = jax.Array
Split = Literal["validation", "test"]


class Drawing(NamedTuple):
    """What a task shows of a flow at the end of a run.

    Attributes:
      pictures: PNG files by caption.
      rows: further lines of the closing table.
    """

    pictures: dict[str, Path]
    rows: dict[str, str]


class Task(ABC):
    """What a run learns and how it is judged.

    Attributes:
      metric: name of the likelihood in metrics.jsonl; its loss is `sign` times it.
      unit: of the metric.
      label: the metric and its unit, for people.
      sign: 1 where less of the metric is better, -1 where more is.
      batch_size: examples at once where flows are judged.
      name: of the data, for titles.
      splits: the data, with train, validation and test.
      loss: of a training step.
    """

    metric: ClassVar[str]
    unit: ClassVar[str]
    label: ClassVar[str]
    sign: ClassVar[int]
    batch_size: ClassVar[int]
    name: str
    splits: Any
    loss: Loss

    def __init__(self, config: RunConfig):
        self.config = config

    @abstractmethod
    def initial(self) -> Array:
        """Examples to initialise a flow with, as it takes them."""

    @abstractmethod
    def batches(self, step: int, part: int = 0, parts: int = 1) -> Iterator[Any]:
        """The batches of step number `step`, counted from 0, and all that follow; of each, one of so many parts."""

    @abstractmethod
    def scores(
        self, flow: ResidualFlow, examples: Any, key: Array, estimator: Estimator, draws: int, batch_size: int
    ) -> np.ndarray:
        """The metric of each of N examples in each draw, [draws, N]."""

    @abstractmethod
    def inputs(self, examples: Any) -> Array:
        """Examples as the flow takes them, without noise."""

    @abstractmethod
    def permuted(self, examples: Any) -> Any:
        """Examples that differ from those of the data in how their elements belong together, and in nothing else."""

    @abstractmethod
    def other(self, name: str) -> Any:
        """The test split of other data, whose examples the flow takes as well; by a name or a path.

        Raises:
          ValueError: if they have another shape than the task's.
        """

    @abstractmethod
    def sketch(self, flow: ResidualFlow, prefix: Path) -> dict[str, Path]:
        """Draws what the flow has learned so far; PNG files by name, whose paths start with the prefix."""

    @abstractmethod
    def draw(self, flow: ResidualFlow, result: Estimate) -> Drawing:
        """Draws what the flow has learned in the end, under the work directory."""

    def estimate(self, flow: ResidualFlow, split: Split) -> Estimate:
        """The mean metric of a split, with the same noise every time; one draw in validation."""
        settings = self.config.evaluation
        scores = self.scores(
            flow,
            getattr(self.splits, split)[: settings.examples],
            jax.random.key(self.config.seed + (1 if split == "validation" else 2)),
            settings.estimator,
            settings.draws if split == "test" else 1,
            self.batch_size,
        )
        return self.mean(scores, settings.estimator)

    def mean(self, scores: np.ndarray, estimator: Estimator) -> Estimate:
        """The mean of scores [draws, N] that an estimator gave, with its standard errors."""
        return Estimate.from_scores(scores)

    def log_det_weight(self) -> optax.Schedule | None:
        """That of the log-det in the gradient, by steps done."""
        steps = self.config.annealing
        return optax.linear_schedule(0.0, 1.0, steps) if steps else None


def draw_samples(flow: ResidualFlow, seed: int, number: int) -> tuple[Array, InverseStatus]:
    """As `flow.sample`, images not clipped, with the status of the solves in the place of a warning."""
    return flow.inverse(jax.random.normal(jax.random.key(seed), (number, flow.dim), flow.dtype), return_status=True)


def unconverged(status: InverseStatus) -> str:
    """What a closing table says of solves that did not converge, if any."""
    number = int((~status.converged.all(axis=0)).sum())
    return f"; {number} did not converge" if number else ""
