"""Explicit axes of length one, leading or trailing, for arithmetic between an array and a batch.

NumPy's broadcasting adds leading axes implicitly. `jax_numpy_rank_promotion="raise"` forbids that. The compiled program
is the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def trailing(a: Any, x: Array) -> Any:
    """a [*last axes of x] with leading axes of length one, so that it has the rank of x. Scalars stay scalars."""
    return lax.broadcast_to_rank(a, x.ndim) if jnp.ndim(a) else a


def per_example(a: Any, x: Any) -> Any:
    """a [B] as [B, 1, ..., 1] with the rank of x [B, ...]: one number for each example."""
    return a.reshape(-1, *[1] * (x.ndim - 1))
