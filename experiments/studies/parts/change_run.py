"""The process of one training of the study of changes, on one core.

    python -m experiments.studies.parts.change_run CORE < JOB

reads a job as a line of JSON, and prints its result as one.
"""

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.configs.base import DensityConfig
from experiments.configs.tiny import tiny
from experiments.runs.tasks.of_config import task_of
from experiments.studies.comparison.clock import Clock
from experiments.studies.comparison.datasets import batches_of
from experiments.studies.comparison.flax_contender import FlaxContender
from experiments.studies.comparison.training import Model, train
from experiments.studies.comparison.worker import end_with_parent, keep_to
from experiments.studies.parts.config_changes import Variant, variants_of, without

VALIDATIONS = 4
SMALL_STEPS = 2  # updates of a small job, whatever its budget


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
      data: name of the data set.
      change: number of the last change of the config, 0 for that of NAME_uniform; with `without`, of the one left out.
      seed: random seed.
      seconds: CPU time for updates.
      validated: number of validation images.
      data_dir: directory of TensorFlow data sets.
      small: whether the flow is that of `--tiny`.
      without: whether the config has all changes but this one, instead of all up to this one.
    """

    data: str
    change: int
    seed: int
    seconds: float
    validated: int
    data_dir: str | None = None
    small: bool = False
    without: bool = False

    def variant(self) -> Variant:
        """The config of the run, as the study of changes has it, and its title."""
        return without(self.data, self.change) if self.without else variants_of(self.data)[self.change]

    def config(self) -> DensityConfig:
        """The config of the run."""
        config = self.variant().config
        config = replace(config, data=replace(config.data, dir=self.data_dir), seed=self.seed)
        return tiny(config) if self.small else config


def made(job: Job) -> dict[str, Any]:
    """Trains, and returns the least validation bits/dim, the number of updates and the seconds of one.

    Raises:
      FloatingPointError: if no validation was finite.
    """
    config = job.config()
    task = task_of(config)
    images = task.splits.validation[: job.validated]

    def validate(model: Model) -> float:
        with np.errstate(all="ignore"):
            return float(model.scores(images, config.seed + 1, 1).mean())

    options = {"at_least": SMALL_STEPS if job.small else 0, "set_up_counts": False, "validations": VALIDATIONS}
    rate = config.optimizer.learning_rate
    trained = train(FlaxContender(task), batches_of(task), Clock(job.seconds), rate, validate, **options)
    if trained.model is None:
        raise FloatingPointError(f"job: expected a finite validation, got none in {trained.steps} steps of {job}")
    return {"bits_per_dim": trained.loss, "steps": trained.steps, "step_seconds": trained.step_seconds}


def main() -> None:
    """Does one job."""
    end_with_parent()
    keep_to(sys.argv[1])
    job = Job(**json.loads(sys.stdin.readline()))
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(made(job)), file=answers)


if __name__ == "__main__":
    main()
