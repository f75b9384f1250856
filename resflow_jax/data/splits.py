"""The splits of a data set, and the division of a data set that lacks some of them."""

import numpy as np

from resflow_jax.data.images import Images, take

SPLITS = ("train", "validation", "test")


def complete(parts: dict[str, Images | np.ndarray], things: str) -> dict[str, Images | np.ndarray]:
    """Makes the splits that are missing from the training split.

    Without a test split, a tenth of the training rows, drawn with a fixed seed, becomes the test split. Without a
    validation split, a twentieth of the remaining rows becomes it. The rows of a split keep their order.

    Args:
      parts: arrays of rows by split: "train", and optionally "validation" and "test".
      things: plural noun for rows, for errors.

    Returns:
      Arrays of rows for all three splits.

    Raises:
      ValueError: if there are too few training rows to divide.
    """
    rng = np.random.default_rng(0)
    parts = dict(parts)
    for name, share in (("test", 10), ("validation", 20)):
        if name not in parts:
            number = len(parts["train"])
            taken = max(1, number // share)
            if number - taken < 1:
                raise ValueError(f"path: expected at least 2 {things} to make a {name} split from, got {number}")
            order = rng.permutation(number)
            parts[name] = take(parts["train"], np.sort(order[:taken]))
            parts["train"] = take(parts["train"], np.sort(order[taken:]))
    return {name: parts[name] for name in SPLITS}
