"""`Affine`: a learnable scale and shift of every element, which may depend on a condition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import as_shape
from resflow_jax.layers.bijector import Bijector, scaling_bounds
from resflow_jax.layers.conditioned_params import BOUND, ConditionedParams, bounded

Array = jax.Array


class Affine(Bijector):
    """Learnable scale and shift of every element, which may depend on a condition; it starts as the identity.

        y = x * exp(s) + t,   x = (y - t) * exp(-s),   log_det = sum s

    With a condition c a network of c, which starts at zero, changes both: s(c) = log_scale + 4 tanh(a(c) / 4) and
    t(c) = shift + b(c). The condition changes a scale by a factor of at most exp(4) = 55, which bounds the layer's
    Lipschitz constants for every c. The parameter log_scale itself is not bounded.

    Args:
      event_shape: shape of one x.
      condition_dim: number of elements of c [condition_dim]; None for no condition.
      rngs: draws the network; only needed with a condition.

    Randomness: `rngs` draws the network; maps are deterministic. Cost: one pass over x, and with a condition one
    evaluation of a network with 64 hidden units.

    Raises:
      ValueError: for sizes below one, and for a condition without rngs.

    Example:
      >>> layer = rf.Affine((3,))
      >>> layer.log_scale[...] = jnp.log(jnp.full(3, 2.0))
      >>> y, log_det = layer.forward(jnp.ones((4, 3)))
      >>> y.shape, round(float(log_det[0] / jnp.log(2.0)), 3)
      ((4, 3), 3.0)
      >>> np.allclose(layer.inverse(y), 1)
      True
    """

    def __init__(self, event_shape: tuple[int, ...], *, condition_dim: int | None = None, rngs: nnx.Rngs | None = None):
        self.event_shape = as_shape("event_shape", event_shape)
        self.condition_dim = condition_dim
        self.log_scale = nnx.Param(jnp.zeros(self.event_shape))
        self.shift = nnx.Param(jnp.zeros(self.event_shape))
        self.network = ConditionedParams.make(condition_dim, (self.event_shape, self.event_shape), rngs=rngs)
        self.condition_shape = None if condition_dim is None else (condition_dim,)

    def _parts(self, condition: Array | None) -> tuple[Array, Array]:
        """s and t, [1 or B, *event_shape]."""
        log_scale, shift = self.log_scale[...][None], self.shift[...][None]
        if self.network is None:
            return log_scale, shift
        a, b = self.network(condition)
        return log_scale + bounded(a), shift + b

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        log_scale, shift = self._parts(condition)
        log_det = jnp.sum(log_scale, axis=tuple(range(1, x.ndim)))
        return x * jnp.exp(log_scale) + shift, jnp.broadcast_to(log_det, x.shape[:1])

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        log_scale, shift = self._parts(condition)
        return (y - shift) * jnp.exp(-log_scale)

    def lipschitz_bounds(self) -> tuple[float, float]:
        bounds = scaling_bounds(self.log_scale[...])
        factor = 1.0 if self.network is None else math.exp(BOUND)
        return tuple(float(np.multiply(bound, factor)) for bound in bounds)
