"""The splits of a data set, and how one that lacks some is divided."""

import numpy as np

from resflow_jax.data.images import Images, take

SPLITS = ("train", "validation", "test")


def complete(parts: dict[str, Images | np.ndarray], things: str) -> dict[str, Images | np.ndarray]:
    """All splits from those that there are: "train", and "validation" and "test" or not.

    Where there is no test split, a tenth of the training rows, drawn by a fixed seed, is it; where there is no
    validation split, a twentieth of what is left. The rows of a split keep their order.

    Args:
      parts: arrays of rows.
      things: what a row is, for the error.

    Raises:
      ValueError: if there are too few training rows to take some.
    """
    rng = np.random.default_rng(0)
    parts = dict(parts)
    for name, share in (("test", 10), ("validation", 20)):
        if name not in parts:
            number = len(parts["train"])
            taken = max(1, number // share)
            if number - taken < 1:
                raise ValueError(f"path: expected more than {number} {things} to take some from for {name}")
            order = rng.permutation(number)
            parts[name] = take(parts["train"], np.sort(order[:taken]))
            parts["train"] = take(parts["train"], np.sort(order[taken:]))
    return {name: parts[name] for name in SPLITS}
