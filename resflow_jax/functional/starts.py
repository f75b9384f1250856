"""Start vectors that keep a power iteration from missing the norm, and what one of them proves.

A v of one Fourier mode of a periodic convolution, or of one block of a block-diagonal map, never leaves it: the
iteration converges there, however large the other singular values are. A vector that has a part in every singular
direction finds the largest one. Let W have the singular value sigma_1 at v_1, and begin at a unit d with
|<d, v_1>| >= b. While the estimate is sigma < sigma_1, an iteration multiplies the part along v_1 by at least
(sigma_1 / sigma)^2, as |W v| <= |W^T u| <= sigma, and sigma never falls. After k iterations

    |<v, v_1>| >= b (1 + e)^k,   |W^T u - sigma v| / sigma >= b (1 + e)^k e,   e = (sigma_1 / sigma)^2 - 1

so a residual below the right side excludes such a sigma_1. It does so after log(1 / b) / log(1 + e) iterations at
the latest, since a unit vector has no part above one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.iteration import wide_dtype
from resflow_jax.functional.vector_norms import Order, dual_map, is_order, positive, vector_norm

Array = jax.Array

HIDDEN = 0.01  # how much larger, relatively, than the estimate a norm may be that `excludes_larger` lets pass
_OVERLAP = 1 / 16  # a random unit vector of n numbers has a part of less than this / sqrt(n) once in twenty times
_LARGEST_SHARE = 0.05  # of what is mixed in, however large the residual may be: a warm start stays one


def unit(v: Array, order: Order) -> Array:
    """v / ||v||_order; zero stays zero."""
    return v / positive(dual_map(v, order)[1])


def pseudo_random_direction(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Numbers in [-2, -1] and [1, 2], always the same ones for a shape: a hash of the index.

    They are scattered, so that they share no symmetry of a map, and none is near zero. The hash costs a few integer
    operations a number, and less to compile than a draw from a generator.
    """
    x = lax.iota(np.uint32, math.prod(shape)) + np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = lax.bitcast_convert_type(x ^ (x >> np.uint32(16)), np.int32)
    x = (x.astype(wide_dtype(dtype)) * 2.0**-31).astype(dtype)  # 2^31 is no float16
    return jnp.where(x < 0, x - 1, x + 1).reshape(shape)


def mixed_start(v: Array, order: Order, residual_tolerance: Array) -> Array:
    """The unit vector along v with a part of the fixed direction, about a twentieth of what the residual may be.

    Where v has converged, the status is hardly affected, and sigma = u^T W v falls by less than the square of the part:
    by 2e-6 relatively at the default tolerance. From call to call such parts add up along every singular direction
    whose value is above that of v, and the number of calls until one shows grows as the logarithm of the part only. A
    zero v gives the direction.
    """
    direction = pseudo_random_direction(v.shape, v.dtype)
    # Divided by the power of two next to its largest element, which rounds nothing, v has no square that overflows.
    # The divisor is such that its reciprocal, by which XLA multiplies, and half of that are normal.
    half, tiny = 0.5 * jnp.max(jnp.abs(v)), float(jnp.finfo(v.dtype).tiny)
    v = 0.5 * v / lax.reduce_precision(jnp.clip(half, tiny, 0.25 / tiny), jnp.finfo(v.dtype).nexp, 0)
    share = jnp.minimum(residual_tolerance / 20, _LARGEST_SHARE) / (1.5 * v.size ** (1 / order))
    return _unit(v + jnp.where(half > 0, share * _length(v, order), 0.5) * direction, order)


def fixed_start(shape: tuple[int, ...], dtype: np.dtype, order: Order) -> Array:
    """The unit vector along the fixed direction."""
    return _unit(0.5 * pseudo_random_direction(shape, dtype), order)


def _unit(v: Array, order: Order) -> Array:
    """`unit`, for a v whose square neither overflows nor vanishes: fewer programs to compile."""
    return v / _length(v, order)


def _length(v: Array, order: Order) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(v))) if is_order(order, 2) else vector_norm(v, order)


def excludes_larger(sigma: Array, residual: Array, iterations: Array, size: int, best: Array) -> Array:
    """Whether an iteration from `pseudo_random_direction` leaves no room for a norm above (1 + HIDDEN) best.

    By the head of this file with a part b of 1 / (16 sqrt(size)), which the direction has for all but rare maps.
    It is a proof, given b, for the norm 2 -> 2. For other orders, whose iterations end in local maxima, it is only a
    rule for when to stop.

    Args:
      sigma: its estimate.
      residual: that of `power_iteration`, which is of the vector before the last iteration.
      iterations: so many were done, at least one.
      size: number of elements of v.
      best: the best estimate known, at least sigma.
    """
    ratio = jnp.clip((1 + HIDDEN) * best / positive(sigma), 1 + HIDDEN, 100.0)
    growth = jnp.square(ratio)
    part = _OVERLAP / math.sqrt(size) * growth ** (iterations - 1).astype(sigma.dtype)
    return residual < part * (growth - 1)
