"""`ActNorm`: an affine map with one scale and one shift for each channel or feature, initialised from a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.batch_axes import standardization
from resflow_jax.functional.checks import as_float_array, as_shape
from resflow_jax.layers.bijector import Bijector, Constant, Shape, scaling_bounds, scaling_log_det
from resflow_jax.layers.event_shapes import ends_in

Array = jax.Array


class ActNorm(Bijector):
    """Affine map with one scale and one shift for each channel or feature, initialised from a batch.

        y = (x - center) / std * exp(log_scale) + shift
        x = (y - shift) * exp(-log_scale) * std + center
        log_det = (elements of x / elements of log_scale) * sum(log_scale - log std)

    `initialize` sets center and std to the mean and the standard deviation of the whole batch, also where x is one
    device's part of it. Over this batch y then has mean zero and unit variance. Before that the layer is the identity.
    Training changes `log_scale` and `shift` only. Both start from zero and have no unit, so training does not depend on
    the unit of x.

    The std of a constant channel is mere rounding error. The magnitude of the channel's values then takes its place, or
    1 where they are zero.

    Args:
      shape: (C,) for one scale for each channel of x [B, ..., C]; an event shape for one for each feature.

    Randomness: none. Cost: one pass over x in each direction.

    Raises:
      ValueError: from `output_shape`, for events whose shape does not end in `shape`.

    Source: Kingma & Dhariwal (2018, arXiv 1807.03039), section 3.1 and table 1; there the constants are trained too.

    Example:
      >>> layer, x = rf.ActNorm((3,)), jnp.arange(12.0).reshape(4, 3)
      >>> y = layer.initialize(x)
      >>> np.allclose(np.mean(y, 0), 0, atol=1e-5), np.allclose(np.std(y, 0), 1, atol=1e-5)
      (True, True)
      >>> y, log_det = layer.forward(x)
      >>> y.shape, log_det.shape
      ((4, 3), (4,))
      >>> np.allclose(layer.inverse(y), x, atol=1e-5)
      True
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = as_shape("shape", shape)
        self.center = Constant(jnp.zeros(self.shape))
        self.std = Constant(jnp.ones(self.shape))
        self.log_scale = nnx.Param(jnp.zeros(self.shape))
        self.shift = nnx.Param(jnp.zeros(self.shape))

    def _parts(self, x: Array) -> tuple[Array, ...]:
        """Center, std, log_scale and shift, in the wider dtype of x and the parameters."""
        parts = self.center[...], self.std[...], self.log_scale[...], self.shift[...]
        return tuple(part.astype(jnp.result_type(x, part)) for part in parts)

    def _broadcast(self, x: Array, sign: int) -> tuple[Array, ...]:
        """Center, std, exp(sign * log_scale) and shift, broadcast to the axes of x."""
        center, std, log_scale, shift = self._parts(x)
        parts = center, std, jnp.exp(sign * log_scale), shift
        return tuple(jax.lax.broadcast_to_rank(part, x.ndim) for part in parts)

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, self.shape)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        center, std, scale, shift = self._broadcast(x, 1)
        _, divisor, log_scale, _ = self._parts(x)
        return (x - center) / std * scale + shift, scaling_log_det(log_scale - jnp.log(divisor), x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        center, std, scale, shift = self._broadcast(y, -1)
        return (y - shift) * scale * std + center

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        self.center[...], self.std[...] = standardization(x, tuple(range(x.ndim - self.shift.ndim)))
        self.log_scale[...] = jnp.zeros_like(self.log_scale[...])
        self.shift[...] = jnp.zeros_like(self.shift[...])
        return self(x)

    def set_constants(self, center: Array, std: Array) -> None:
        """Replaces center and std, of the layer's `shape`, in place; the parameters change so that f stays the same."""
        center, std = (as_float_array(*pair, self.center[...].shape) for pair in (("center", center), ("std", std)))
        # y is the same: (x - c) a + s = (x - c') a + s + (c' - c) a.
        self.shift[...] += (center - self.center[...]) * (jnp.exp(self.log_scale[...]) / self.std[...])
        self.log_scale[...] += jnp.log(std) - jnp.log(self.std[...])
        self.center[...], self.std[...] = center, std

    def lipschitz_bounds(self) -> tuple[float, float]:
        std = np.asarray(self.std[...], np.float64)
        return scaling_bounds(np.asarray(self.log_scale[...], np.float64) - np.log(std))
