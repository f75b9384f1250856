"""Heads of classifiers: from the output of a flow to logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.activations import check_single_channels, get_activation, get_plain_activation
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_float_batch, as_shape, check_count, check_type
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Shape
from resflow_jax.layers.initial import fan_in_uniform
from resflow_jax.layers.module import Module

Array = jax.Array


class PooledHead(Module):
    """Logits from features h [B, ..., C]: normalisation, activation, mean over positions, a linear layer.

        logits = W mean_positions(phi(ActNorm(V h))) + b,   V a linear map of the channels, or nothing

    Args:
      shape: shape of one h: (H, W, C), or (C,) without positions.
      classes: K, the number of classes.
      hidden: number of channels that V gives; None for no V.
      activation: phi, a name in `ACTIVATIONS` of one without parameters that acts on each channel on its own.
      rngs: draws W.

    Randomness: `rngs` only. Cost: one pass over h; no g is evaluated.

    Raises:
      ValueError: for sizes below one, fewer than two classes, and an activation that has parameters or mixes channels.

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1; V as in Chen et al. (2019, arXiv 1906.02735), section
    5.4, which has a convolution 3x3 in its place.

    Example:
      >>> head = rf.PooledHead((4, 4, 8), 10, rngs=nnx.Rngs(0))
      >>> head(jnp.ones((3, 4, 4, 8))).shape, head.lipschitz_bounds().shape
      ((3, 10), (10, 10))
    """

    def __init__(
        self, shape: Shape, classes: int, *, hidden: int | None = None, activation: str = "elu", rngs: nnx.Rngs
    ):
        self.shape = as_shape("shape", shape)
        check_count("classes", classes, 2)
        check_type("rngs", rngs, nnx.Rngs)
        if hidden is not None:
            check_count("hidden", hidden, 1)
        get_plain_activation(activation)  # checks it
        check_single_channels(activation)
        self.classes, self.hidden, self.activation = classes, hidden, activation
        self.first = None if hidden is None else nnx.Param(fan_in_uniform(rngs, (self.shape[-1], hidden)))
        channels = self.shape[-1] if hidden is None else hidden
        self.norm = ActNorm((channels,))
        self.kernel = nnx.Param(fan_in_uniform(rngs, (channels, classes)))
        self.bias = nnx.Param(jnp.zeros(classes))

    def __call__(self, h: Array) -> Array:
        """The logits [B, classes] of h [B, *shape]."""
        h = as_float_batch("h", h, self.shape)
        active = get_activation(self.activation)({}, self.norm(self._mixed(h)))
        logits = jnp.mean(active, axis=tuple(range(1, h.ndim - 1))) @ self.kernel[...]
        return logits + trailing(self.bias[...], logits)

    def initialize(self, h: Array) -> None:
        """Sets the normalisation from a batch of features, in place."""
        self.norm.initialize(self._mixed(as_float_batch("h", h, self.shape)))

    def _mixed(self, h: Array) -> Array:
        """V h."""
        return h if self.first is None else h @ self.first[...]

    def lipschitz_bounds(self) -> np.ndarray:
        """Bounds on the Lipschitz constants of logit_a - logit_b in h, in the 2-norm: float64 [K, K], on the host.

        The gradient by V h at one position is diag(scale) (W_a - W_b), times a slope of phi of at most 1 for each
        channel, over the number P of positions. So its norm over all positions is at most |scale (W_a - W_b)| /
        sqrt(P). V multiplies it by at most |V|.
        """
        scale = np.exp(np.asarray(self.norm.log_scale[...], np.float64)) / np.asarray(self.norm.std[...], np.float64)
        rows = (np.asarray(self.kernel[...], np.float64) * scale[:, None]).T
        differences = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
        norm = 1.0 if self.first is None else np.linalg.norm(np.asarray(self.first[...], np.float64), 2)
        slope = get_activation(self.activation).lipschitz
        return differences * norm * slope / math.sqrt(math.prod(self.shape[:-1]))
