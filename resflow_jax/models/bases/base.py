"""The interface of a base distribution, and the one without parameters."""

import math

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import as_shape, check_batch, check_count, check_key, check_scalar
from resflow_jax.layers.conditions import ConditionShape
from resflow_jax.layers.module import Module

Array = jax.Array
Shape = tuple[int, ...]


class Base(Module):
    """Interface of a base distribution of events z [*event_shape].

    To write one, set `event_shape`, and `condition_shape` if it takes a condition, and define `log_prob` and `sample`.
    The author guarantees that `sample` draws from the density of `log_prob`. Parameters in `nnx.Param` are trained with
    the flow.

    Attributes:
      event_shape: shape of one z.
      condition_shape: shape of one condition; None for no condition, `...` for any.

    Randomness: `sample` only, from its key. Cost: a flow calls each method once; no contraction is evaluated.

    Example:
      >>> class Logistic(rf.Base):
      ...     event_shape = (2,)
      ...
      ...     def log_prob(self, z, condition=None):
      ...         return jnp.sum(-jax.nn.softplus(z) - jax.nn.softplus(-z), axis=1)
      ...
      ...     def sample(self, key, num_samples, condition=None, temperature=1.0):
      ...         return temperature * jax.random.logistic(key, (num_samples, 2))
      >>> flow = rf.Flow(rf.ActNorm((2,)), Logistic())
      >>> flow.sample(jax.random.key(0), 3).shape, flow.log_prob(jnp.zeros((3, 2))).shape
      ((3, 2), (3,))
    """

    event_shape: Shape
    condition_shape: ConditionShape = None

    def log_prob(self, z: Array, condition: Array | None = None) -> Array:
        """log p(z | c) [B] in nats of z [B, *event_shape], with a condition [B, *condition_shape]."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method log_prob(z, condition)")

    def sample(
        self, key: Array, num_samples: int, condition: Array | None = None, temperature: float | Array = 1.0
    ) -> Array:
        """Draws z [num_samples, *event_shape] with `key`, for a condition [num_samples, *condition_shape] or None.

        `temperature` multiplies the deviation from the mean; for a mixture, from the mean of the drawn component.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method sample(key, num_samples, condition, ...)")


class StandardNormal(Base):
    """Standard normal N(0, I) on events of a given shape; it has no parameters.

        log p(z) = -|z|^2 / 2 - D log(2 pi) / 2,   [B] in nats

    Args:
      event_shape: shape of one z.

    Randomness: `sample` draws with its key. Cost: one pass over z.

    Raises:
      ValueError: for sizes below one.

    Example:
      >>> base = rf.StandardNormal((2,))
      >>> np.allclose(base.log_prob(jnp.zeros((3, 2))), -np.log(2 * np.pi)), base.sample(jax.random.key(0), 4).shape
      (True, (4, 2))
    """

    def __init__(self, event_shape: Shape):
        self.event_shape = as_shape("event_shape", event_shape)

    def log_prob(self, z: Array, condition: Array | None = None) -> Array:
        check_batch("z", z, self.event_shape)
        return standard_normal_log_prob(z)

    def sample(
        self, key: Array, num_samples: int, condition: Array | None = None, temperature: float | Array = 1.0
    ) -> Array:
        check_draw(key, num_samples, temperature)
        return temperature * jax.random.normal(key, (num_samples, *self.event_shape), jnp.result_type(float))


def check_draw(key: Array, num_samples: int, temperature: float | Array) -> None:
    """Raises ValueError for an invalid key, number of samples, or temperature."""
    check_key("key", key)
    check_count("num_samples", num_samples, 1)
    check_scalar("temperature", temperature)


def standard_normal_log_prob(z: Array) -> Array:
    """log N(z; 0, I), [B] in nats, for z [B, ...]."""
    axes = tuple(range(1, z.ndim))
    return -0.5 * jnp.sum(z**2, axis=axes) - 0.5 * math.prod(z.shape[1:]) * math.log(2 * math.pi)
