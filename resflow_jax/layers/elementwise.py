"""Elementwise and shape-changing bijectors in closed form: logit, ActNorm, squeeze, flatten.

All inverses are exact; the cost of each is one pass over its input.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import check_open_interval
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.manual_axes import standardization
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.bijector import Bijector, Constant, Forward, Inverse, scaling_bounds, scaling_log_det

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

    def __call__(self, x: Array) -> Array:
        log_s, log_rest = self._parts(x)
        return log_s - log_rest

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        log_s, log_rest = self._parts(x)
        log_det = jnp.sum(math.log1p(-2 * self.alpha) - log_s - log_rest, axis=_event_axes(x))
        return log_s - log_rest, log_det, []

    def log_det_at(self, y: Array) -> Array:
        """log_det [B] from y = f(x), exact also where x is too close to an end of [0, 1] to tell."""
        return jnp.sum(math.log1p(-2 * self.alpha) + jax.nn.softplus(y) + jax.nn.softplus(-y), axis=_event_axes(y))

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        x = (jax.nn.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)
        return x, []

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


class ActNorm(Bijector):
    """y = (x - center) / deviation * exp(log_scale) + shift, with one of each a channel or a feature.

    log_det = (elements of x / elements of log_scale) * sum(log_scale - log deviation): Glow, Kingma & Dhariwal
    (2018, arXiv 1807.03039), table 1, but for what is trained. `initialize` takes center and deviation from a batch
    (the whole one, where x is a device's share of it), so that y has mean zero and unit variance over it; until then
    the layer is the identity. Training changes `log_scale` and `shift` alone, which start from zero and have no unit:
    in whatever unit x is, training is the same.

    A channel that is constant has a deviation within the rounding of its values, which tells nothing: the size of
    its values is taken instead, or 1 where they are zero.
    """

    def __init__(self, shape: tuple[int, ...]):
        """shape: (C,) for one of each a channel of [B, ..., C], an event shape for one a feature."""
        self.center = Constant(jnp.zeros(shape))
        self.deviation = Constant(jnp.ones(shape))
        self.log_scale = nnx.Param(jnp.zeros(shape))
        self.shift = nnx.Param(jnp.zeros(shape))

    def _total_log_scale(self) -> Array:
        return self.log_scale[...] - jnp.log(self.deviation[...])

    def _broadcast(self, ndim: int, sign: int) -> tuple[Array, ...]:
        """Center, deviation, exp(sign * log_scale) and shift with so many axes."""
        parts = self.center[...], self.deviation[...], jnp.exp(sign * self.log_scale[...]), self.shift[...]
        return tuple(jax.lax.broadcast_to_rank(part, ndim) for part in parts)

    def __call__(self, x: Array) -> Array:
        center, deviation, scale, shift = self._broadcast(x.ndim, 1)
        return (x - center) / deviation * scale + shift

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        return self(x), scaling_log_det(self._total_log_scale(), x), []

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        center, deviation, scale, shift = self._broadcast(y.ndim, -1)
        x = (y - shift) * scale * deviation + center
        return x, []

    def initialize(self, x: Array) -> Array:
        self.center[...], self.deviation[...] = standardization(x, tuple(range(x.ndim - self.shift.ndim)))
        self.log_scale[...] = jnp.zeros_like(self.log_scale[...])
        self.shift[...] = jnp.zeros_like(self.shift[...])
        return self(x)

    def set_constants(self, center: Array, deviation: Array) -> None:
        """Replaces both, in place, and the parameters by those of the same map."""
        # y is the same: (x - c) a + s = (x - c') a + s + (c' - c) a.
        self.shift[...] += (center - self.center[...]) * (jnp.exp(self.log_scale[...]) / self.deviation[...])
        self.log_scale[...] += jnp.log(deviation) - jnp.log(self.deviation[...])
        self.center[...], self.deviation[...] = center, deviation

    def lipschitz_bounds(self) -> tuple[float, float]:
        deviation = np.asarray(self.deviation[...], np.float64)
        return scaling_bounds(np.asarray(self.log_scale[...], np.float64) - np.log(deviation))


class Squeeze(Bijector):
    """[B, H, W, C] -> [B, H/2, W/2, 4C]: 2x2 space to depth, output channel = c * 4 + dy * 2 + dx."""

    def __init__(self, shape: tuple[int, int, int]):
        height, width, _ = shape
        if height % 2 or width % 2:
            raise ValueError(f"shape: expected even height and width to squeeze 2x2, got {shape}")
        self.shape = shape

    def __call__(self, x: Array) -> Array:
        height, width, channels = self.shape
        x = x.reshape(x.shape[0], height // 2, 2, width // 2, 2, channels)
        return x.transpose(0, 1, 3, 5, 2, 4).reshape(x.shape[0], height // 2, width // 2, 4 * channels)

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        return self(x), jnp.zeros(x.shape[0], x.dtype), []

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        height, width, channels = self.shape
        y = y.reshape(y.shape[0], height // 2, width // 2, channels, 2, 2)
        x = y.transpose(0, 1, 4, 2, 5, 3).reshape(y.shape[0], height, width, channels)
        return x, []

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


class Flatten(Bijector):
    """[B, *shape] -> [B, D], in row-major order: H, W, C for images."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], math.prod(self.shape))

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        return self(x), jnp.zeros(x.shape[0], x.dtype), []

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        x = y.reshape(y.shape[0], *self.shape)
        return x, []

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


class Unflatten(Bijector):
    """[B, D] -> [B, *shape]: the inverse of `Flatten`."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], *self.shape)

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        return self(x), jnp.zeros(x.shape[0], x.dtype), []

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        x = y.reshape(y.shape[0], math.prod(self.shape))
        return x, []

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


def _event_axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))
