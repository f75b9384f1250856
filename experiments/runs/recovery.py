"""What a run does about numerical trouble: it logs skipped updates, rolls back with a new key, and gives up at last.

A step skips an update that is not finite (`Trainer.step`). After `safety.skips` of them in a row, and after a
validation that is not finite or not certified, the run goes back to the last good checkpoint and takes a new key. After
`safety.rollbacks` of that it gives up. metrics.jsonl has a line for each skipped update (split "skipped") and each
rollback (split "rollback"), so that a run that is cut and resumed does the same. The line of a rollback lists the
last skipped updates, and has the number of those whose lines it dropped ("dropped").
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs.metrics import Metrics, NullMetrics
from experiments.runs.tasks.task import Task
from resflow_jax import Certificate
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.skips import Skipped, TooManySkipsError
from resflow_jax.training.step import TrainState

_TOLD = 20  # skipped updates that the line of a rollback has
_NUMBERS = 2**32  # steps fold small numbers into a key, rollbacks large ones


class Recovery:
    """The rollbacks of a run so far."""

    def __init__(
        self,
        task: Task,
        checkpoints: Checkpoints,
        metrics: Metrics | NullMetrics,
        restored: Callable[..., TrainState],
        first: Callable[[], TrainState],
    ):
        """Reads from the metrics how often the run has rolled back.

        Args:
          task: task of the run.
          checkpoints: its checkpoints.
          metrics: its metrics.
          restored: `Checkpoints.restore_intact` with its arguments, but for `before`.
          first: makes the state before the first step, in the form that training starts from.
        """
        self._task, self._checkpoints, self._metrics = task, checkpoints, metrics
        self._restored, self._first = restored, first
        self._limit = task.config.safety.rollbacks
        lines = [line for line in metrics.lines if line["split"] == "rollback"]
        self.number = len(lines)
        self._last = lines[-1]["step"] if lines else None
        self._told: list[dict[str, Any]] = []

    @property
    def key(self) -> jax.Array:
        """The key of the run, which differs after each rollback."""
        key = jax.random.key(self._task.config.seed)
        return jax.random.fold_in(key, np.uint32(_NUMBERS - self.number)) if self.number else key

    def log(self, skipped: tuple[Skipped, ...]) -> None:
        """Writes a line for each skipped update: its loss, and the number, key and rows of each of its batches."""
        together = self._task.config.optimizer.accumulate
        for one in skipped:
            numbers = range(one.step - together, one.step)
            line = {
                "loss": one.loss,
                "gradient_norm": one.gradient_norm,
                "seed": self._task.config.seed,
                "rollbacks": self.number,
                "batches": [
                    {
                        "number": n,
                        "key": np.asarray(jax.random.key_data(jax.random.fold_in(self.key, n))).tolist(),
                        "rows": self._task.rows_at(n),
                    }
                    for n in numbers
                ],
            }
            self._metrics.write(step=one.step, split="skipped", **line)
            self._told = [*self._told, {"step": one.step, **line}][-_TOLD:]

    def roll_back(self, error: FloatingPointError) -> TrainState:
        """The state to go on from: that of the last good checkpoint, or before the first step if there is none.

        If nothing has been saved since the last rollback, the checkpoint that it took may be bad: the one before it is
        taken.

        Raises:
          FloatingPointError: after too many rollbacks.
        """
        if isinstance(error, TooManySkipsError):
            self.log(error.skipped)  # the loop has not told them
        if self.number >= self._limit:
            raise FloatingPointError(f"{error} Gave up after {self.number} rollbacks.") from error
        self._checkpoints.wait()
        latest = self._checkpoints.latest_step
        before = latest if latest is not None and latest == self._last else None
        steps = [step for step in self._checkpoints.steps if before is None or step < before]
        state = self._restored(before=before) if steps else self._first()
        step = int(state.step)
        self._checkpoints.set_aside_after(step if steps else -1)
        for line in self._metrics.lines:
            if line["split"] == "rollback":  # they stay, so that a resumed run knows how often it has gone back
                line["step"] = min(line["step"], step)
        dropped = sum(line["split"] == "skipped" and line["step"] > step for line in self._metrics.lines)
        self._metrics.rewind(step)
        self.number, self._last = self.number + 1, step
        told = {"reason": str(error), "skipped": self._told, "dropped": dropped}
        self._metrics.write(step=step, split="rollback", number=self.number, **told)
        self._told = []
        return state


def check_state(state: TrainState, step: int) -> None:
    """Raises FloatingPointError unless the parameters and their averages are finite. All processes call it together."""
    if not _are_finite((state.params, state.ema.ema)):
        raise FloatingPointError(f"training diverged by step {step}: parameters are not finite.")


def check_certificate(certificate: Certificate, step: int) -> None:
    """Raises FloatingPointError if a block that shall be a contraction is none by the certificate."""
    blocks = enumerate(certificate.blocks)
    broken = [n for n, block in blocks if block.is_proved and block.target_bound < 1 and not block.bound < 1]
    if broken:
        bounds = ", ".join(f"{certificate.blocks[n].bound:.6f}" for n in broken)
        raise FloatingPointError(
            f"training diverged by step {step}: expected every block certified with a bound below 1, got {bounds} of "
            f"blocks {', '.join(map(str, broken))}."
        )


@jax.jit
def _are_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))
