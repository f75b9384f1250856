"""Normalisation by running statistics or by given constants, per channel or per feature.

    MovingBatchNorm   y = (x - mean) / sqrt(variance + epsilon) * exp(log_scale) + bias
    MovingCentering   y = x - mean + bias
    Normalization     y = (x - mean) / std

Mean and variance are constants of every application, so the log-det is that of a scaling and
the inverse exact; each costs one pass over its input.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.batch_axes import moments
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import check_open_interval, check_positive
from resflow_jax.layers.bijector import (
    Bijector,
    Constant,
    Shape,
    ends_in,
    no_log_det,
    scaling_bounds,
    scaling_log_det,
)

Array = jax.Array


class MovingBatchNorm(Bijector):
    """y = (x - mean) / sqrt(variance + epsilon) * exp(log_scale) + bias; batch normalisation without a train mode.

    Applying the layer never changes mean and variance (`nnx.BatchStat`): `initialize` sets them to a
    batch's, `update_statistics` moves them towards a batch's at the rate `decay`. No gradient flows
    into them. Until then the layer is the identity, up to epsilon.

    epsilon is in squared units of x, of which the layer so knows one: it suits values around 1, as there are behind an
    ActNorm. Where the dtype does not hold the variance of x, it is infinite, and `ResidualFlow.initialize` refuses x.
    """

    def __init__(self, shape: tuple[int, ...], decay: float = 0.1, epsilon: float = 1e-4):
        """shape: (C,) for one of each a channel of [B, ..., C], an event shape for one a feature."""
        check_open_interval("decay", decay, 0, 1)
        check_positive("epsilon", epsilon)
        self.shape = tuple(shape)
        self.decay = decay
        self.epsilon = epsilon
        self.bias = nnx.Param(jnp.zeros(shape))
        self.log_scale = nnx.Param(jnp.zeros(shape))
        self.mean = nnx.BatchStat(jnp.zeros(shape))
        self.variance = nnx.BatchStat(jnp.ones(shape))

    def _total_log_scale(self) -> Array:
        return self.log_scale[...] - 0.5 * jnp.log(self.variance[...] + self.epsilon)

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, self.shape)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        log_scale = self._total_log_scale()
        y = (x - trailing(self.mean[...], x)) * trailing(jnp.exp(log_scale), x) + trailing(self.bias[...], x)
        return y, scaling_log_det(log_scale, x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        scale = jnp.exp(-self._total_log_scale())
        return (y - trailing(self.bias[...], y)) * trailing(scale, y) + trailing(self.mean[...], y)

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        return self._move(x, 1.0)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        return self._move(x, self.decay)

    def _move(self, x: Array, rate: float) -> Array:
        """Moves at a rate towards the statistics of the whole batch, of which x may be a device's part."""
        batch, axes = jax.lax.stop_gradient(x), tuple(range(x.ndim - self.mean.ndim))
        mean, variance = moments(batch, axes)
        self.mean[...] += rate * (mean - self.mean[...])
        self.variance[...] += rate * (variance - self.variance[...])
        return self(x)

    def lipschitz_bounds(self) -> tuple[float, float]:
        variance = np.asarray(self.variance[...], np.float64)
        return scaling_bounds(np.asarray(self.log_scale[...], np.float64) - 0.5 * np.log(variance + self.epsilon))


class MovingCentering(Bijector):
    """y = x - mean + bias: of `MovingBatchNorm` the centre alone, an isometry, which may stand inside a contraction.

    The moving batch norm of the authors' code.

    Applying the layer never changes the mean (`nnx.BatchStat`), into which no gradient flows: `initialize` sets it
    to a batch's, `update_statistics` moves it towards a batch's at the rate `decay`.
    """

    def __init__(self, shape: tuple[int, ...], decay: float = 0.1):
        """shape: (C,) for one of each a channel of [B, ..., C], an event shape for one a feature."""
        check_open_interval("decay", decay, 0, 1)
        self.shape = tuple(shape)
        self.decay = decay
        self.bias = nnx.Param(jnp.zeros(shape))
        self.mean = nnx.BatchStat(jnp.zeros(shape))

    def shift(self) -> Array:
        """What is added to x."""
        return self.bias[...] - jax.lax.stop_gradient(self.mean[...])

    def move(self, x: Array, rate: float | None = None) -> None:
        """Moves the mean at a rate (`decay`) towards that of the whole batch, of which x may be a device's part."""
        mean, _ = moments(jax.lax.stop_gradient(x), tuple(range(x.ndim - self.mean.ndim)))
        self.mean[...] += (self.decay if rate is None else rate) * (mean - self.mean[...])

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, self.shape)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return x + trailing(self.shift(), x), no_log_det(x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return y - trailing(self.shift(), y)

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        self.move(x, 1.0)
        return self(x)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        self.move(x)
        return self(x)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


class Normalization(Bijector):
    """y = (x - mean) / std by constants of the data, which no training changes."""

    def __init__(self, mean: Any, std: Any):
        """Both of one shape: (C,) for one a channel of [B, ..., C], an event shape for one a feature."""
        mean, std = np.asarray(mean, float), np.asarray(std, float)
        if not np.isfinite(mean).all():
            raise ValueError(f"mean: expected finite numbers, got {mean}")
        if std.shape != mean.shape:
            raise ValueError(f"std: expected the shape {mean.shape} of mean, got {std.shape}")
        if not (np.isfinite(std) & (std > 0)).all():
            raise ValueError(f"std: expected positive finite numbers, got {std}")
        self.mean = Constant(jnp.asarray(mean))
        self.std = Constant(jnp.asarray(std))

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, self.mean.shape)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        y = (x - trailing(self.mean[...], x)) / trailing(self.std[...], x)
        return y, scaling_log_det(-jnp.log(self.std[...]), x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return y * trailing(self.std[...], y) + trailing(self.mean[...], y)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return scaling_bounds(-np.log(np.asarray(self.std[...], np.float64)))
