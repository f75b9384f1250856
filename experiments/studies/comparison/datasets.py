"""The data sets of the comparison, and the settings that every model shares on each: those of the shipped config."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from experiments.configs import CONFIGS
from experiments.configs.base import DensityConfig, RunConfig, VectorsConfig
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.task import Task
from experiments.runs.tasks.vectors import VectorTask
from experiments.studies.comparison.diamonds import load_diamonds
from resflow_jax.data.toy import TOY_DENSITIES

TABLE, TOY = "diamonds", "toy"
SEARCHED = "checkerboard"  # the toy density that settings are searched on, for all of them


class Defaults(NamedTuple):
    """What a data set is compared with by default.

    Attributes:
      minutes: budget of a run.
      search_minutes: budget of a candidate of the search.
      seeds: number of runs of a model.
      summary: one line for the help.
    """

    minutes: float
    search_minutes: float
    seeds: int
    summary: str


DEFAULTS = {
    "digits": Defaults(5, 0.5, 3, "The 8x8 digits that scikit-learn ships: 5 minutes a run."),
    "fashion_mnist": Defaults(20, 1, 1, "Fashion-MNIST, 28x28: 20 minutes a run."),
    TABLE: Defaults(10, 0.5, 1, "A table of seven columns that plotnine ships: 10 minutes a run."),
    TOY: Defaults(1, 0.1, 1, "All eight toy densities in the plane: a minute a run."),
    **{name: Defaults(1, 0.1, 1, "A toy density in the plane: a minute a run.") for name in TOY_DENSITIES},
}


def names_in(data: str) -> tuple[str, ...]:
    """The data sets that a name stands for."""
    return TOY_DENSITIES if data == TOY else (data,)


def searched_on(name: str) -> str:
    """The data set that the settings for another are searched on: itself, or one toy density for all of them."""
    return SEARCHED if name in TOY_DENSITIES else name


def config_of(name: str, data_dir: str | None = None) -> RunConfig:
    """The shipped settings of a data set, of which the residual flow's model is a part.

    The table has those of `experiments.configs.vectors` with 256 examples a batch and 6e-3 as learning rate.
    """
    if name == TABLE:
        config = CONFIGS["vectors"]
        optimizer = replace(config.optimizer, learning_rate=6e-3)
        return replace(config, model=replace(config.model, dim=7), batch_size=256, optimizer=optimizer)
    config = CONFIGS[name]
    if not isinstance(config, DensityConfig):
        return config
    return replace(config, data=replace(config.data, dir=data_dir))


class TableTask(VectorTask):
    """Density estimation of the table, in nats."""

    def __init__(self, config: VectorsConfig):
        self._set(config, load_diamonds(), TABLE)


def task_for(name: str, config: RunConfig) -> Task:
    """The task of a data set, with its data.

    Raises:
      ImportError: for the table, without plotnine.
    """
    return TableTask(config) if name == TABLE else task_of(config)


def batches_of(task: Task) -> Iterator[np.ndarray]:
    """Endless training batches, the same for all models: epochs in random order, or for toy densities fresh points.

    The examples are held in memory, and a batch is picked from them, so that no model waits for its data.
    """
    config, train = task.config, task.splits.train
    if task.rows_at(0) is None:
        yield from task.batches(0)
    rows, rng = np.asarray(train[: len(train)]), np.random.default_rng(config.seed)
    while True:
        order = rng.permutation(len(rows))
        for first in range(0, len(rows) - config.batch_size + 1, config.batch_size):
            yield rows[order[first : first + config.batch_size]]
