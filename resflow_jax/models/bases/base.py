"""The interface of a base distribution, and the one without parameters."""

import math

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import as_shape
from resflow_jax.layers.conditions import ConditionShape
from resflow_jax.layers.module import Module

Array = jax.Array
Shape = tuple[int, ...]


class Base(Module):
    """Interface of a base distribution of events z.

    Attributes:
      event_shape: of one z.
      condition_shape: of one condition; None for no condition, `...` for whatever is given.
    """

    event_shape: Shape
    condition_shape: ConditionShape = None

    def log_prob(self, z: Array, condition: Array | None = None) -> Array:
        """log p(z | c) [B] in nats of z [B, *event_shape], with a condition [B, *condition_shape]."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method log_prob(z, condition)")

    def sample(
        self, key: Array, num_samples: int, condition: Array | None = None, temperature: float | Array = 1.0
    ) -> Array:
        """Draws z [num_samples, *event_shape], with a condition [num_samples, *condition_shape].

        `temperature` multiplies the deviation from the mean; of a mixture, that from the mean of a component.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method sample(key, num_samples, condition, ...)")


class StandardNormal(Base):
    """N(0, I) on events of a given shape; it has no parameters.

    Args:
      event_shape: of one z.
    """

    def __init__(self, event_shape: Shape):
        self.event_shape = as_shape("event_shape", event_shape)

    def log_prob(self, z: Array, condition: Array | None = None) -> Array:
        return standard_normal_log_prob(z)

    def sample(
        self, key: Array, num_samples: int, condition: Array | None = None, temperature: float | Array = 1.0
    ) -> Array:
        return temperature * jax.random.normal(key, (num_samples, *self.event_shape), jnp.result_type(float))


def standard_normal_log_prob(z: Array) -> Array:
    """log N(z; 0, I), [B] in nats, for z [B, ...]."""
    axes = tuple(range(1, z.ndim))
    return -0.5 * jnp.sum(z**2, axis=axes) - 0.5 * math.prod(z.shape[1:]) * math.log(2 * math.pi)
