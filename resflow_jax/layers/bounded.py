"""A map from intervals to the reals, one interval for each column: for tables and physical quantities."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_choice
from resflow_jax.functional.values import Domain
from resflow_jax.layers.bijector import Shape
from resflow_jax.layers.bounds import Bounds, as_bounds, as_text
from resflow_jax.layers.elementwise import Elementwise, largest, smallest
from resflow_jax.layers.event_shapes import ends_in
from resflow_jax.layers.logit import Logit, logit_domain
from resflow_jax.layers.positive import safe_exp, safe_log, safe_softplus, softplus_inverse

Array = jax.Array


class Bounded(Elementwise):
    """Maps values between `low` and `high` to the reals; either end may be infinite, and each column has its own.

        both finite    y = Logit(alpha, low, high): x in [low, high], both ends included
        low only       y = log(x - low), or with one_sided="softplus" the inverse of the softplus, for x > low
        high only      y = -log(high - x), or the same with the softplus, for x < high
        neither        y = x

    The inverse is in closed form for each column, and log_det [B] = sum log|dy/dx| in nats.

    Put it first in a chain; an `ActNorm` after it brings its output to mean zero and variance one. The logarithm
    depends on no unit and suits values of many magnitudes; the softplus keeps large values as they are. If the data
    attain an end, such as counts that are zero, give an end a little outside, or make the interval finite.

    The inverse always returns values that the layer takes again. Where rounding would reach or pass the end of a
    one-sided interval, it returns the nearest number inside.

    Args:
      low: lower ends; a number, infinite or not, or an array of the last axes of x, for example (C,) with one for each
        column.
      high: upper ends, of the same kind.
      alpha: alpha of the logit, in (0, 1/2).
      one_sided: "log" or "softplus".

    Randomness: none. Cost: one pass over x in each direction.

    Raises:
      ValueError: for NaN ends, ends that do not broadcast, low >= high, an unknown `one_sided`; the message names the
        place. A flow raises it for values of x outside, and names the column. Traced values outside give NaN.

    Example:
      >>> layer = rf.Bounded([0, -np.inf, 0], [np.inf, np.inf, 100])  # a price, a difference, a percentage
      >>> x = jnp.array([[3.0, -5.0, 50.0]])
      >>> y, log_det = layer.forward(x)
      >>> np.round(np.asarray(y, float), 3).tolist(), log_det.shape
      ([[1.099, -5.0, 0.0]], (1,))
      >>> np.allclose(layer.inverse(y), x, atol=1e-4)
      True
    """

    def __init__(self, low: Any, high: Any, *, alpha: float = 1e-6, one_sided: str = "log"):
        check_choice("one_sided", one_sided, ("log", "softplus"))
        self.low, self.high = as_bounds(low, high)
        self.alpha = alpha
        self.one_sided = one_sided
        is_closed = self._kinds()[0]
        self.logit = Logit(alpha, np.where(is_closed, self.low, 0.0), np.where(is_closed, self.high, 1.0))

    def _kinds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of the columns with both ends finite, with low only, with high only."""
        has_low, has_high = np.isfinite(self.low), np.isfinite(self.high)
        return has_low & has_high, has_low & ~has_high, ~has_low & has_high

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, np.shape(self.low))

    def _one_sided(self, bounds: Bounds) -> tuple[Array, float | Array, float | Array]:
        """The columns with one finite end, that end, and the sign: 1 for a lower end, -1 for an upper one."""
        _, lower, upper = self._kinds()
        end = np.where(lower, bounds.low, np.where(upper, bounds.high, 0.0))
        return _mask(lower | upper, bounds), bounds.constant(end), bounds.constant(np.where(upper, -1.0, 1.0))

    def values(self, x: Array) -> tuple[Array, Array]:
        bounds = Bounds.of(self.low, self.high, x)
        is_closed, lower, upper = self._kinds()
        y, log_slopes = x, jnp.zeros_like(x)
        if is_closed.any():
            mask = _mask(is_closed, bounds)
            found = self.logit.values(jnp.where(mask, x, 0.5))
            y, log_slopes = jnp.where(mask, found[0], y), jnp.where(mask, found[1], log_slopes)
        if (lower | upper).any():
            mask, end, sign = self._one_sided(bounds)
            distance = jnp.where(mask, sign * (x - end), 1)
            if self.one_sided == "log":
                u = safe_log(distance)
                slopes = -u
            else:
                u, log_slope = softplus_inverse(distance)
                slopes = -log_slope
            y, log_slopes = jnp.where(mask, sign * u, y), jnp.where(mask, slopes, log_slopes)
        return y, log_slopes

    def inverse_values(self, y: Array) -> tuple[Array, Array]:
        bounds = Bounds.of(self.low, self.high, y)
        is_closed, lower, upper = self._kinds()
        x, log_slopes = y, jnp.zeros_like(y)
        if is_closed.any():
            mask = _mask(is_closed, bounds)
            found = self.logit.inverse_values(jnp.where(mask, y, 0))
            x, log_slopes = jnp.where(mask, found[0], x), jnp.where(mask, found[1], log_slopes)
        if (lower | upper).any():
            mask, end, sign = self._one_sided(bounds)
            u = jnp.where(mask, sign * y, 0)
            if self.one_sided == "log":
                distance, slopes = safe_exp(u), -u
            else:
                distance, slopes = safe_softplus(u), jax.nn.softplus(-u)
            ends = (bounds.constant(value) for value in self._one_sided_domain(bounds))
            x = jnp.where(mask, jnp.clip(end + sign * distance, *ends), x)
            log_slopes = jnp.where(mask, slopes, log_slopes)
        return x, log_slopes

    def _one_sided_domain(self, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and largest number of a dtype inside every one-sided interval; infinite for other columns."""
        _, lower, upper = self._kinds()
        most, step = largest(bounds.dtype), bounds.dtype.type(smallest(bounds.dtype))
        with np.errstate(over="ignore"):
            low, high = (np.where(np.isfinite(end), end, 0).astype(bounds.dtype) for end in (bounds.low, bounds.high))
            above = np.maximum(np.nextafter(low, np.inf, dtype=low.dtype), low + step).astype(float)
            below = np.minimum(np.nextafter(high, -np.inf, dtype=high.dtype), high - step).astype(float)
        return (
            np.where(lower, above, np.where(upper, -most, -np.inf)),
            np.where(upper, below, np.where(lower, most, np.inf)),
        )

    def domain(self, dtype: Any) -> Domain:
        bounds = Bounds.of(self.low, self.high, dtype)
        is_closed = self._kinds()[0]
        closed = logit_domain(self.alpha, dtype, self.logit.low, self.logit.high)
        ends = zip(closed, self._one_sided_domain(bounds), strict=True)
        return Domain(*(np.where(is_closed, *pair) for pair in ends), as_text(self.low, self.high))

    @property
    def support(self) -> tuple[Any, Any]:
        return self.low, self.high

    def lipschitz_bounds(self) -> tuple[float, float]:
        is_closed, lower, upper = self._kinds()
        bounds = []
        if is_closed.any():
            ends = (np.asarray(end)[is_closed] for end in (self.low, self.high))
            bounds.append(Logit(self.alpha, *ends).lipschitz_bounds())
        if (lower | upper).any():
            bounds.append((math.inf, math.inf if self.one_sided == "log" else 1.0))
        if not (is_closed | lower | upper).all():
            bounds.append((1.0, 1.0))
        return tuple(map(max, zip(*bounds, strict=True)))


def _mask(mask: np.ndarray, bounds: Bounds) -> Array:
    """A mask of columns that broadcasts against the array of the bounds."""
    return jax.lax.broadcast_to_rank(jnp.asarray(mask), bounds.like.ndim)
