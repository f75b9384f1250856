"""Axes of length one before and behind those of an array, for sums and products with a batch.

NumPy's rule adds leading axes by itself, but `jax_numpy_rank_promotion="raise"` forbids that. The compiled program is
the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def trailing(a: Any, x: Array) -> Any:
    """a [*last axes of x] as [1, ..., 1, *last axes of x]: one number for each channel or feature. Scalars stay."""
    return lax.broadcast_to_rank(a, x.ndim) if jnp.ndim(a) else a


def leading(a: Array, x: Array) -> Array:
    """a [*first axes of x] as [*first axes of x, 1, ..., 1]: one number for each example."""
    return lax.expand_dims(a, range(a.ndim, x.ndim))
