"""Normalisation by running statistics or by given constants, per channel or per feature.

    MovingBatchNorm   y = (x - mean) / sqrt(variance + epsilon) * exp(log_scale) + bias
    MovingCentering   y = x - mean + bias
    Normalization     y = (x - mean) / std

Applying a layer does not change mean and variance. So the log-det is that of a scaling and the inverse is exact; each
costs one pass over its input.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.batch_axes import moments
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_shape, check_open_interval, check_positive, shown
from resflow_jax.layers.bijector import (
    Bijector,
    Constant,
    Shape,
    no_log_det,
    scaling_bounds,
    scaling_log_det,
)
from resflow_jax.layers.event_shapes import ends_in

Array = jax.Array


class MovingBatchNorm(Bijector):
    """Batch normalisation by running statistics, without a train mode.

        y = (x - mean) / std * exp(log_scale) + bias,   std = sqrt(variance + epsilon)
        x = (y - bias) * exp(-log_scale) * std + mean
        log_det = (elements of x / elements of log_scale) * sum(log_scale - log std)

    Applying the layer never changes mean and variance (`nnx.BatchStat`). `initialize` sets them to those of a batch,
    `update_statistics` moves them towards those of a batch by the fraction `decay`. No gradient flows into them. Before
    that the layer is the identity, up to epsilon.

    epsilon has the squared unit of x and suits values around 1, as after an ActNorm. If the variance of x overflows the
    dtype, it is infinite, and `Flow.initialize` refuses x.

    Args:
      shape: (C,) for one mean and scale for each channel of x [B, ..., C]; an event shape for one for each feature.
      decay: fraction of the way to a batch's statistics, in (0, 1).
      epsilon: added to the variance, positive.

    Randomness: none. Cost: one pass over x in each direction.

    Raises:
      ValueError: for decay or epsilon outside their ranges; from `output_shape`, for events whose shape does not end in
        `shape`.

    Example:
      >>> layer, x = rf.MovingBatchNorm((3,)), jnp.arange(12.0).reshape(4, 3)
      >>> y = layer.initialize(x)
      >>> np.allclose(np.mean(y, 0), 0, atol=1e-5), np.allclose(np.std(y, 0), 1, atol=1e-3)
      (True, True)
      >>> y, log_det = layer.forward(x)
      >>> log_det.shape, np.allclose(layer.inverse(y), x, atol=1e-4)
      ((4,), True)
    """

    def __init__(self, shape: tuple[int, ...], decay: float = 0.1, epsilon: float = 1e-4):
        check_open_interval("decay", decay, 0, 1)
        check_positive("epsilon", epsilon)
        self.shape = as_shape("shape", shape)
        self.decay = decay
        self.epsilon = epsilon
        self.bias = nnx.Param(jnp.zeros(self.shape))
        self.log_scale = nnx.Param(jnp.zeros(self.shape))
        self.mean = nnx.BatchStat(jnp.zeros(self.shape))
        self.variance = nnx.BatchStat(jnp.ones(self.shape))

    def _total_log_scale(self) -> Array:
        return self.log_scale[...] - 0.5 * jnp.log(jax.lax.stop_gradient(self.variance[...]) + self.epsilon)

    def _center(self, x: Array) -> Array:
        return trailing(jax.lax.stop_gradient(self.mean[...]), x)

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, self.shape)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        log_scale = self._total_log_scale()
        y = (x - self._center(x)) * trailing(jnp.exp(log_scale), x) + trailing(self.bias[...], x)
        return y, scaling_log_det(log_scale, x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        scale = jnp.exp(-self._total_log_scale())
        return (y - trailing(self.bias[...], y)) * trailing(scale, y) + self._center(y)

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        return self._move(x, 1.0)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        return self._move(x, self.decay)

    def _move(self, x: Array, rate: float) -> Array:
        """Moves by a fraction towards the statistics of the whole batch; x may be one device's part of it."""
        batch, axes = jax.lax.stop_gradient(x), tuple(range(x.ndim - self.mean.ndim))
        mean, variance = moments(batch, axes)
        self.mean[...] += rate * (mean - self.mean[...])
        self.variance[...] += rate * (variance - self.variance[...])
        return self(x)

    def lipschitz_bounds(self) -> tuple[float, float]:
        variance = np.asarray(self.variance[...], np.float64)
        return scaling_bounds(np.asarray(self.log_scale[...], np.float64) - 0.5 * np.log(variance + self.epsilon))


