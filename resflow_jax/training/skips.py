"""The updates that a training step has skipped, read from the metrics, and the check that there are not too many."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

LIMIT = 10  # skipped updates in a row at which training stops


class Skipped(NamedTuple):
    """An update that was skipped because its loss, its gradient or a diagnostic was not finite.

    Attributes:
      step: number of steps done after it. The update began with batch number step - accumulate, counted from 0.
      loss: its loss.
      gradient_norm: norm of its gradient.
    """

    step: int
    loss: float
    gradient_norm: float


class TooManySkipsError(FloatingPointError):
    """Too many updates in a row were skipped.

    Args:
      message: the text, which names the updates and their loss.
      skipped: the attribute.

    Attributes:
      skipped: the skipped updates since the last pause.

    Example:
      >>> from resflow_jax.training.skips import Skipped, TooManySkipsError
      >>> TooManySkipsError("diverged", (Skipped(3, float("nan"), 1.0),)).skipped[0].step
      3
    """

    def __init__(self, message: str, skipped: tuple[Skipped, ...]):
        super().__init__(message)
        self.skipped = skipped


class Window(NamedTuple):
    """The updates since the last pause.

    Attributes:
      means: mean metrics of the updates that were not skipped; NaN if there is none.
      skipped: the skipped updates.
      row: the skipped updates at the end of this window, and those directly before it in earlier windows if no other
        update lies between.
    """

    means: dict[str, Any]
    skipped: tuple[Skipped, ...]
    row: tuple[Skipped, ...]


def window(values: Sequence[dict[str, Any]], steps: Sequence[int], row: tuple[Skipped, ...]) -> Window:
    """Summarises the updates since the last pause.

    Args:
      values: metrics of each update, on the host, as `Trainer.step` returns them.
      steps: number of steps done after each update.
      row: `Window.row` of the last pause.
    """
    made, skipped = [], []
    for metrics, step in zip(values, steps, strict=True):
        if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics)):
            made.append(metrics)
            row = ()
            continue
        one = Skipped(step, float(metrics["loss"]), float(metrics["gradient_norm"]))
        skipped.append(one)
        row = (*row, one)
    nothing = jax.tree.map(lambda leaf: np.full(np.shape(leaf), np.nan), values[0])
    means = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *made) if made else nothing
    return Window(means, tuple(skipped), row)


def check_row(seen: Window, limit: int, together: int, *, is_last: bool) -> None:
    """Raises TooManySkipsError after too many skipped updates in a row.

    Args:
      seen: the updates since the last pause.
      limit: number of skipped updates in a row that is too many.
      together: steps of an update.
      is_last: whether training ends here. The error is then also raised if all updates since the last pause were
        skipped.
    """
    is_empty = is_last and bool(seen.skipped) and not np.isfinite(seen.means["loss"])
    if len(seen.row) < limit and not is_empty:
        return
    first, last = seen.row[0], seen.row[-1]
    raise TooManySkipsError(
        f"training diverged between steps {first.step - together + 1} and {last.step}: loss {last.loss}, gradient norm "
        f"{last.gradient_norm}; {len(seen.row)} updates in a row were skipped. A smaller learning rate may help.",
        seen.skipped,
    )
