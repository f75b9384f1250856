"""The logit of values in [0, 1], as of images."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_open_interval
from resflow_jax.functional.values import UNIT_INTERVAL, Domain
from resflow_jax.layers.bijector import Bijector

Array = jax.Array


class Logit(Bijector):
    """y = logit(s), s = alpha + (1 - 2 alpha) x, for x in [0, 1] (Dinh et al. 2017, section 4.1).

    log_det = sum log(1 - 2 alpha) - log s - log(1 - s). alpha > 0 keeps y finite at the ends of [0, 1].

    s is in [0, 1] where x is in [-delta, 1 + delta], delta = alpha / (1 - 2 alpha): the inverse may return all of
    these, the two ends included, for rounding takes s to 0 or 1 and x a little beyond. Such an x counts as the nearest
    one inside that its dtype can tell from the end, so that y and log_det are finite, with derivatives of zero. What is
    farther outside gives NaN.
    """

    def __init__(self, alpha: float):
        check_open_interval("logit_alpha", alpha, 0, 0.5)
        dtype = jnp.result_type(float)
        if alpha < float(jnp.finfo(dtype).tiny):
            raise ValueError(
                f"logit_alpha: expected a number that {dtype} holds, at least {jnp.finfo(dtype).tiny}, got {alpha!r}"
            )
        self.alpha = alpha

    def _parts(self, x: Array) -> tuple[Array, Array]:
        """log s and log(1 - s), each accurate at its own end of the interval."""
        alpha, scale = self.alpha, 1 - 2 * self.alpha
        eps, tiny = (float(number) for number in (jnp.finfo(x.dtype).eps, jnp.finfo(x.dtype).tiny))
        # Two roundings of x near 0 - delta move s by eps * alpha, near 1 + delta by eps: an s below half of that is 0.
        s = _positive(alpha + scale * x, max(eps * alpha / 2, tiny), _SLACK * eps * alpha)
        # The maximum is never the bound. Without it XLA would make (1 + alpha) - x of alpha + (1 - x), and lose alpha.
        rest = alpha + scale * jnp.maximum(1 - x, -2 * (1 + alpha / scale))
        return jnp.log(s), jnp.log(_positive(rest, max(min(eps, alpha) / 2, tiny), _SLACK * eps))

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        log_s, log_rest = self._parts(x)
        log_det = jnp.sum(math.log1p(-2 * self.alpha) - log_s - log_rest, axis=_event_axes(x))
        return log_s - log_rest, log_det

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return (jax.nn.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)

    def invert_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        # From y it is exact also where x is too close to an end of [0, 1] to tell.
        log_det = math.log1p(-2 * self.alpha) + jax.nn.softplus(y) + jax.nn.softplus(-y)
        return self.invert(y), jnp.sum(log_det, axis=_event_axes(y))

    def domain(self, dtype: Any) -> Domain:
        beyond = (
            f", beyond it by more than alpha / (1 - 2 alpha) = {self.alpha / (1 - 2 * self.alpha):.3g} of the logit"
        )
        return Domain(*logit_domain(self.alpha, dtype), UNIT_INTERVAL.text, beyond)

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, 1.0

    def lipschitz_bounds(self) -> tuple[float, float]:
        # The slope (1 - 2 alpha) / (s (1 - s)) is largest at the ends of [0, 1], smallest at s = 1/2.
        slope = 1 - 2 * self.alpha
        return slope / (self.alpha * (1 - self.alpha)), 1 / (4 * slope)


_SLACK = 8  # units of rounding by which x may be beyond the end of a logit's domain


def logit_domain(alpha: float, dtype: Any) -> tuple[float, float]:
    """The ends of what the inverse of `Logit(alpha)` returns in a dtype, rounding included: forward is finite there.

    -delta and 1 + delta, delta = alpha / (1 - 2 alpha), each moved outwards by half of what the forward allows.
    """
    scale, rounding = 1 - 2 * alpha, _SLACK / 2 * float(jnp.finfo(dtype).eps)
    return -alpha / scale * (1 + rounding), 1 + (alpha + rounding) / scale


def _positive(s: Array, least: float, slack: float) -> Array:
    """s, but `least` where it is less; what is below -slack stays as it is, for a logarithm to make NaN of it."""
    return jnp.where((-slack <= s) & (s < least), least, s)


def _event_axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))
