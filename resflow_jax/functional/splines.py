"""Monotone rational-quadratic splines: an increasing map of each element, with a closed-form inverse.

On the bin k between the knots (x_k, y_k) and (x_k+1, y_k+1), with slopes d_k and d_k+1 at its ends, and with
t = (x - x_k) / w, w = x_k+1 - x_k, h = y_k+1 - y_k, m = h / w:

    y = y_k + h (m t^2 + d_k t (1 - t)) / (m + (d_k + d_k+1 - 2 m) t (1 - t))
    dy/dx = m^2 (d_k+1 t^2 + 2 m t (1 - t) + d_k (1 - t)^2) / (m + (d_k + d_k+1 - 2 m) t (1 - t))^2

The knots cover [-bound, bound] in x and in y. Outside the map is the identity, with slope 1 at the ends. The inverse
is the root of a t^2 + b t + c = 0 in the form 2 c / (-b - sqrt(b^2 - 4 a c)), which has no cancellation.

Durkan et al. (2019, arXiv 1906.04032), section 3.1 and appendix A.1 to A.3.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_count

Array = jax.Array

LEAST = 1e-3  # least width and height of a bin, as fractions of the whole, and least slope
MOST_BINS = round(0.5 / LEAST)


def check_bins(bins: Any) -> None:
    """Expects at least 2 bins, and so few that the least widths leave half of the square to be learned."""
    check_count("bins", bins, 2)
    if bins > MOST_BINS:
        raise ValueError(f"bins: expected at most {MOST_BINS}, got {bins}")


class Knots(NamedTuple):
    """The knots of a spline for each element: x, y and slopes [..., bins + 1, C]."""

    x: Array
    y: Array
    slopes: Array


def knots(theta: Array, bins: int, bound: float) -> Knots:
    """The knots for any theta [..., 3 * bins - 1, C]: those of the identity where theta is zero."""
    widths, heights, slopes = jnp.split(theta, (bins, 2 * bins), axis=-2)
    # softplus(slope + offset) + LEAST is 1 for a slope of zero
    offset = math.log(math.expm1(1 - LEAST))
    inner = LEAST + jax.nn.softplus(slopes + offset)
    ends = jnp.ones((*theta.shape[:-2], 1, theta.shape[-1]), theta.dtype)
    return Knots(_positions(widths, bound), _positions(heights, bound), jnp.concatenate([ends, inner, ends], axis=-2))


def _positions(sizes: Array, bound: float) -> Array:
    """Knots from -bound to bound, both exactly, from unnormalised sizes [..., bins, C]."""
    bins = sizes.shape[-2]
    parts = LEAST + (1 - LEAST * bins) * jax.nn.softmax(sizes, axis=-2)
    inner = bound * (2 * jnp.cumsum(parts, axis=-2)[..., :-1, :] - 1)
    end = jnp.full((*sizes.shape[:-2], 1, sizes.shape[-1]), bound, sizes.dtype)
    return jnp.concatenate([-end, inner, end], axis=-2)


class _Bin(NamedTuple):
    """The quantities of the bin of every element, in the shape of x."""

    left: Array
    width: Array
    bottom: Array
    height: Array
    slope: Array  # d_k
    next_slope: Array
    mean_slope: Array  # m


def _bin_of(value: Array, edges: Array, at: Knots) -> _Bin:
    """The bin whose edges [..., bins + 1, C] enclose each value [..., C]; values [N, C] may share [bins + 1, C]."""
    chosen = _choice(value, edges)
    width, height = chosen(jnp.diff(at.x, axis=-2)), chosen(jnp.diff(at.y, axis=-2))
    left, bottom = chosen(at.x[..., :-1, :]), chosen(at.y[..., :-1, :])
    slopes = chosen(at.slopes[..., :-1, :]), chosen(at.slopes[..., 1:, :])
    return _Bin(left, width, bottom, height, *slopes, height / width)


def _choice(value: Array, edges: Array) -> Callable[[Array], Array]:
    """What picks the element of each value's bin from arrays [..., bins, C]; indexing is faster, for shared ones."""
    are_shared = edges.ndim == value.ndim == 2
    inner = edges[None, 1:-1] if are_shared else edges[..., 1:-1, :]
    number = jnp.sum(value[..., None, :] >= inner, axis=-2, dtype=jnp.int32)
    if are_shared:
        return lambda array: jnp.take_along_axis(array, number, axis=0, mode="clip")
    bins = edges.shape[-2] - 1
    is_chosen = jnp.arange(bins, dtype=jnp.int32).reshape(*[1] * (value.ndim - 1), bins, 1) == number[..., None, :]
    return lambda array: jnp.sum(jnp.where(is_chosen, array, jnp.zeros((), array.dtype)), axis=-2)


def slope_bounds(at: Knots) -> tuple[float, float]:
    """Bounds on dy/dx of all elements, (least, greatest), also outside of the knots; they need not be tight.

    On a bin the numerator over m^2 is a mean of d_k, m and d_k+1, and the denominator lies between m and
    (2 m + d_k + d_k+1) / 4, its value in the middle.
    """
    x, y, slopes = (np.asarray(part, np.float64) for part in at)
    m, ends = np.diff(y, axis=-2) / np.diff(x, axis=-2), (slopes[..., :-1, :], slopes[..., 1:, :])
    middle = (2 * m + sum(ends)) / 4
    least = np.minimum(m, np.minimum(*ends)) * (m / np.maximum(m, middle)) ** 2
    greatest = np.maximum(m, np.maximum(*ends)) * (m / np.minimum(m, middle)) ** 2
    return float(np.minimum(1.0, least.min())), float(np.maximum(1.0, greatest.max()))


def spline(x: Array, at: Knots, bound: float) -> tuple[Array, Array]:
    """y and log dy/dx of every element of x [..., C]; knots [bins + 1, C] are shared by all x [N, C]."""
    is_inside = jnp.abs(x) <= bound
    found = _bin_of(jnp.where(is_inside, x, 0), at.x, at)
    t = (jnp.where(is_inside, x, 0) - found.left) / found.width
    fraction = (found.mean_slope * t**2 + found.slope * t * (1 - t)) / _denominator(found, t)
    y = found.bottom + found.height * fraction
    return jnp.where(is_inside, y, x), jnp.where(is_inside, _log_slope(found, t), 0)


def inverse_spline(y: Array, at: Knots, bound: float) -> tuple[Array, Array]:
    """x and log dy/dx of every element of y [..., C], as `spline`."""
    is_inside = jnp.abs(y) <= bound
    found = _bin_of(jnp.where(is_inside, y, 0), at.y, at)
    share = (jnp.where(is_inside, y, 0) - found.bottom) / found.height  # a, b and c have no unit
    bend = found.slope + found.next_slope - 2 * found.mean_slope
    a = found.mean_slope - found.slope + share * bend
    b = found.slope - share * bend
    c = -found.mean_slope * share
    t = 2 * c / (-b - jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0)))
    x = found.left + t * found.width
    return jnp.where(is_inside, x, y), jnp.where(is_inside, _log_slope(found, t), 0)


def _denominator(found: _Bin, t: Array) -> Array:
    return found.mean_slope + (found.slope + found.next_slope - 2 * found.mean_slope) * t * (1 - t)


def _log_slope(found: _Bin, t: Array) -> Array:
    top = found.next_slope * t**2 + 2 * found.mean_slope * t * (1 - t) + found.slope * (1 - t) ** 2
    return 2 * jnp.log(found.mean_slope) + jnp.log(top) - 2 * jnp.log(_denominator(found, t))
