"""A normal distribution with a learnable mean and standard deviation of every element, optionally with a condition.

    z = mean(c) + exp(log_std(c)) * e,   e ~ N(0, I)
    log p(z | c) = sum log N((z - mean) exp(-log_std); 0, 1) - log_std

The cost is one pass over z, and with a condition one evaluation of a small network.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import as_shape, check_batch
from resflow_jax.layers.conditioned_params import ConditionedParams, bounded
from resflow_jax.models.bases.base import Base, Shape, check_draw, standard_normal_log_prob

Array = jax.Array


class DiagonalNormal(Base):
    """Normal with a learnable mean and standard deviation of every element; it starts as N(0, I).

        log p(z | c) = sum log N((z - mean) exp(-log_std); 0, 1) - log_std,   [B] in nats

    With a condition c a network of c, which starts at zero, changes both (see `layers.conditioned_params`):
    mean(c) = mean + a(c) and log_std(c) = log_std + 4 tanh(b(c) / 4). The condition changes a standard deviation by a
    factor of at most exp(4) = 55. The parameter log_std itself is not bounded.

    Args:
      event_shape: shape of one z.
      condition_dim: number of elements of c [condition_dim]; None for no condition.
      rngs: draws the network; only needed with a condition.

    Randomness: `sample` draws with its key. Cost: one pass over z, and with a condition one evaluation of a network
    with 64 hidden units.

    Raises:
      ValueError: for sizes below one, and for a condition without rngs.

    Example:
      >>> base = rf.DiagonalNormal((2,), condition_dim=1, rngs=nnx.Rngs(0))
      >>> base.log_prob(jnp.zeros((3, 2)), jnp.ones((3, 1))).shape
      (3,)
    """

    def __init__(self, event_shape: Shape, *, condition_dim: int | None = None, rngs: nnx.Rngs | None = None):
        self.event_shape = as_shape("event_shape", event_shape)
        self.condition_dim = condition_dim
        self.mean = nnx.Param(jnp.zeros(self.event_shape))
        self.log_std = nnx.Param(jnp.zeros(self.event_shape))
        self.network = ConditionedParams.make(condition_dim, (self.event_shape, self.event_shape), rngs=rngs)
        self.condition_shape = None if condition_dim is None else (condition_dim,)

    def _moments(self, condition: Array | None) -> tuple[Array, Array]:
        """Mean and log of the standard deviation, [1 or B, *event_shape]."""
        mean, log_std = self.mean[...][None], self.log_std[...][None]
        if self.network is None:
            return mean, log_std
        a, b = self.network(condition)
        return mean + a, log_std + bounded(b)

    def log_prob(self, z: Array, condition: Array | None = None) -> Array:
        check_batch("z", z, self.event_shape)
        mean, log_std = self._moments(condition)
        log_stds = jnp.sum(log_std, axis=tuple(range(1, log_std.ndim)))
        return standard_normal_log_prob((z - mean) * jnp.exp(-log_std)) - log_stds

    def sample(
        self, key: Array, num_samples: int, condition: Array | None = None, temperature: float | Array = 1.0
    ) -> Array:
        check_draw(key, num_samples, temperature)
        mean, log_std = self._moments(condition)
        noise = jax.random.normal(key, (num_samples, *self.event_shape), mean.dtype)
        return mean + temperature * jnp.exp(log_std) * noise
