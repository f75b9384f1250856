"""Bijectors that map each element independently of the others."""

from typing import Any

import jax
import jax.numpy as jnp

from resflow_jax.layers.bijector import Bijector

Array = jax.Array


class Elementwise(Bijector):
    """A layer without parameters that maps each element independently; subclasses define both directions."""

    def values(self, x: Array) -> tuple[Array, Array]:
        """f(x) and log|f'(x)| of every element, in the shape of x."""
        raise NotImplementedError

    def inverse_values(self, y: Array) -> tuple[Array, Array]:
        """x with f(x) = y, and log|f'(x)|, of every element."""
        raise NotImplementedError

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        y, log_slopes = self.values(x)
        return y, jnp.sum(log_slopes, axis=_event_axes(x))

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return self.inverse_values(y)[0]

    def invert_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        x, log_slopes = self.inverse_values(y)
        return x, jnp.sum(log_slopes, axis=_event_axes(y))


def largest(dtype: Any) -> float:
    """The largest number of a dtype."""
    return float(jnp.finfo(dtype).max)


def smallest(dtype: Any) -> float:
    """The smallest normal number of a dtype: smaller numbers may be flushed to zero."""
    return float(jnp.finfo(dtype).tiny)


def _event_axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))
