"""Reads the arrays of a .npy or .npz file, by name or by split."""

from pathlib import Path

import numpy as np

from resflow_jax.data.limits import check_zip
from resflow_jax.data.split_names import by_split_name, look_like_splits
from resflow_jax.data.splits import SPLITS

# arrays of labels and of names of classes, which may accompany images
LABELS = frozenset({"labels", "names", *(f"{split}_labels" for split in SPLITS)})


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by split: its only array as "train", or the arrays train, test and (if any) validation.

    Raises:
      ValueError: if the file cannot be read, or has arrays with other names; the message names the file.
    """
    return by_split(read_named_arrays(path), path)


def read_named_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file by name; that of a .npy file has the name "train".

    Raises:
      ValueError: if the file cannot be read; the message names it.
    """
    try:
        with path.open("rb") as file:
            check_zip(file, path.stat().st_size)
            content = np.load(file, allow_pickle=False)
            arrays = {"train": content} if isinstance(content, np.ndarray) else {n: content[n] for n in content.files}
    except Exception as error:  # NumPy and zipfile raise many kinds of errors for a damaged file
        raise ValueError(f"path: expected a {path.suffix} file of arrays, could not read {path}: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"path: expected a {path.suffix} file of arrays, got something else for {name} in {path}")
    return arrays


def by_split(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """One array as "train", unless its name is that of another split; more by their names, as in `read_arrays`.

    Names of splits may be in any case, and short, such as "val".
    """
    splits = by_split_name(arrays)
    if splits is not None:
        return {split: arrays[name] for split, name in splits.items()}
    if len(arrays) == 1 and not look_like_splits(arrays):
        return {"train": next(iter(arrays.values()))}
    raise ValueError(
        f"path: expected one array, or arrays named train, test and validation, got {', '.join(arrays) or 'none'} in "
        f"{path}"
    )
