"""Reads a user's vectors: an array in a .npy or .npz file, or a table of numbers in a .csv file."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resflow_jax.data.arrays import read_arrays
from resflow_jax.data.splits import SPLITS, complete
from resflow_jax.data.tables import LARGEST_INTEGER, read_table


@dataclass(frozen=True)
class VectorSplits:
    """Vectors [N, D] in three splits.

    Attributes:
      train, validation, test: finite float32 or float64 arrays with the same D.

    Raises:
      ValueError: for arrays of another dtype or rank, of different D, or with numbers that are not finite.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __post_init__(self):
        for name in SPLITS:
            vectors = getattr(self, name)
            check_vectors(name, vectors)
            if vectors.shape[1] != self.dim:
                raise ValueError(f"{name}: expected vectors of {self.dim} numbers, got {vectors.shape[1]}")

    @property
    def dim(self) -> int:
        """D, the length of one vector."""
        return self.train.shape[1]


def check_vectors(name: str, vectors: np.ndarray) -> None:
    """Raises ValueError unless vectors are finite float32 or float64 numbers [N, D], N > 0 and D > 0."""
    expected = f"{name}: expected a float32 or float64 array [N, D] with N > 0 and D > 0"
    if not isinstance(vectors, np.ndarray):
        raise ValueError(f"{expected}, got {type(vectors).__name__}")
    if vectors.dtype not in (np.float32, np.float64):
        raise ValueError(f"{expected}, got dtype {vectors.dtype}")
    if vectors.ndim != 2 or vectors.size == 0:
        raise ValueError(f"{expected}, got shape {vectors.shape}")
    if (where := _first(~np.isfinite(vectors))) is not None:
        raise ValueError(f"{name}: expected finite numbers, got {vectors[where]} at {list(where)}")


def load_vectors(path: str | Path) -> VectorSplits:
    """Reads the vectors of a file without rounding: float32 if the file has floats of at most 32 bits, else float64.

    The file is one of

      - .npy: an array [N, D] of floats or integers, in any byte order;
      - .npz: one such array, or the arrays train, test and optionally validation;
      - .csv: a line of D numbers for each vector, as `resflow_jax.data.tables.read_table` reads it. The first line may
        hold names.

    Without a test split, a tenth of the vectors, drawn with a fixed seed, becomes the test split. Without a validation
    split, a twentieth of the remaining vectors becomes it. Equal vectors are kept, with a warning: the density of
    vectors that are repeated is not bounded, and one of them may be in the training and another in the test split.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file cannot be read, has values that are not finite numbers or that float64 does not hold, as
        integers beyond 2^53, or too few vectors for all splits. The message names the file and the place in it.

    Example:
      >>> from resflow_jax.data.vectors import load_vectors
      >>> np.save("vectors.npy", np.random.default_rng(0).normal(size=(100, 3)))
      >>> vectors = load_vectors("vectors.npy")
      >>> vectors.train.shape, vectors.validation.shape, vectors.test.shape
      ((86, 3), (4, 3), (10, 3))
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a file of vectors, found nothing at {path}")
    kind = path.suffix.lower()
    if kind not in (".npy", ".npz", ".csv") or path.is_dir():
        raise ValueError(f"path: expected a .npy, .npz or .csv file of vectors, got {path}")
    if kind == ".csv":
        table = read_table(path)
        parts = {"train": table.numbers}
        _warn_of_equal(table.numbers, lambda row: f"line {table.first + row}", str(path))
    else:
        arrays = read_arrays(path)
        label = "{name} of {path}" if len(arrays) > 1 else "{path}"
        parts = {name: _as_vectors(array, label.format(name=name, path=path)) for name, array in arrays.items()}
    return VectorSplits(**complete(parts, f"vectors in {path}"))


def _as_vectors(numbers: np.ndarray, label: str) -> np.ndarray:
    """The numbers as float32 or float64 in the machine's byte order, unchanged."""
    if numbers.dtype.kind not in "fiu" or numbers.ndim != 2 or numbers.size == 0:
        raise ValueError(
            f"path: expected floats or integers [N, D] with N > 0 and D > 0, got {numbers.dtype} {numbers.shape} in "
            f"{label}"
        )
    is_float = numbers.dtype.kind == "f"
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(numbers, np.float32 if is_float and numbers.itemsize <= 4 else np.float64)
    wrong = ~np.isfinite(vectors)
    if is_float and numbers.itemsize > 8:
        wrong |= vectors != numbers
    elif not is_float and numbers.itemsize == 8:
        wrong |= (numbers > LARGEST_INTEGER) | (numbers < -LARGEST_INTEGER)
    if (where := _first(wrong)) is not None:
        raise ValueError(
            f"path: expected finite numbers that float64 holds, got {numbers[where]} at {list(where)} of {label}"
        )
    _warn_of_equal(vectors, lambda row: f"row {row}", label)
    return vectors


def _warn_of_equal(vectors: np.ndarray, name: Callable[[int], str], label: str) -> None:
    """Warns of vectors that are equal; name(row) tells where one is."""
    rows = np.ascontiguousarray(vectors + 0.0)  # -0 becomes 0
    _, first, inverse = np.unique(
        rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel(), return_index=True, return_inverse=True
    )
    repeated = np.flatnonzero(first[inverse] != np.arange(len(rows)))
    if len(repeated):
        row = int(repeated[0])
        warnings.warn(
            f"{len(repeated)} of the {len(rows)} vectors in {label} repeat an earlier one, first {name(row)} that of "
            f"{name(int(first[inverse[row]]))}: their density is not bounded, and splits may share them",
            stacklevel=4,
        )


def _first(wrong: np.ndarray) -> tuple[int, int] | None:
    """Row and column of the first true element; None if there is none."""
    return divmod(int(wrong.argmax()), wrong.shape[1]) if wrong.any() else None
