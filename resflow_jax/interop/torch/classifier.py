"""A classifier on the features of a flow (Chen et al. 2019, arXiv 1906.02735, section 5.4 and appendix E).

    logits = W [h_1, ..., h_S] + b,   h_s = mean over pixels of relu(ActNorm(conv 3x3 (features of scale s)))

The features of a scale are its output. If half of the channels leaves for z after each scale, they are that half. The
last scale, after which nothing leaves, then has the features of the scale before once more, as in the authors' code.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.primitives.convolution import conv2d
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.initial import fan_in_uniform
from resflow_jax.layers.module import List, Module

Array = jax.Array


class Classifier(Module):
    """Maps the features [B, H, W, C] of every scale to logits [B, classes]. It costs one convolution a scale."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], channels: int, classes: int, *, rngs: nnx.Rngs):
        """Makes random parameters.

        Args:
          shapes: shape (H, W, C) of the features of every scale.
          channels: number of channels that each convolution gives.
          classes: number of classes.
          rngs: PRNG keys of the parameters.
        """
        self.heads = List(Head(shape[-1], channels, rngs=rngs) for shape in shapes)
        self.kernel, self.bias = _affine((channels * len(shapes), classes), rngs)

    def __call__(self, features: Sequence[Array]) -> Array:
        parts = [head(x) for head, x in zip(self.heads, features, strict=True)]
        logits = jnp.concatenate(parts, axis=-1) @ self.kernel[...]
        return logits + trailing(self.bias[...], logits)

    def initialize(self, features: Sequence[Array]) -> None:
        """Sets every ActNorm from a batch of features, in place."""
        for head, x in zip(self.heads, features, strict=True):
            head.norm.initialize(head.convolution(x))


class Head(Module):
    """The head of one scale, from features [B, H, W, C] to [B, channels]."""

    def __init__(self, channels_in: int, channels: int, *, rngs: nnx.Rngs):
        self.kernel, self.bias = _affine((3, 3, channels_in, channels), rngs)
        self.norm = ActNorm((channels,))

    def convolution(self, x: Array) -> Array:
        y = conv2d(x, self.kernel[...])
        return y + trailing(self.bias[...], y)

    def __call__(self, x: Array) -> Array:
        return jnp.mean(jax.nn.relu(self.norm(self.convolution(x))), axis=(1, 2))


def _affine(shape: tuple[int, ...], rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
    """A kernel and a bias, drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    fan_in = math.prod(shape[:-1])
    return tuple(nnx.Param(fan_in_uniform(rngs, part, fan_in)) for part in (shape, shape[-1:]))
