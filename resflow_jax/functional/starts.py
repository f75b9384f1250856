"""Start vectors with which a power iteration does not miss the norm, and the proof.

A power iteration can stay in a subspace: if v is one Fourier mode of a periodic convolution, or lies in one block of a
block-diagonal map, it converges there, even if other singular values are larger. A vector with a component along every
singular vector finds the largest one. Let W have the largest singular value sigma_1, with the right singular vector
v_1, and start from a unit vector d with |<d, v_1>| >= b. As long as the estimate is sigma < sigma_1, an iteration
multiplies the component along v_1 by at least (sigma_1 / sigma)^2, as |W v| <= |W^T u| <= sigma, and sigma never
decreases. After k iterations

    |<v, v_1>| >= b (1 + e)^k,   |W^T u - sigma v| / sigma >= b (1 + e)^k e,   e = (sigma_1 / sigma)^2 - 1

so a residual below the right side excludes such a sigma_1. That happens after at most log(1 / b) / log(1 + e)
iterations, since the component of a unit vector is at most one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.vector_norms import Order, dual_map, is_order, positive, vector_norm

Array = jax.Array

HIDDEN = 0.01  # `excludes_larger` excludes norms that exceed the estimate by more than this fraction
_OVERLAP = 1 / 16  # a random unit vector in n dimensions has a component below this / sqrt(n) with probability 1/20
_LARGEST_SHARE = 0.05  # largest length of the added direction relative to v, so that a warm start stays warm


def unit(v: Array, order: Order) -> Array:
    """v / ||v||_order; zero for zero."""
    return v / positive(dual_map(v, order)[1])


def pseudo_random_direction(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Fixed pseudo-random numbers in [-2, -1] and [1, 2]: hashes of the indices of an array of this shape.

    They have no symmetry that a map could share, and none is near zero. The hash costs a few integer operations for
    each number, and compiles faster than a draw from a random generator.
    """
    x = lax.iota(np.uint32, math.prod(shape)) + np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = lax.bitcast_convert_type(x ^ (x >> np.uint32(16)), np.int32)
    x = (x.astype(wide_dtype(dtype)) * 2.0**-31).astype(dtype)  # 2^31 exceeds float16
    return jnp.where(x < 0, x - 1, x + 1).reshape(shape)


def mixed_start(v: Array, order: Order, residual_tolerance: Array) -> Array:
    """The unit vector along v plus a small multiple of the fixed direction, of about `residual_tolerance` / 20.

    If v has converged, this hardly changes the status, and it lowers sigma = u^T W v by less than the square of that
    length, relatively: 2e-6 at the default tolerance. Over repeated calls the component grows along every singular
    vector whose singular value exceeds sigma. The number of calls that this takes grows only with the logarithm of the
    length. For v = 0 the result is the fixed direction.
    """
    direction = pseudo_random_direction(v.shape, v.dtype)
    # v is divided by the power of two next to its largest element. This causes no rounding error, and then no square
    # overflows. The divisor is clipped so that its reciprocal, by which XLA multiplies, and half of that are normal.
    half, tiny = 0.5 * jnp.max(jnp.abs(v)), float(jnp.finfo(v.dtype).tiny)
    v = 0.5 * v / lax.reduce_precision(jnp.clip(half, tiny, 0.25 / tiny), jnp.finfo(v.dtype).nexp, 0)
    share = jnp.minimum(residual_tolerance / 20, _LARGEST_SHARE) / (1.5 * v.size ** (1 / order))
    return _unit(v + jnp.where(half > 0, share * _length(v, order), 0.5) * direction, order)


def fixed_start(shape: tuple[int, ...], dtype: np.dtype, order: Order) -> Array:
    """The unit vector along the fixed direction."""
    return _unit(0.5 * pseudo_random_direction(shape, dtype), order)


def _unit(v: Array, order: Order) -> Array:
    """`unit` for a v whose squares neither overflow nor underflow; it compiles faster."""
    return v / _length(v, order)


def _length(v: Array, order: Order) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(v))) if is_order(order, 2) else vector_norm(v, order)


def excludes_larger(sigma: Array, residual: Array, iterations: Array, size: int, best: Array) -> Array:
    """Whether an iteration from `pseudo_random_direction` excludes a norm above (1 + HIDDEN) * best.

    It uses the bound at the head of this module with b = 1 / (16 sqrt(size)), which holds except for rare maps. Given
    b, it is a proof for the norm 2 -> 2. For other orders, where iterations can end in local maxima, it is only a
    stopping rule.

    Args:
      sigma: estimate of this iteration.
      residual: as in `power_iteration`, for the vector before the last iteration.
      iterations: number of iterations, at least one.
      size: number of elements of v.
      best: the best known estimate, at least sigma.
    """
    ratio = jnp.clip((1 + HIDDEN) * best / positive(sigma), 1 + HIDDEN, 100.0)
    growth = jnp.square(ratio)
    part = _OVERLAP / math.sqrt(size) * growth ** (iterations - 1).astype(sigma.dtype)
    return residual < part * (growth - 1)
