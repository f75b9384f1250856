"""Ends of intervals, one pair for all columns or one for each, as layers store and apply them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import shown

Array = jax.Array


class Bounds(NamedTuple):
    """Ends of intervals rounded to a dtype, in NumPy's float64, with a method that broadcasts them with an array."""

    low: np.ndarray
    high: np.ndarray
    dtype: Any
    like: Any

    @classmethod
    def of(cls, low: Any, high: Any, like: Any) -> "Bounds":
        """like: an array, with which `constant` broadcasts, or a dtype."""
        dtype = np.dtype(like.dtype if isinstance(like, jax.Array) else like)
        with np.errstate(over="ignore"):
            low, high = (np.asarray(end, float).astype(dtype).astype(float) for end in (low, high))
        if not (low < high).all():
            raise ValueError(f"high: expected ends that differ in {dtype}, got {high} above {low}")
        return cls(low, high, dtype, like)

    @property
    def width(self) -> np.ndarray:
        return self.high - self.low

    def constant(self, value: Any) -> float | Array:
        """Numbers, one for all or one for each column, in a form that combines with the array `like`."""
        value = np.asarray(value)
        return float(value) if value.ndim == 0 else trailing(jnp.asarray(value, self.dtype), self.like)


def as_bounds(low: Any, high: Any) -> tuple[Any, Any]:
    """Checks the ends of intervals, and returns both as floats, or both as nested tuples of one shape, which are
    hashable.

    Raises:
      ValueError: for ends that do not broadcast, are NaN, or where low is not below high; it names the place.
    """
    ends = []
    for name, end in (("low", low), ("high", high)):
        try:
            if np.iscomplexobj(end):
                raise TypeError("complex numbers")
            ends.append(np.asarray(end, float))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name}: expected numbers, got {shown(end)}") from error
        if np.isnan(ends[-1]).any():
            raise ValueError(f"{name}: expected numbers, got NaN in {end!r}")
    try:
        low, high = np.broadcast_arrays(*ends)
    except ValueError as error:
        expected = f"an array that broadcasts with low, of shape {ends[0].shape}"
        raise ValueError(f"high: expected {expected}, got shape {ends[1].shape}") from error
    is_wrong = ~(low < high)
    if is_wrong.any():
        first = np.unravel_index(is_wrong.argmax(), is_wrong.shape)
        place = f" at {first[0] if len(first) == 1 else tuple(map(int, first))}" if first else ""
        raise ValueError(f"high: expected numbers above low, got {high[first]} above {low[first]}{place}")
    return _as_tuples(low.tolist()), _as_tuples(high.tolist())


def as_text(low: Any, high: Any) -> str | np.ndarray:
    """The intervals as errors show them: "[0, 2]", "(0, inf)"; an array of such texts for arrays."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    is_closed = np.isfinite(low) & np.isfinite(high)
    texts = [
        f"[{a:g}, {b:g}]" if closed else f"({a:g}, {b:g})"
        for a, b, closed in zip(low.ravel(), high.ravel(), is_closed.ravel(), strict=True)
    ]
    return np.asarray(texts).reshape(low.shape) if low.ndim else texts[0]


def _as_tuples(values: Any) -> Any:
    return tuple(map(_as_tuples, values)) if isinstance(values, list) else values
