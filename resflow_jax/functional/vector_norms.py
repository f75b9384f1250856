"""Norms ||x||_p = (sum_i |x_i|^p)^(1/p) of vectors, 1 <= p <= inf, and their dual maps.

    J_p(x) = sign(x) (|x| / ||x||_p)^(p-1)

is the vector of p*-norm one with <J_p(x), x> = ||x||_p, where 1/p + 1/p* = 1. An order is a Python
number, or an array that may be traced and lies strictly between one and infinity. Elements are
divided by the largest before powers are taken, so that no scale overflows.
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
    """Whether an order is known to be `value`; never so for an array."""
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
    magnitude = x * jnp.sign(x)  # whose derivative at zero is zero; that of abs is one
    if is_order(order, 1):
        return jnp.sum(magnitude, axis)
    if is_order(order, math.inf):
        return jnp.max(magnitude, axis)
    # The norm does not depend on the scale, whose gradient would only add rounding errors.
    scale = lax.stop_gradient(jnp.max(magnitude, axis, keepdims=True))
    ratio = magnitude / positive(scale)
    present = ratio > 0
    total = jnp.sum(jnp.where(present, _power(jnp.where(present, ratio, 1), order), 0), axis)
    some = total > 0
    return scale.reshape(total.shape) * jnp.where(some, _power(jnp.where(some, total, 1), 1 / order), 0)


def dual_map(x: Array, order: Order) -> tuple[Array, Array]:
    """(J_order(x), ||x||_order) over all axes; (0, 0) at zero. Not meant to be differentiated.

    At orders 1 and infinity J is not unique; the one returned is a vertex of its unit ball: signs with no
    zero among them, or the sign of the first largest element alone. Vertices are where a convex
    function has its maximum, while a zero can be a stationary point.
    """
    if is_order(order, 2):
        largest = positive(jnp.max(jnp.abs(x)))
        ratio = x / largest  # whose square neither overflows nor vanishes
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
    """x, but at least the smallest normal number: a divisor."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _power(x: Array, exponent: Any) -> Array:
    if is_order(exponent, 2):
        return jnp.square(x)
    return jnp.sqrt(x) if is_order(exponent, 0.5) else x ** jnp.asarray(exponent, x.dtype)