class MovingCentering(Bijector):
    """Centering by a running mean: `MovingBatchNorm` without the scale.

        y = x - mean + bias,   x = y + mean - bias,   log_det = 0

    It is an isometry, so it may be used inside a contraction. Applying the layer never changes the mean
    (`nnx.BatchStat`). `initialize` sets it to that of a batch, `update_statistics` moves it towards that of a batch by
    the fraction `decay`. No gradient flows into it.

    Args:
      shape: (C,) for one mean for each channel of x [B, ..., C]; an event shape for one for each feature.
      decay: fraction of the way to a batch's mean, in (0, 1).

    Randomness: none. Cost: one pass over x in each direction.

    Raises:
      ValueError: for decay outside (0, 1); from `output_shape`, for events whose shape does not end in `shape`.

    Source: the moving batch norm in the code of Chen et al. (2019, arXiv 1906.02735).

    Example:
      >>> layer, x = rf.MovingCentering((3,)), jnp.arange(12.0).reshape(4, 3)
      >>> y = layer.initialize(x)
      >>> np.allclose(np.mean(y, 0), 0, atol=1e-5), np.allclose(layer.inverse(y), x, atol=1e-5)
      (True, True)
    """

    def __init__(self, shape: tuple[int, ...], decay: float = 0.1):
        check_open_interval("decay", decay, 0, 1)
        self.shape = as_shape("shape", shape)
        self.decay = decay
        self.bias = nnx.Param(jnp.zeros(self.shape))
        self.mean = nnx.BatchStat(jnp.zeros(self.shape))

    def shift(self) -> Array:
        """The shift bias - mean, of the layer's `shape`, that is added to x."""
        return self.bias[...] - jax.lax.stop_gradient(self.mean[...])

    def move(self, x: Array, rate: float | None = None) -> None:
        """Moves the mean by a fraction (`decay`) towards that of the whole batch; x may be one device's part of it."""
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
    """Normalisation by given constants of the data, which training does not change.

        y = (x - mean) / std,   x = y * std + mean
        log_det = -(elements of x / elements of std) * sum log std

    Args:
      mean: numbers, (C,) for one for each channel of x [B, ..., C], or an event shape for one for each feature.
      std: positive numbers of the same shape.

    Randomness: none. Cost: one pass over x in each direction.

    Raises:
      ValueError: for numbers that are not finite, a std that is not positive, or of another shape, all in JAX's default
        float dtype; from `output_shape`, for events whose shape does not end in that of mean.

    Example:
      >>> layer = rf.Normalization([1.0, 2.0], [0.5, 4.0])
      >>> y, log_det = layer.forward(jnp.array([[2.0, 6.0]]))
      >>> y.tolist(), layer.inverse(y).tolist()
      ([[2.0, 1.0]], [[2.0, 6.0]])
      >>> np.allclose(log_det, -np.log(0.5 * 4.0))
      True
    """

    def __init__(self, mean: Any, std: Any):
        mean, std = (_numbers(*pair) for pair in (("mean", mean), ("std", std)))
        dtype = jnp.finfo(jnp.result_type(float))
        if not (np.abs(mean) <= dtype.max).all():
            raise ValueError(f"mean: expected finite numbers, got {mean}")
        if std.shape != mean.shape:
            raise ValueError(f"std: expected the shape {mean.shape} of mean, got {std.shape}")
        if not ((std <= dtype.max) & (std >= dtype.tiny)).all():  # smaller ones are zero on many devices
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


def _numbers(name: str, values: Any) -> np.ndarray:
    """Numbers as float64; ValueError for anything else."""
    try:
        if np.iscomplexobj(values):
            raise TypeError("complex numbers")
        return np.asarray(values, float)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected an array of numbers, got {shown(values)}") from error
