"""The interface of tasks: the data of a run, its loss, its metric and its pictures."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments.configs.base import RunConfig
from experiments.runs.tasks.subset import subset
from resflow_jax import Estimate, Estimator, Flow, InverseStatus, ResidualFlow
from resflow_jax.data.batches import Batches
from resflow_jax.training.step import Loss

Array = jax.Array
Split = Literal["validation", "test"]


class Drawing(NamedTuple):
    """The pictures and figures of a flow at the end of a run.

    Attributes:
      pictures: PNG files by caption.
      rows: further lines of the closing table.
    """

    pictures: dict[str, Path]
    rows: dict[str, str]


class Task(ABC):
    """The data, loss and metric of a run.

    Attributes:
      metric: name in metrics.jsonl of what validation and test measure; the loss of a split is `sign` times the metric.
      train_metric: name in metrics.jsonl of the training loss, times `sign`; by default that of the metric.
      unit: unit of the training loss.
      label: metric and unit, for tables and titles.
      sign: 1 if a lower metric is better, -1 if a higher one is.
      batch_size: examples per batch in evaluation.
      pictures: PNG files that `draw` writes, for the line on what a run writes.
      name: name of the data, for titles.
      splits: the data, with train, validation and test.
      loss: loss of a training step.
    """

    metric: ClassVar[str]
    train_metric: ClassVar[str | None] = None
    unit: ClassVar[str]
    label: ClassVar[str]
    sign: ClassVar[int]
    batch_size: ClassVar[int]
    pictures: tuple[str, ...] = ("*.png of samples",)
    name: str
    splits: Any
    loss: Loss

    def __init__(self, config: RunConfig):
        self.config = config

    @property
    def notes(self) -> dict[str, str]:
        """Lines of closing tables that say what the metric is."""
        return {}

    @property
    def trained(self) -> str:
        """The name in metrics.jsonl of the training loss."""
        return self.train_metric or self.metric

    @abstractmethod
    def initial(self) -> Array:
        """Examples to initialise a flow with, in the form that it takes."""

    @abstractmethod
    def batches(self, step: int, part: int = 0, parts: int = 1) -> Iterator[Any]:
        """The batches from step number `step` on, counted from 0; of each batch, equal part `part` of `parts`."""

    def rows_at(self, step: int) -> list[int] | None:
        """The numbers of the training examples in the batch of step number `step`; None where they are drawn anew."""
        rows = np.arange(len(self.splits.train))
        return Batches(rows, seed=self.config.seed, batch_size=self.config.batch_size)[step].tolist()

    @abstractmethod
    def scores(
        self, flow: ResidualFlow, examples: Any, key: Array, estimator: Estimator, draws: int, batch_size: int
    ) -> np.ndarray:
        """The metric of each of N examples in each draw, [draws, N]."""

    @abstractmethod
    def inputs(self, examples: Any) -> Array:
        """Examples in the form that the flow takes, without noise."""

    @abstractmethod
    def permuted(self, examples: Any) -> Any:
        """The examples with permuted elements, which changes the joint distribution of elements alone."""

    @abstractmethod
    def other(self, name: str) -> Any:
        """The test split of other data of the same shape, by a name or a path.

        Raises:
          ValueError: if the examples have another shape than the task's.
        """

    @abstractmethod
    def sketch(self, flow: ResidualFlow, prefix: Path) -> dict[str, Path]:
        """Draws what the flow has learned so far; returns PNG files by name, whose paths start with the prefix."""

    @abstractmethod
    def draw(self, flow: ResidualFlow, result: Estimate) -> Drawing:
        """Draws what the flow has learned at the end of the run, under the work directory."""

    def estimate(self, flow: ResidualFlow, split: Split) -> Estimate:
        """The mean metric of a split, with the same noise every time; one draw in validation."""
        return self.mean(self.split_scores(flow, split), self.config.evaluation.estimator)

    def split_scores(self, flow: ResidualFlow, split: Split) -> np.ndarray:
        """The scores [draws, N] of a split, of which `estimate` is the mean."""
        settings = self.config.evaluation
        return self.scores(
            flow,
            subset(getattr(self.splits, split), settings.examples),
            jax.random.key(self.config.seed + (1 if split == "validation" else 2)),
            settings.estimator,
            settings.draws if split == "test" else 1,
            self.batch_size,
        )

    def mean(self, scores: np.ndarray, estimator: Estimator) -> Estimate:
        """The mean of an estimator's scores [draws, N], with its standard errors."""
        with np.errstate(invalid="ignore"):  # the error of an infinite mean
            return Estimate.from_scores(scores)

    def log_det_weight(self) -> optax.Schedule | None:
        """The schedule of the log-det's weight in the gradient, by number of steps; None without annealing."""
        steps = self.config.annealing
        return optax.linear_schedule(0.0, 1.0, steps) if steps else None


def draw_samples(flow: ResidualFlow, seed: int, number: int) -> Array:
    """Draws samples like `flow.sample`, but without clipping, and without an error where a solve does not converge."""
    noise = jax.random.normal(jax.random.key(seed), (number, flow.dim), flow.dtype)
    return flow.inverse(noise, return_status=True)[0]


def reconstructed(flow: Flow, x: Array) -> tuple[np.ndarray, dict[str, str]]:
    """f^-1(f(x)), and the line of a closing table on its error."""
    found, status = flow.inverse(flow(x), return_status=True)
    found = np.asarray(found)
    error = f"{np.abs(np.asarray(x) - found).max():.1e}, max |x - f^-1(f(x))|"
    return found, {"reconstruction error": error + unconverged(status)}


def unconverged(status: InverseStatus) -> str:
    """The text of a closing table on solves that did not converge; empty if all did."""
    number = int((~status.converged.all(axis=0)).sum())
    return f"; {number} did not converge" if number else ""
