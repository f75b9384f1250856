"""The steps at which a run logs, validates and saves, and the test for early stopping."""

from typing import Any

from experiments.configs.base import RunConfig
from experiments.runs.loop import falls_due
from experiments.runs.tasks.task import Task
from resflow_jax.training.loop import has_stopped_improving


class Schedule:
    """The steps of a run at which it logs, validates or saves. The methods take the number of steps done."""

    def __init__(self, config: RunConfig):
        self._config = config

    def logs_at(self, step: int) -> bool:
        """Whether the metrics are written."""
        return self._is_due(step, self._config.log_every)

    def validates_at(self, step: int) -> bool:
        """Whether the averaged weights are validated, saved and drawn, and the series lengths refitted, if at all."""
        return self._is_due(step, self._config.evaluation.every) or step == self._config.steps

    def saves_at(self, step: int) -> bool:
        """Whether the state is saved without a validation."""
        return self._is_due(step, self._config.save_every)

    def pauses_at(self, step: int) -> bool:
        """Whether any of these happens."""
        return self.logs_at(step) or self.validates_at(step) or self.saves_at(step)

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and falls_due(step, every, self._config.optimizer.accumulate)


def is_patience_spent(task: Task, lines: list[dict[str, Any]]) -> bool:
    """Whether the last `patience` validations have not improved on the earlier ones."""
    found = [task.sign * line[name] for line in lines if (name := f"validation_{task.metric}") in line]
    return has_stopped_improving(found, task.config.evaluation.patience)
