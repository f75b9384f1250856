"""Reads a user's vectors: an array in a .npy or .npz file, or a table of numbers in a .csv file."""

import csv
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from resflow_jax.data.arrays import read_arrays
from resflow_jax.data.splits import SPLITS, complete


@dataclass(frozen=True)
class VectorSplits:
    """Vectors [N, D] in three splits.

    Attributes:
      train, validation, test: finite float32 arrays with the same D.

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
    """Raises ValueError unless vectors are finite float32 numbers [N, D], N > 0 and D > 0."""
    expected = f"{name}: expected a float32 array [N, D] with N > 0 and D > 0"
    if not isinstance(vectors, np.ndarray):
        raise ValueError(f"{expected}, got {type(vectors).__name__}")
    if vectors.dtype != np.float32:
        raise ValueError(f"{expected}, got dtype {vectors.dtype}")
    if vectors.ndim != 2 or vectors.size == 0:
        raise ValueError(f"{expected}, got shape {vectors.shape}")
    if (where := _first_not_finite(vectors)) is not None:
        raise ValueError(f"{name}: expected finite numbers, got {vectors[where]} at {list(where)}")


def load_vectors(path: str | Path) -> VectorSplits:
    """Reads the vectors of a file, as float32.

    The file is one of

      - .npy: an array [N, D] of floats or integers;
      - .npz: one such array, or the arrays train, test and optionally validation;
      - .csv: a line of D numbers separated by commas for each vector. The first line may hold names.

    Without a test split, a tenth of the vectors, drawn with a fixed seed, becomes the test split. Without a validation
    split, a twentieth of the remaining vectors becomes it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file cannot be read, has values that are not finite numbers, or too few vectors for all splits.
        The message names the file and the place in it.

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
        parts = {"train": _read_csv(path)}
    else:
        arrays = read_arrays(path)
        label = "{name} of {path}" if len(arrays) > 1 else "{path}"
        parts = {name: _as_vectors(array, label.format(name=name, path=path)) for name, array in arrays.items()}
    return VectorSplits(**complete(parts, f"vectors in {path}"))


def _as_vectors(numbers: np.ndarray, label: str) -> np.ndarray:
    if numbers.dtype.kind not in "fiu" or numbers.ndim != 2 or numbers.size == 0:
        raise ValueError(
            f"path: expected floats or integers [N, D] with N > 0 and D > 0, got {numbers.dtype} {numbers.shape} in "
            f"{label}"
        )
    return _to_float32(numbers, lambda row, column: f"at [{row}, {column}] of {label}")


def _read_csv(path: Path) -> np.ndarray:
    numbers, lines, width = array("d"), array("q"), 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, cells in _lines(file):
                row = [_number(cell) for cell in cells]
                is_header = not width and not any(number is not None for number in row)
                width = width or len(cells)
                if len(cells) != width:
                    raise ValueError(f"path: expected {width} numbers in line {line} of {path}, got {len(cells)}")
                if is_header:
                    continue
                if None in row:
                    column = row.index(None)
                    place = f"in line {line}, column {column + 1} of {path}"
                    raise ValueError(f"path: expected a number, got {cells[column]!r:.40} {place}")
                numbers.extend(row)
                lines.append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"path: expected a .csv file, could not read {path}: {error}") from error
    if not numbers:
        raise ValueError(f"path: expected lines of numbers, found none in {path}")
    table = np.frombuffer(numbers).reshape(-1, width)
    return _to_float32(table, lambda row, column: f"in line {lines[row]}, column {column + 1} of {path}")


def _lines(file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yields (number, cells) for every line. An empty line is one empty cell; empty lines at the end are skipped."""
    reader, empty = csv.reader(file, strict=True), []
    for cells in reader:
        if cells:
            yield from empty
            yield reader.line_num, cells
            empty = []
        else:
            empty.append((reader.line_num, [""]))


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _to_float32(numbers: np.ndarray, place: Callable[[int, int], str]) -> np.ndarray:
    """The numbers [N, D] as float32. For an error, place(row, column) tells where a number is."""
    with np.errstate(over="ignore"):
        vectors = numbers.astype(np.float32)
    if (where := _first_not_finite(vectors)) is not None:
        raise ValueError(f"path: expected finite numbers within float32, got {numbers[where]} {place(*where)}")
    return vectors


def _first_not_finite(vectors: np.ndarray) -> tuple[int, int] | None:
    finite = np.isfinite(vectors)
    return None if finite.all() else divmod(int(finite.argmin()), vectors.shape[1])
