"""From a configuration to the scales of a flow: chains of layers, with the shape after each."""

import math
from collections.abc import Callable, Sequence

from flax import nnx

from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.linear_maps import ConvMap, DenseMap, LinearMap
from resflow_jax.layers.bijector import Bijector, Chain
from resflow_jax.layers.elementwise import ActNorm, Flatten, Logit, Squeeze
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig

Shape = tuple[int, ...]


def build_scales(config: ImageFlowConfig | VectorFlowConfig, rngs: nnx.Rngs) -> tuple[list[Chain], list[Shape]]:
    """The chain of every scale, and the shape of the part of z that each emits."""
    return _image_scales(config, rngs) if isinstance(config, ImageFlowConfig) else _vector_scales(config, rngs)


def _image_scales(config: ImageFlowConfig, rngs: nnx.Rngs) -> tuple[list[Chain], list[Shape]]:
    shape, chains, emitted = config.shape, [], []
    for scale, depth in enumerate(config.blocks):
        layers: list[Bijector] = []
        if scale == 0 and config.logit_alpha is not None:
            layers.append(Logit(config.logit_alpha))
        if scale == 0 and config.squeeze_first:
            layers.append(Squeeze(shape))
            shape = _squeezed(shape)
        actnorms = _image_actnorms(config, shape)
        if scale == 0 and config.first_actnorm:
            layers += [ActNorm(s) for s in actnorms]
        maps = _convolutions(config, shape)
        layers += _residual_blocks(config, maps, actnorms, depth, first=scale == 0, rngs=rngs)
        if scale < len(config.blocks) - 1:
            layers.append(Squeeze(shape))
            shape = _squeezed(shape)
            if config.factor_out:
                shape = (*shape[:2], shape[2] // 2)
                emitted.append(shape)
        elif config.fc_blocks:
            layers.append(Flatten(shape))
            shape = (math.prod(shape),)
            maps = _dense(shape[0], [config.fc_hidden] * (config.fc_layers - 1))
            actnorms = [shape] if config.actnorm or config.feature_actnorm else []
            layers += _residual_blocks(config, maps, actnorms, config.fc_blocks, first=False, rngs=rngs)
        chains.append(Chain(layers))
    return chains, [*emitted, shape]


def _vector_scales(config: VectorFlowConfig, rngs: nnx.Rngs) -> tuple[list[Chain], list[Shape]]:
    shape = (config.dim,)
    actnorms = [shape] if config.actnorm else []
    layers: list[Bijector] = [ActNorm(s) for s in actnorms] if config.first_actnorm else []
    maps = _dense(config.dim, config.hidden)
    layers += _residual_blocks(config, maps, actnorms, config.blocks, first=True, rngs=rngs)
    return [Chain(layers)], [shape]


def _residual_blocks(
    config: ImageFlowConfig | VectorFlowConfig,
    maps: Sequence[LinearMap],
    actnorms: Sequence[Shape],
    depth: int,
    *,
    first: bool,
    rngs: nnx.Rngs,
) -> list[Bijector]:
    """`depth` residual blocks, each with its ActNorms, stacked as far as they are alike."""
    activation = get_activation(config.activation)

    def step(preactivation: bool) -> Callable[[nnx.Rngs], Chain]:
        def make(rngs: nnx.Rngs) -> Chain:
            block = ResidualBlock(maps, activation, config.coefficient, preactivation=preactivation, rngs=rngs)
            return Chain([block, *[ActNorm(s) for s in actnorms]])

        return make

    if not first or config.preactivation != "all_but_first":
        return [ResidualStack(step(config.preactivation != "none"), depth, rngs=rngs)]
    head = step(False)(rngs)
    return [head] if depth == 1 else [head, ResidualStack(step(True), depth - 1, rngs=rngs)]


def _image_actnorms(config: ImageFlowConfig, shape: Shape) -> list[Shape]:
    return [shape[-1:]] * config.actnorm + [shape] * config.feature_actnorm


def _convolutions(config: ImageFlowConfig, shape: Shape) -> list[LinearMap]:
    height, width, channels = shape
    hidden = [config.hidden_channels] * (len(config.kernels) - 1)
    sides = zip([channels, *hidden], [*hidden, channels], config.kernels, strict=True)
    return [ConvMap((height, width), c_in, c_out, size) for c_in, c_out, size in sides]


def _dense(dim: int, hidden: Sequence[int]) -> list[LinearMap]:
    return [DenseMap(a, b) for a, b in zip([dim, *hidden], [*hidden, dim], strict=True)]


def _squeezed(shape: Shape) -> Shape:
    height, width, channels = shape
    return height // 2, width // 2, 4 * channels
