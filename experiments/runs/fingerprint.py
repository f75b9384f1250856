"""What the data of a run are recognised by, which its work directory keeps in data.json.

The division of data into splits depends on their number. If data were added under a run, its test split would hold
examples that it has been trained on.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.configs.base import DataConfig
from experiments.runs.tasks.labelled import Rows
from experiments.runs.tasks.task import Task
from resflow_jax.data.image_files import find_files
from resflow_jax.data.images import Images
from resflow_jax.data.splits import SPLITS

_EMBEDDED = ("digits", "photographs")  # they come with a package


def is_from_files(data: Any) -> bool:
    """Whether the data settings of a config name files, or a data set that is prepared on disk."""
    return getattr(data, "path", None) is not None or (isinstance(data, DataConfig) and data.name not in _EMBEDDED)


def fingerprint(task: Task) -> dict[str, Any]:
    """What the data of a task are recognised by: numbers and texts by name, none for data that are not from files.

    These are the number of examples of each split and a hash of its arrays. Images in a folder that are read as needed
    are recognised by the names and sizes of their files, those of a TensorFlow data set by their numbers alone.
    """
    data = task.config.data
    if not is_from_files(data):
        return {}
    arrays = {split: _arrays(getattr(task.splits, split)) for split in SPLITS}
    found: dict[str, Any] = {split: _of_arrays(own) for split, own in arrays.items()}
    are_held = all(isinstance(array, np.ndarray) for own in arrays.values() for array in own.values())
    if not are_held and data.path is not None:
        found["files"] = _of_files(data.path)
    return found


def _arrays(rows: Any) -> dict[str, Images]:
    return rows._asdict() if isinstance(rows, Rows) else {"examples": rows}


def _of_arrays(arrays: dict[str, Images]) -> dict[str, Any]:
    """The number of examples, and a hash of each array in memory."""
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items() if isinstance(array, np.ndarray)}
    number = len(next(iter(arrays.values())))
    return {"number": number} | {f"sha256 of {name}": _short(hashlib.sha256(array)) for name, array in held.items()}


def _of_files(folder: Path) -> dict[str, Any]:
    """The number of the image files in a folder, and a hash of their names and sizes."""
    files, _ = find_files(folder)
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.relative_to(folder)) + f"\0{file.stat().st_size}\0".encode())
    return {"number": len(files), "sha256 of names and sizes": _short(digest)}


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]
