"""Draws of random lengths from 64 random bits."""

import jax
import jax.numpy as jnp

Array = jax.Array

UNKNOWN_LIPSCHITZ = 0.98  # for g of unknown Lipschitz constant: that of a single layer of the default coefficient


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform floats in (0, 1) of 64 random bits: events of probability 2^-64 come up as often as they should.

    With the 23 bits of `jax.random.uniform` in float32 no Geometric(0.5) would be longer than 24.
    """
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32).astype(jnp.result_type(float))
    u = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


def draw_geometric(u: Array, log_ratio: Array | float) -> Array:
    """The N with P(N >= k) = ratio^(k - 1) at uniform numbers u: N >= k where u < ratio^(k - 1).

    From the logarithm, since a ratio near one is rounded to it in float32. Lengths end at 2^30.
    """
    return jnp.clip(jnp.ceil(jnp.log(u) / jnp.asarray(log_ratio, u.dtype)), 1, 2.0**30).astype(jnp.int32)
