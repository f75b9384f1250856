"""The history of a training: losses at every validation point, in nats, and how it ended."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from resflow_jax.training.scores import bits_per_dim

Ending = Literal["steps", "patience", "callback", "interrupted", "diverged"]


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """The losses of a training, one entry for each of K validation points.

    A validation point is a step at which `fit` records its losses: every `validate_every` steps, and the last step.

    Attributes:
      step: integers [K], steps done.
      train: floats [K], mean -log p in nats of the training batches since the previous validation point.
      validation: floats [K], mean -log p in nats of the validation examples; None if there are none.
      seconds: floats [K], time since the start, including compilation.
      best_step: the step whose weights the returned flow has.
      ended: "steps" if all steps were taken; "patience" if the validation loss stopped falling; "callback" if the
        callback returned True; "interrupted" after Ctrl-C; "diverged" if a loss or gradient was not finite.
      levels: number of values that a pixel can have, for integer images; otherwise None.
      event_shape: shape of one example.

    Example:
      >>> import numpy as np
      >>> history = History(np.array([10, 20]), np.array([3.0, 2.5]), np.array([2.9, 2.6]), np.array([0.5, 0.9]), 20,
      ...                   "steps", None, (2,))
      >>> history
      History(2 validation points in 20 steps, ended by steps; best at step 20: train 2.5, validation 2.6 nats)
      >>> history.as_dict()["validation"]
      [2.9, 2.6]
    """

    step: np.ndarray
    train: np.ndarray
    validation: np.ndarray | None
    seconds: np.ndarray
    best_step: int
    ended: Ending
    levels: int | None
    event_shape: tuple[int, ...]

    @property
    def train_bits_per_dim(self) -> np.ndarray | None:
        """`train` in bits/dim, [K]; None unless the examples are integer images."""
        return self._bits_per_dim(self.train)

    @property
    def validation_bits_per_dim(self) -> np.ndarray | None:
        """`validation` in bits/dim, [K]; None unless the examples are integer images with a validation set."""
        return self._bits_per_dim(self.validation)

    def _bits_per_dim(self, loss: np.ndarray | None) -> np.ndarray | None:
        if loss is None or self.levels is None:
            return None
        return bits_per_dim(-loss, math.prod(self.event_shape), self.levels)

    def as_dict(self) -> dict[str, Any]:
        """Everything as lists and plain values, to be written as JSON."""
        arrays = {name: getattr(self, name) for name in ("step", "train", "validation", "seconds")}
        found = {name: None if array is None else array.tolist() for name, array in arrays.items()}
        names = ("best_step", "ended", "levels")
        return found | {name: getattr(self, name) for name in names} | {"event_shape": list(self.event_shape)}

    def __repr__(self) -> str:
        if not len(self.step):
            return f"History(no validation point, ended: {self.ended})"
        best = int(np.searchsorted(self.step, self.best_step))
        text = f"train {self.train[best]:.6g}"
        text += "" if self.validation is None else f", validation {self.validation[best]:.6g}"
        return (
            f"History({len(self.step)} validation points in {self.step[-1]} steps, ended by {self.ended}; best at step "
            f"{self.best_step}: {text} nats)"
        )
