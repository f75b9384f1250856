"""The shift and the scale of every column of vectors, computed in float64 before the vectors become float32.

    x' = x - shift,   rounded to float32           y = (x' - mean) / std

float32 keeps 24 bits of a number. Of a column far from zero, such as Unix times, few of them are left for the
differences between rows. Such a column is shifted near zero first, in float64. A shift has no log-det: log p(x') in
nats is log p(x), in the units of the data. The flow itself divides by the std (`rf.Normalization`), with its log-det.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np

_FAR = 2.0**8  # standard deviations from zero beyond which a column is shifted: float32 then keeps 16 bits of one
_PARTS = 4096  # of a standard deviation: a column that is rounded to more of it has lost much
_STDS = 1e-30, 1e30  # the smallest and the largest std: float32 ends at 1e-38 and 1e38


class Units(NamedTuple):
    """The units of vectors [N, D]: what is subtracted before they become float32, and their mean and std after it.

    Attributes:
      shift: D numbers, zero for a column near zero; None if all are zero.
      mean: D means of the shifted columns, to 1e-5 of the std.
      std: D standard deviations, with six digits.
    """

    shift: tuple[float, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def units_of(train: np.ndarray, place: str) -> Units:
    """The units of training vectors, finite floats [N, D].

    Numbers are rounded where that changes nothing of importance, so that a config with them is short: a shift to a
    tenth of the std. So float32 holds the numbers of a shifted column to about 2^-20 of its std.

    Args:
      train: the training vectors.
      place: words for where they are from, for errors.

    Raises:
      ValueError: for fewer than two vectors, a column with one value in all rows, which has no density, or with a std
        outside 1e-30..1e30. The message names the column, counted from 1, and the place.

    Example:
      >>> from resflow_jax.data.units import units_of
      >>> times = 1.7e9 + 3600.0 * np.arange(24)[:, None]
      >>> units = units_of(times, "times")
      >>> units.shift, round(units.std[0])
      ((1700041000.0,), 24920)
    """
    train = np.asarray(train, np.float64)
    if len(train) < 2:
        raise ValueError(f"path: expected at least 2 vectors to train on, got {len(train)} of {place}")
    center = train.mean(axis=0)
    if not np.isfinite(center).all():
        center = (train / len(train)).sum(axis=0)
    with np.errstate(over="ignore"):
        distance = train - center
    unit = np.abs(distance).max(axis=0)
    is_constant = (train == train[0]).all(axis=0)
    if is_constant.any():
        column = int(is_constant.argmax())
        raise ValueError(
            f"path: expected columns that vary, got {train[0, column]} in every training row of column {column + 1} of "
            f"{place}; a constant has no density, leave it out"
        )
    std = unit * np.sqrt(np.square(distance / np.where(unit > 0, unit, 1)).mean(axis=0))
    is_wrong = ~((std >= _STDS[0]) & (std <= _STDS[1]))
    if is_wrong.any():
        column = int(is_wrong.argmax())
        raise ValueError(
            f"path: expected standard deviations between {_STDS[0]} and {_STDS[1]}, got {std[column]} in "
            f"column {column + 1} of {place}; take another unit"
        )
    is_far = np.abs(train).max(axis=0) > _FAR * std
    shift = tuple(_rounded(c, s, 1) if far else 0.0 for c, s, far in zip(center, std, is_far, strict=True))
    near = train - np.asarray(shift)  # their mean is finer than float64 at the place of the column
    mean = tuple(_rounded(value, s, 5) for value, s in zip(near.mean(axis=0), std, strict=True))
    return Units(shift if any(shift) else None, mean, tuple(float(f"{value:.6g}") for value in std))


def _rounded(value: float, std: float, digits: int) -> float:
    """The value, with some digits after the first one of its std."""
    return round(float(value), digits - math.floor(math.log10(std)))


def shifted(vectors: np.ndarray, shift: tuple[float, ...] | None) -> np.ndarray:
    """float32 vectors - shift, [N, D], with the difference in float64; None shifts nothing.

    Raises:
      ValueError: for another number of shifts, and for numbers that float32 does not hold.
    """
    if shift is not None:
        _check_length(shift, vectors.shape[1])
        vectors = np.asarray(vectors, np.float64) - np.asarray(shift)
    with np.errstate(over="ignore"):
        near = vectors.astype(np.float32)
    if not np.isfinite(near).all():
        row, column = np.argwhere(~np.isfinite(near))[0]
        raise ValueError(
            f"path: expected numbers within float32, got {vectors[row, column]} in column {column + 1}; take another "
            "unit"
        )
    return near


def in_own_units(vectors: np.ndarray, shift: tuple[float, ...] | None) -> np.ndarray:
    """The inverse of `shifted`: float64 vectors + shift, or the vectors themselves without a shift."""
    if shift is None:
        return vectors
    _check_length(shift, vectors.shape[1])
    return np.asarray(vectors, np.float64) + np.asarray(shift)


def rounded_columns(vectors: np.ndarray, shift: tuple[float, ...] | None = None) -> list[int]:
    """The columns, from 0, that float32 minus the shift rounds to more than 1/4096 of their standard deviation.

    Float32 vectors without a shift are not rounded. Columns with one value do not count.

    Example:
      >>> from resflow_jax.data.units import rounded_columns
      >>> times = 1.7e9 + 3600.0 * np.arange(24)[:, None]
      >>> rounded_columns(times), rounded_columns(times, (1.7e9,))
      ([0], [])
    """
    if shift is not None:
        _check_length(shift, vectors.shape[1])
        vectors = np.asarray(vectors, np.float64) - np.asarray(shift)
    if vectors.dtype == np.float32:
        return []
    with np.errstate(over="ignore", invalid="ignore"):
        size = np.abs(vectors).max(axis=0)
        unit = np.where(size > 0, size, 1)  # squares neither overflow nor underflow
        error = np.sqrt(np.mean(np.square((vectors.astype(np.float32) - vectors) / unit), axis=0))
        std = np.std(vectors / unit, axis=0)
    return np.flatnonzero((vectors != vectors[0]).any(axis=0) & ~(error <= std / _PARTS)).tolist()


def warn_if_rounded(name: str, x: np.ndarray) -> None:
    """Warns of elements of events x, float64 [N, ...], whose differences float32 rounds much."""
    if columns := rounded_columns(np.reshape(x, (len(x), -1))):
        where = np.unravel_index(columns[0], x.shape[1:])
        warnings.warn(
            f"{name}: float32 rounds x[:, {', '.join(map(str, where))}] to more than 1/{_PARTS} of its standard "
            "deviation; subtract its mean in float64, which changes no log-density, or take another unit",
            stacklevel=4,
        )


def _check_length(shift: tuple[float, ...], dim: int) -> None:
    if len(shift) != dim:
        raise ValueError(f"data.shift: expected {dim} numbers, one for each column, got {len(shift)}")
