"""Norms ||x||_p = (sum_i |x_i|^p)^(1/p) of vectors, 1 <= p <= inf, and their dual maps.

    J_p(x) = sign(x) (|x| / ||x||_p)^(p-1)

is the vector with p*-norm one and <J_p(x), x> = ||x||_p, where 1/p + 1/p* = 1. An order is a Python number in [1, inf],
or an array, which may be traced and must lie strictly between one and infinity. Elements are divided by the largest
before powers are taken, so no power overflows.
"""

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.checks import check_order

Array = jax.Array
Order = float | Array
Axes = int | tuple[int, ...] | None


def is_order(order: Order, value: float) -> bool:
    """Whether an order is the Python number `value`; False for arrays."""
    return isinstance(order, Real) and order == value


def conjugate(order: Order) -> Order:
    """p* = p / (p - 1), with 1 and infinity conjugate to each other."""
    if is_order(order, 1):
        return math.inf
    return 1.0 if is_order(order, math.inf) else order / (order - 1)


def vector_norm(x: Array, order: Order, axis: Axes = None) -> Array:
    """||x||_order over the given axes; differentiable in x, and in an order that is an array.

    The gradient is zero at a zero element, and at the zero vector.
    """
    check_order("order", order)
    magnitude = x * jnp.sign(x)  # |x|, with derivative 0 at zero; jnp.abs has derivative 1 there
    if is_order(order, 1):
        return jnp.sum(magnitude, axis)
    if is_order(order, math.inf):
        return jnp.max(magnitude, axis)
    # The norm does not depend on the scale. A gradient through it would only add rounding errors.
    scale = lax.stop_gradient(jnp.max(magnitude, axis, keepdims=True))
    ratio = magnitude / positive(scale)
    present = ratio > 0
    total = jnp.sum(jnp.where(present, _power(jnp.where(present, ratio, 1), order), 0), axis)
    some = total > 0
    return scale.reshape(total.shape) * jnp.where(some, _power(jnp.where(some, total, 1), 1 / order), 0)


def dual_map(x: Array, order: Order) -> tuple[Array, Array]:
    """(J_order(x), ||x||_order) over all axes; (0, 0) at zero. Do not differentiate it.

    For orders 1 and infinity J is not unique. The result is a vertex of the dual unit ball: for order 1 a vector of
    signs without zeros, for infinity the sign of the first largest element and zeros. A convex function has its maximum
    over the ball at a vertex, whereas a vector of signs with a zero can be a stationary point below the maximum.
    """
    if is_order(order, 2):
        largest = positive(jnp.max(jnp.abs(x)))
        ratio = x / largest  # so that squares neither overflow nor underflow
        norm = jnp.sqrt(jnp.sum(jnp.square(ratio)))
        return ratio / positive(norm), largest * norm
    norm = vector_norm(x, order)
    if is_order(order, 1):
        return jnp.where(norm > 0, jnp.where(x < 0, -1, 1), 0).astype(x.dtype), norm
    if is_order(order, math.inf):
        largest = jnp.arange(x.size).reshape(x.shape) == jnp.argmax(jnp.abs(x))
        return jnp.where(largest, jnp.sign(x), 0), norm
    return jnp.sign(x) * _power(jnp.abs(x) / positive(norm), order - 1), norm


def positive(x: Array) -> Array:
    """max(x, smallest normal number), for use as a divisor."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _power(x: Array, exponent: Any) -> Array:
    if is_order(exponent, 2):
        return jnp.square(x)
    return jnp.sqrt(x) if is_order(exponent, 0.5) else x ** jnp.asarray(exponent, x.dtype)
