"""Heads of classifiers: from the output of a flow to logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_shape, check_count
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Shape
from resflow_jax.layers.module import Module

Array = jax.Array


class PooledHead(Module):
    """Logits from features h [B, ..., C]: normalisation, activation, mean over positions, a linear layer.

        logits = W mean_positions(phi(ActNorm(h))) + b

    Args:
      shape: of one h: (H, W, C), or (C,) without positions.
      classes: K, the number of classes.
      activation: phi, a name in `ACTIVATIONS` of one without parameters.
      rngs: draws W.

    Randomness: `rngs` only. Cost: one pass over h; no g is evaluated.

    Raises:
      ValueError: for sizes below one, fewer than two classes, and an activation with parameters.

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1.

    Example:
      >>> head = rf.PooledHead((4, 4, 8), 10, rngs=nnx.Rngs(0))
      >>> head(jnp.ones((3, 4, 4, 8))).shape, head.lipschitz_bounds().shape
      ((3, 10), (10, 10))
    """

    def __init__(self, shape: Shape, classes: int, *, activation: str = "elu", rngs: nnx.Rngs):
        self.shape = as_shape("shape", shape)
        check_count("classes", classes, 2)
        found = get_activation(activation)
        if found.expansion != 1 or found.initial or found.group != 1:
            raise ValueError(f"activation: expected one without parameters that keeps the channels, got {activation!r}")
        self.classes, self.activation = classes, activation
        channels = self.shape[-1]
        self.norm = ActNorm((channels,))
        bound = channels**-0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (channels, classes), minval=-bound, maxval=bound))
        self.bias = nnx.Param(jnp.zeros(classes))

    def __call__(self, h: Array) -> Array:
        """The logits [B, classes] of h [B, *shape]."""
        active = get_activation(self.activation)({}, self.norm(h))
        logits = jnp.mean(active, axis=tuple(range(1, h.ndim - 1))) @ self.kernel[...]
        return logits + trailing(self.bias[...], logits)

    def initialize(self, h: Array) -> None:
        """Sets the normalisation from a batch of features, in place."""
        self.norm.initialize(h)

    def lipschitz_bounds(self) -> np.ndarray:
        """Bounds on the Lipschitz constants of logit_a - logit_b in h, in the 2-norm: float64 [K, K], on the host.

        The gradient by h at one position is diag(scale) (W_a - W_b) times slopes of phi of at most 1 over the number P
        of positions, so its norm over all positions is at most |scale (W_a - W_b)| / sqrt(P).
        """
        scale = np.exp(np.asarray(self.norm.log_scale[...], np.float64)) / np.asarray(self.norm.std[...], np.float64)
        rows = (np.asarray(self.kernel[...], np.float64) * scale[:, None]).T
        differences = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
        return differences * get_activation(self.activation).lipschitz / math.sqrt(math.prod(self.shape[:-1]))
