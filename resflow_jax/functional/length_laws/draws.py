"""Random lengths from 64 random bits."""

import jax
import jax.numpy as jnp

Array = jax.Array


def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """64 random bits for each length of `shape`, as uint32 words [2, *shape]."""
    return jax.random.bits(key, (2, *shape), jnp.uint32)


def uniform(bits: Array) -> Array:
    """Uniform floats [...] in (0, 1) from words [2, ...], so that events of probability 2^-64 are drawn.

    `jax.random.uniform` has 23 bits in float32: with it, no length of Geometric(0.5) would exceed 24.
    """
    high, low = bits.astype(jnp.result_type(float))
    return _below_one((high + (low + 0.5) * 2.0**-32) * 2.0**-32)


def event_and_uniform(bits: Array, probability: float) -> tuple[Array, Array]:
    """From words [2, ...]: whether an event of this probability occurs, and an independent uniform float in (0, 1).

    The words are the digits of an integer below 2^64. The event is that it is below a threshold. Given the event, and
    given its opposite, the integer is uniform on an interval, from which the float follows.
    """
    threshold = divmod(min(max(round(probability * 2**64), 1), 2**64 - 1), 2**32)
    dtype = jnp.result_type(float)
    (high, low), (t_high, t_low) = bits, map(jnp.uint32, threshold)
    occurs = (high < t_high) | ((high == t_high) & (low < t_low))
    above = (high - t_high).astype(dtype) + (low.astype(dtype) - t_low.astype(dtype)) * 2.0**-32
    offset = jnp.where(occurs, high.astype(dtype) + low.astype(dtype) * 2.0**-32, above)
    size = jnp.where(occurs, jnp.asarray(probability, dtype), jnp.asarray(1 - probability, dtype))
    return occurs, _below_one((offset + 2.0**-33) * 2.0**-32 / size)


def _below_one(u: Array) -> Array:
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


def draw_geometric(u: Array, log_ratio: Array | float) -> Array:
    """Geometric lengths by inversion of uniform u: N >= k where u < ratio^(k - 1), so P(N >= k) = ratio^(k - 1).

    The argument is log(ratio), because float32 rounds a ratio close to one up to one. Lengths are at most 2^30.
    """
    return jnp.clip(jnp.ceil(jnp.log(u) / jnp.asarray(log_ratio, u.dtype)), 1, 2.0**30).astype(jnp.int32)
