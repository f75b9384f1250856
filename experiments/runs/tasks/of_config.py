"""Chooses the task of a config."""

from experiments.configs.base import DensityConfig, RunConfig, VectorsConfig
from experiments.configs.classification import ClassifyConfig, ImportedClassifyConfig
from experiments.configs.toy import ToyConfig
from experiments.runs.tasks.classes import ClassTask
from experiments.runs.tasks.images import ImageTask
from experiments.runs.tasks.task import Task
from experiments.runs.tasks.toy import ToyTask
from experiments.runs.tasks.vectors import VectorTask


def task_of(config: RunConfig) -> Task:
    """The task that a config describes, with its data."""
    tasks = {
        DensityConfig: ImageTask,
        VectorsConfig: VectorTask,
        ToyConfig: ToyTask,
        ClassifyConfig: ClassTask,
        ImportedClassifyConfig: ClassTask,
    }
    return tasks[type(config)](config)
