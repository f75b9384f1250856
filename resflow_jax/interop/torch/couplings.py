"""Flows with the coupling blocks of the authors' PyTorch implementation instead of residual blocks.

    y = x on the kept elements,   y = x * sigmoid(a + 2) + t on the others,   (a, t) = nnet(kept elements)

In the first scale, if the data go through a logit or a normalisation, a block keeps the pixels of one colour of a
checkerboard; in all others, and in blocks of dense layers, it keeps half of the channels. Kept and moved elements are
exchanged from block to block, from the first block of every scale on. A block of dense layers sees the flattened half
of the channels of an image.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flax import nnx

from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.couplings.affine import AffineCoupling
from resflow_jax.layers.couplings.conditioners import CNNConditioner, MLPConditioner
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.shapes import Flatten, Reshape
from resflow_jax.models.build import image_bijector
from resflow_jax.models.config import ImageFlowConfig
from resflow_jax.models.groups import DenseTail

Shape = tuple[int, ...]


def coupling_bijector(config: Any, first: list[Bijector], rngs: nnx.Rngs) -> Bijector:
    """The bijector of a `TorchImageConfig` with coupling blocks; `first` are the layers before all blocks."""

    def blocks(_: ImageFlowConfig, scale: int, shape: Shape, rngs: nnx.Rngs) -> tuple[list[Bijector], Shape]:
        return list(_blocks(config, scale, shape, rngs)), shape

    # The dense blocks at the end act on images too: they are part of the last scale.
    return image_bijector(replace(config, tail=DenseTail(0)), first, blocks, rngs)


def _blocks(config: Any, scale: int, shape: Shape, rngs: nnx.Rngs) -> Iterator[Bijector]:
    """The layers of one scale on images of this shape, with those of the end after the last."""
    between, dense = config.between, config.fully_connected
    numbers = itertools.count()  # of the block in its scale

    def actnorms() -> Iterator[Bijector]:
        if between.actnorm:
            yield ActNorm(shape if dense else shape[-1:])
        if between.feature_actnorm:
            yield ActNorm(shape)

    if scale == 0 and between.first_actnorm:
        yield from actnorms()
    for n in range(config.blocks[scale]):
        if between.invertible_linear:
            yield from _mixing(shape, dense, rngs)
        plain = config.preactivation == "none" or (config.preactivation == "all_but_first" and scale == n == 0)
        hidden = (config.hidden_channels,) * (len(config.kernels) - 1)
        if dense:
            network = MLPConditioner(hidden, config.activation, config.preactivation != "none", zero=False)
        else:
            network = CNNConditioner(hidden, config.kernels, config.activation, not plain, zero=False)
        mask = "checkerboard" if scale == 0 and _has_first_layer(config) and not dense else "halves"
        yield AffineCoupling(shape, network, mask, next(numbers) % 2 == 1, scale="sigmoid", rngs=rngs)
        yield from actnorms()
    if scale == len(config.blocks) - 1:
        hidden = (config.tail.hidden,) * (config.tail.layers - 1)
        network = MLPConditioner(hidden, config.activation, config.preactivation != "none", zero=False)
        for _ in range(config.tail.blocks):
            yield AffineCoupling(shape, network, "halves", next(numbers) % 2 == 1, scale="sigmoid", rngs=rngs)
            if between.actnorm or between.feature_actnorm:
                yield ActNorm(shape)


def _mixing(shape: Shape, dense: bool, rngs: nnx.Rngs) -> Iterator[Bijector]:
    """An invertible linear layer: on the channels, or on all elements of an image."""
    if dense:
        dim = math.prod(shape)
        yield from (Flatten(shape), InvertibleLinear(dim, rngs=rngs), Reshape((dim,), shape))
    else:
        yield InvertibleLinear(shape[-1], rngs=rngs)


def _has_first_layer(config: Any) -> bool:
    """Whether the scripts build the first scale with a logit or a normalisation in front."""
    return config.data.logit_alpha is not None or config.data.mean is not None
