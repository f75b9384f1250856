"""Reads the arrays of a .npy or .npz file, by splits."""

from pathlib import Path

import numpy as np

from resflow_jax.data.splits import SPLITS


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by split: its only array as "train", or the arrays train, test and (if any) validation.

    Raises:
      ValueError: if the file cannot be read, or has arrays with other names; the message names the file.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            arrays = {"train": content} if isinstance(content, np.ndarray) else {n: content[n] for n in content.files}
    except Exception as error:  # NumPy and zipfile raise many kinds of errors for a damaged file
        raise ValueError(f"path: expected a {path.suffix} file of arrays, could not read {path}: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"path: expected a {path.suffix} file of arrays, got something else for {name} in {path}")
    if len(arrays) == 1:
        return {"train": next(iter(arrays.values()))}
    if "train" not in arrays or not set(arrays) <= set(SPLITS):
        raise ValueError(
            f"path: expected one array, or arrays named train, test and validation, got "
            f"{', '.join(arrays) or 'none'} in {path}"
        )
    return arrays
