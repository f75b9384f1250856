"""`ActNorm`: an affine map with one scale and shift a channel, or a feature, set from a batch of data."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.batch_axes import standardization
from resflow_jax.layers.bijector import Bijector, Constant, Shape, ends_in, scaling_bounds, scaling_log_det

Array = jax.Array


class ActNorm(Bijector):
    """y = (x - center) / std * exp(log_scale) + shift, with one of each a channel or a feature.

    log_det = (elements of x / elements of log_scale) * sum(log_scale - log std): Glow, Kingma & Dhariwal
    (2018, arXiv 1807.03039), table 1, but for what is trained. `initialize` takes center and std from a batch
    (the whole one, where x is a device's share of it), so that y has mean zero and unit variance over it; until then
    the layer is the identity. Training changes `log_scale` and `shift` alone, which start from zero and have no unit:
    in whatever unit x is, training is the same.

    A channel that is constant has a std within the rounding of its values, which tells nothing: the size of
    its values is taken instead, or 1 where they are zero.
    """

    def __init__(self, shape: tuple[int, ...]):
        """shape: (C,) for one of each a channel of [B, ..., C], an event shape for one a feature."""
        self.shape = tuple(shape)
        self.center = Constant(jnp.zeros(shape))
        self.std = Constant(jnp.ones(shape))
        self.log_scale = nnx.Param(jnp.zeros(shape))
        self.shift = nnx.Param(jnp.zeros(shape))

    def _total_log_scale(self) -> Array:
        return self.log_scale[...] - jnp.log(self.std[...])

    def _broadcast(self, ndim: int, sign: int) -> tuple[Array, ...]:
        """Center, std, exp(sign * log_scale) and shift with so many axes."""
        parts = self.center[...], self.std[...], jnp.exp(sign * self.log_scale[...]), self.shift[...]
        return tuple(jax.lax.broadcast_to_rank(part, ndim) for part in parts)

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, self.shape)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        center, std, scale, shift = self._broadcast(x.ndim, 1)
        return (x - center) / std * scale + shift, scaling_log_det(self._total_log_scale(), x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        center, std, scale, shift = self._broadcast(y.ndim, -1)
        return (y - shift) * scale * std + center

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        self.center[...], self.std[...] = standardization(x, tuple(range(x.ndim - self.shift.ndim)))
        self.log_scale[...] = jnp.zeros_like(self.log_scale[...])
        self.shift[...] = jnp.zeros_like(self.shift[...])
        return self(x)

    def set_constants(self, center: Array, std: Array) -> None:
        """Replaces both, in place, and the parameters by those of the same map."""
        # y is the same: (x - c) a + s = (x - c') a + s + (c' - c) a.
        self.shift[...] += (center - self.center[...]) * (jnp.exp(self.log_scale[...]) / self.std[...])
        self.log_scale[...] += jnp.log(std) - jnp.log(self.std[...])
        self.center[...], self.std[...] = center, std

    def lipschitz_bounds(self) -> tuple[float, float]:
        std = np.asarray(self.std[...], np.float64)
        return scaling_bounds(np.asarray(self.log_scale[...], np.float64) - np.log(std))
