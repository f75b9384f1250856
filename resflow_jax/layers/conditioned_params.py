"""Parameters of bases and affine layers that depend on a condition c, in any way."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import check_count
from resflow_jax.layers.module import Linear, Module

Array = jax.Array

WIDTH = 64  # of the hidden layer of a condition's network
BOUND = 4.0  # exp(4) = 55


class ConditionedParams(Module):
    """A network that maps a condition [B, condition_dim] to summands for parameters; they are zero at the start.

    One hidden layer of 64 units. The last layer has no bias, because the parameters themselves play that part.
    """

    def __init__(self, condition_dim: int, shapes: Sequence[tuple[int, ...]], *, rngs: nnx.Rngs):
        """shapes: one shape for each parameter of one example."""
        dtype = jnp.result_type(float)
        self.shapes = tuple(map(tuple, shapes))
        self.hidden = Linear(condition_dim, WIDTH, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Param(jnp.zeros((WIDTH, sum(map(math.prod, shapes)))))

    @classmethod
    def make(
        cls, condition_dim: int | None, shapes: Sequence[tuple[int, ...]], *, rngs: nnx.Rngs | None
    ) -> "ConditionedParams | None":
        """The network after checks of its arguments, or None if condition_dim is None."""
        if condition_dim is None:
            return None
        check_count("condition_dim", condition_dim, 1)
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs: expected nnx.Rngs with condition_dim, got {type(rngs).__name__}")
        return cls(condition_dim, shapes, rngs=rngs)

    def __call__(self, condition: Array) -> list[Array]:
        """Arrays [B, *shape], one for each of the shapes."""
        return split_features(nnx.swish(self.hidden(condition)) @ self.out[...], self.shapes)


def split_features(features: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """The outputs [B, n] of a network as arrays [B, *shape], one after the other."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()
    parts = jnp.split(features, ends, axis=-1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def bounded(a: Array) -> Array:
    """4 tanh(a / 4): the summand that a network may add to the log of a scale, bounded to [-4, 4]."""
    return BOUND * jnp.tanh(a / BOUND)
