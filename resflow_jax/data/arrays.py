"""Arrays of a .npy or .npz file, by the splits that they are."""

from pathlib import Path

import numpy as np

from resflow_jax.data.splits import SPLITS


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The one array of a file as "train", or those named train, test and, if there is one, validation.

    Raises:
      ValueError: if the file cannot be read, or has arrays of other names; the message names it.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            arrays = {"train": content} if isinstance(content, np.ndarray) else {n: content[n] for n in content.files}
    except Exception as error:  # of a damaged file NumPy and zipfile raise all kinds
        raise ValueError(f"path: expected a {path.suffix} file of arrays, could not read {path}: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"path: expected a {path.suffix} file of arrays, {name} in {path} is not one")
    if len(arrays) == 1:
        return {"train": next(iter(arrays.values()))}
    if "train" not in arrays or not set(arrays) <= set(SPLITS):
        raise ValueError(
            f"path: expected one array, or arrays named train, test and validation, got "
            f"{', '.join(arrays) or 'none'} in {path}"
        )
    return arrays
