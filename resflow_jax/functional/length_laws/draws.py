"""Draws of random lengths from 64 random bits."""

import jax
import jax.numpy as jnp

Array = jax.Array

# The assumed Lipschitz constant of a g without a known one: that of one layer with the default coefficient.
UNKNOWN_LIPSCHITZ = 0.98


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform floats in (0, 1) from 64 random bits, so that events of probability 2^-64 occur as often as they should.

    `jax.random.uniform` has 23 bits in float32: with it, no length of Geometric(0.5) would exceed 24.
    """
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32).astype(jnp.result_type(float))
    u = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


def draw_geometric(u: Array, log_ratio: Array | float) -> Array:
    """Geometric lengths by inversion of uniform u: N >= k where u < ratio^(k - 1), so P(N >= k) = ratio^(k - 1).

    The argument is log(ratio), because float32 rounds a ratio close to one up to one. Lengths are at most 2^30.
    """
    return jnp.clip(jnp.ceil(jnp.log(u) / jnp.asarray(log_ratio, u.dtype)), 1, 2.0**30).astype(jnp.int32)
