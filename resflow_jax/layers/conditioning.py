"""How a condition c enters a contraction: gates and shifts of its linear layers.

    h(x; c) = gate(c) * (W x) + b + shift(c),   gate = tanh(2 + a(c)),   |gate| <= 1

A network of any Lipschitz constant computes a(c) and shift(c). A factor of modulus at most 1 shrinks every difference
h(a; c) - h(b; c), and a shift cancels in it. So the Lipschitz constant of the layer in x is at most the norm of W, for
every c and in every p-norm. At the start the gates are near 1.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_count
from resflow_jax.layers.conditioned_params import WIDTH, split_features
from resflow_jax.layers.module import Linear, Module

Array = jax.Array

_START = 2.0  # of a gate's argument: tanh(2) = 0.96


# The effect of a condition on one linear layer: factor and shift of every channel, [B, channels]. A plain tuple, since
# `nnx.tabulate` does not accept a NamedTuple.
Gate = tuple[Array, Array]


def gated(gate: Gate, x: Array) -> Array:
    """factor * x + shift for x [B, ..., channels]."""
    shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    factor, shift = gate
    return factor.reshape(shape) * x + shift.reshape(shape)


class Conditioning(Module):
    """Maps a condition [B, *condition_shape] to the gates of several linear layers; one hidden layer of 64 units."""

    def __init__(
        self, condition_shape: tuple[int, ...], channels: Sequence[int], *, zero: bool = False, rngs: nnx.Rngs
    ):
        """channels: number of output channels of every linear layer; zero: whether all shifts start at zero."""
        for size in condition_shape:
            check_count("condition_shape", size, 1)
        dtype = jnp.result_type(float)
        self.channels = tuple(channels)
        self.hidden = Linear(math.prod(condition_shape), WIDTH, param_dtype=dtype, rngs=rngs)
        self.out = Linear(WIDTH, 2 * sum(channels), param_dtype=dtype, rngs=rngs)
        if zero:
            self.out.kernel[...] = jnp.zeros_like(self.out.kernel[...])

    def __call__(self, condition: Array) -> list[Gate]:
        features = self.out(nnx.swish(self.hidden(condition.reshape(condition.shape[0], -1))))
        parts = split_features(features, [(size,) for size in self.channels for _ in range(2)])
        return [(jnp.tanh(_START + a), shift) for a, shift in zip(parts[::2], parts[1::2], strict=True)]
