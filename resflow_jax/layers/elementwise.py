"""Elementwise and shape-changing bijectors in closed form: logit, ActNorm, squeeze, flatten.

All inverses are exact; the cost of each is one pass over its input.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import check_open_interval
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.manual_axes import moments
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.bijector import Bijector, Forward, Inverse, scaling_bounds, scaling_log_det

Array = jax.Array


class Logit(Bijector):
    """y = logit(s), s = alpha + (1 - 2 alpha) x, for x in [0, 1] (Dinh et al. 2017, section 4.1).

    log_det = sum log(1 - 2 alpha) - log s - log(1 - s). alpha > 0 keeps y finite at the ends.
    """

    def __init__(self, alpha: float):
        check_open_interval("logit_alpha", alpha, 0, 0.5)
        self.alpha = alpha

    def _parts(self, x: Array) -> tuple[Array, Array]:
        """log s and log(1 - s), each accurate at its own end of the interval."""
        scale = 1 - 2 * self.alpha
        return jnp.log(self.alpha + scale * x), jnp.log(self.alpha + scale * (1 - x))

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


class ActNorm(Bijector):
    """y = (x + bias) * exp(log_scale) with one bias and scale a channel or a feature.

    log_det = (elements of x / elements of log_scale) * sum(log_scale): Glow, Kingma & Dhariwal
    (2018, arXiv 1807.03039), table 1. `initialize` sets both so that y has mean zero and unit
    variance over a batch (the whole one, where x is a device's share of it); until then the layer is the identity.
    """

    def __init__(self, shape: tuple[int, ...]):
        """shape: (C,) for one parameter a channel of [B, ..., C], an event shape for one a feature."""
        self.bias = nnx.Param(jnp.zeros(shape))
        self.log_scale = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Array) -> Array:
        return (x + trailing(self.bias[...], x)) * trailing(jnp.exp(self.log_scale[...]), x)

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        return self(x), scaling_log_det(self.log_scale[...], x), []

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        x = y * trailing(jnp.exp(-self.log_scale[...]), y) - trailing(self.bias[...], y)
        return x, []

    def initialize(self, x: Array) -> Array:
        axes = tuple(range(x.ndim - self.bias.ndim))
        mean, variance = moments(x, axes)
        self.bias[...] = -mean
        self.log_scale[...] = -0.5 * jnp.log(jnp.maximum(variance, 1e-6))  # a constant channel is left finite
        return self(x)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return scaling_bounds(self.log_scale[...])


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
