"""The logit of values in an interval: [0, 1], as for images, or one given for each column of a table."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_open_interval
from resflow_jax.functional.values import UNIT_INTERVAL, Domain
from resflow_jax.layers.bijector import Shape
from resflow_jax.layers.bounds import Bounds, as_bounds, as_text
from resflow_jax.layers.elementwise import Elementwise
from resflow_jax.layers.event_shapes import ends_in

Array = jax.Array


class Logit(Elementwise):
    """Logit of values in an interval, applied to each element.

        u = (x - low) / (high - low),   s = alpha + (1 - 2 alpha) u,   y = logit(s)
        x = low + (high - low) (sigmoid(y) - alpha) / (1 - 2 alpha)
        log_det = sum log(1 - 2 alpha) - log s - log(1 - s) - log(high - low)

    alpha > 0 keeps y finite at the ends of the interval.

    s is in [0, 1] for u in [-delta, 1 + delta], delta = alpha / (1 - 2 alpha). The inverse may return any of these
    values. Rounding may take s to 0 or 1, and x slightly outside. Such an x counts as the nearest value inside that the
    dtype distinguishes from the end, so that y and log_det are finite, with derivatives of zero.

    Args:
      alpha: a number in (0, 1/2), at least the smallest normal number of the dtype.
      low: lower end, finite; a number, or an array of the last axes of x, for example (C,) with one for each column.
      high: upper end, of the same kind.

    Randomness: none. Cost: one pass over x in each direction.

    Raises:
      ValueError: for alpha outside its range, ends that are not finite, low >= high. A flow raises it for values of x
        farther outside than delta. Traced values there give NaN.

    Source: Dinh et al. (2017, arXiv 1605.08803), section 4.1.

    Example:
      >>> layer = rf.Logit(1e-6)
      >>> y, log_det = layer.forward(jnp.array([[0.0, 0.5, 1.0]]))
      >>> bool(jnp.isfinite(y).all()), float(y[0, 1]), log_det.shape
      (True, 0.0, (1,))
      >>> np.allclose(layer.inverse(y), jnp.array([0.0, 0.5, 1.0]), atol=1e-6)
      True
    """

    def __init__(self, alpha: float, low: Any = 0.0, high: Any = 1.0):
        check_open_interval("alpha", alpha, 0, 0.5)
        dtype = jnp.result_type(float)
        if alpha < float(jnp.finfo(dtype).tiny):
            raise ValueError(
                f"alpha: expected a number that {dtype} holds, at least {jnp.finfo(dtype).tiny}, got {alpha!r}"
            )
        self.alpha = alpha
        self.low, self.high = as_bounds(low, high)
        for name, ends in (("low", self.low), ("high", self.high)):
            if not np.isfinite(ends).all():
                raise ValueError(f"{name}: expected finite numbers, got {ends}; rf.Bounded takes infinite ones")

    @property
    def _is_unit(self) -> bool:
        return (self.low, self.high) == (0.0, 1.0)

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, np.shape(self.low))

    def _log_scale(self, bounds: Bounds) -> Any:
        """log of (1 - 2 alpha) / (high - low)."""
        log_scale = math.log1p(-2 * self.alpha)
        return log_scale if self._is_unit else bounds.constant(log_scale - np.log(bounds.width))

    def _parts(self, x: Array, bounds: Bounds) -> tuple[Array, Array]:
        """log s and log(1 - s), each accurate near its own end of the interval."""
        alpha, scale = self.alpha, 1 - 2 * self.alpha
        least_low, least_high = (bounds.constant(value) for value in _least(alpha, bounds))
        slack_low, slack_high = (bounds.constant(_SLACK * value) for value in _rounding(alpha, bounds))
        if self._is_unit:
            from_low, from_high = x, 1 - x
        else:
            low, high, width = (bounds.constant(value) for value in (bounds.low, bounds.high, bounds.width))
            from_low, from_high = (x - low) / width, (high - x) / width
        s = _positive(alpha + scale * from_low, least_low, slack_low)
        # The bound of the maximum is never attained. It stops XLA from rewriting alpha + (1 - x) as (1 + alpha) - x,
        # which loses alpha.
        rest = alpha + scale * jnp.maximum(from_high, -2 * (1 + alpha / scale))
        return jnp.log(s), jnp.log(_positive(rest, least_high, slack_high))

    def values(self, x: Array) -> tuple[Array, Array]:
        bounds = Bounds.of(self.low, self.high, x)
        log_s, log_rest = self._parts(x, bounds)
        return log_s - log_rest, self._log_scale(bounds) - log_s - log_rest

    def inverse_values(self, y: Array) -> tuple[Array, Array]:
        # Computed from y, the slope is exact even if x rounds to an end of the interval.
        bounds = Bounds.of(self.low, self.high, y)
        log_slopes = self._log_scale(bounds) + jax.nn.softplus(y) + jax.nn.softplus(-y)
        if self._is_unit:
            return self._share(y), log_slopes
        low, high, width = (bounds.constant(value) for value in (bounds.low, bounds.high, bounds.width))
        # Each half is computed from its nearer end, which keeps the relative accuracy near an end at zero.
        return jnp.where(y < 0, low + width * self._share(y), high - width * self._share(-y)), log_slopes

    def _share(self, y: Array) -> Array:
        """u, the relative position of x in the interval."""
        return (jax.nn.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)

    def domain(self, dtype: Any) -> Domain:
        delta = self.alpha / (1 - 2 * self.alpha)
        beyond = f", beyond it by more than alpha / (1 - 2 alpha) = {delta:.3g} of the logit"
        if self._is_unit:
            return Domain(*logit_domain(self.alpha, dtype), UNIT_INTERVAL.text, beyond)
        beyond = beyond.replace(" of the logit", " of its length, of the logit")
        return Domain(*logit_domain(self.alpha, dtype, self.low, self.high), as_text(self.low, self.high), beyond)

    @property
    def support(self) -> tuple[Any, Any]:
        return self.low, self.high

    def lipschitz_bounds(self) -> tuple[float, float]:
        # The slope (1 - 2 alpha) / (s (1 - s)) is largest at the ends of [0, 1], smallest at s = 1/2.
        slope = 1 - 2 * self.alpha
        forward, inverse = slope / (self.alpha * (1 - self.alpha)), 1 / (4 * slope)
        if self._is_unit:
            return forward, inverse
        width = np.asarray(self.high, float) - np.asarray(self.low, float)
        return float(forward / width.min()), float(inverse * width.max())


_SLACK = 8  # units of rounding by which x may lie outside the domain of a logit


def logit_domain(alpha: float, dtype: Any, low: Any = 0.0, high: Any = 1.0) -> tuple[Any, Any]:
    """The ends of the values that the inverse of `Logit(alpha, low, high)` returns in a dtype, with rounding.

    low - delta and high + delta, delta = alpha / (1 - 2 alpha) times the length of the interval, each moved outwards by
    half of the slack that the forward map allows. f is finite between them.
    """
    bounds = Bounds.of(low, high, dtype)
    beyond = (bounds.width * (alpha + _SLACK / 2 * value) / (1 - 2 * alpha) for value in _rounding(alpha, bounds))
    return tuple(end + sign * part for end, sign, part in zip((bounds.low, bounds.high), (-1, 1), beyond, strict=True))


def _rounding(alpha: float, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """The change of s by a rounding of x near either end: for [0, 1] eps * alpha near 0 - delta, eps near 1 + delta."""
    eps = float(jnp.finfo(bounds.dtype).eps)
    return tuple(eps * np.maximum(alpha, np.abs(end) / bounds.width) for end in (bounds.low, bounds.high))


def _least(alpha: float, bounds: Bounds) -> list[np.ndarray]:
    """The least s, and the least 1 - s: anything below half of a rounding counts as this number."""
    tiny = float(jnp.finfo(bounds.dtype).tiny)
    return [np.maximum(np.minimum(rounding, alpha) / 2, tiny) for rounding in _rounding(alpha, bounds)]


def _positive(s: Array, least: float | Array, slack: float | Array) -> Array:
    """s, raised to `least`. Values below -slack stay negative, so that their logarithm is NaN."""
    return jnp.where((-slack <= s) & (s < least), least, s)
