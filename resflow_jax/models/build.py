"""From a configuration to the scales of a flow: chains of layers, with the shape after each."""

import math
from functools import partial

from flax import nnx

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.bijector import Bijector, Chain
from resflow_jax.layers.elementwise import ActNorm, Flatten, Logit, Squeeze
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.normalization import MovingBatchNorm, Normalization
from resflow_jax.layers.padding import ChannelPadding
from resflow_jax.models.blocks import Config, MakeContraction, MakeLinear, densenet, layered, residual_blocks
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig

Shape = tuple[int, ...]


def build_scales(config: Config, rngs: nnx.Rngs) -> tuple[list[Chain], list[Shape]]:
    """The chain of every scale, and the shape of the part of z that each emits."""
    return _image_scales(config, rngs) if isinstance(config, ImageFlowConfig) else _vector_scales(config, rngs)


def _image_scales(config: ImageFlowConfig, rngs: nnx.Rngs) -> tuple[list[Chain], list[Shape]]:
    layers: list[Bijector] = [] if config.logit_alpha is None else [Logit(config.logit_alpha)]
    layers += _data_layers(config)
    shape, chains, emitted = (*config.shape[:2], config.shape[2] + config.padding), [], []
    if config.squeeze_first:
        layers.append(Squeeze(shape))
        shape = _squeezed(shape)
    for scale, depth in enumerate(config.blocks):
        actnorms = [shape[-1:]] * config.actnorm + [shape] * config.feature_actnorm
        if scale == 0 and config.first_actnorm:
            layers += map(ActNorm, actnorms)
        behind = partial(_behind, config, actnorms, shape[-1], config.invertible_linear)
        layers += residual_blocks(config, _convolutional(config, shape), behind, depth, first=scale == 0, rngs=rngs)
        if scale < len(config.blocks) - 1:
            layers.append(Squeeze(shape))
            shape = _squeezed(shape)
            if config.factor_out:
                shape = (*shape[:2], shape[2] // 2)
                emitted.append(shape)
        elif config.fc_blocks:
            layers.append(Flatten(shape))
            shape = (math.prod(shape),)
            actnorms = [shape] if config.actnorm or config.feature_actnorm else []
            behind = partial(_behind, config, actnorms, shape[0], False)
            dense = _fully_connected(config, shape[0])
            layers += residual_blocks(config, dense, behind, config.fc_blocks, first=False, rngs=rngs)
        chains.append(Chain(layers))
        layers = []
    return chains, [*emitted, shape]


def _vector_scales(config: VectorFlowConfig, rngs: nnx.Rngs) -> tuple[list[Chain], list[Shape]]:
    dim = config.dim + config.padding
    actnorms = [(dim,)] if config.actnorm else []
    layers = _data_layers(config)
    if config.first_actnorm:
        layers += map(ActNorm, actnorms)
    if config.dense_depth:
        contraction = densenet(config, _dense_maps(config), dim, None, config.dense_growth, 1)
    else:
        kernels = [1] * (len(config.hidden) + 1)
        contraction = layered(config, _dense_maps(config), dim, config.hidden, kernels, config.norms)
    behind = partial(_behind, config, actnorms, dim, config.invertible_linear)
    layers += residual_blocks(config, contraction, behind, config.blocks, first=True, rngs=rngs)
    return [Chain(layers)], [(dim,)]


def _data_layers(config: Config) -> list[Bijector]:
    """What is done to the data at the entrance of the flow."""
    layers: list[Bijector] = []
    if config.data_mean is not None:
        layers.append(Normalization(config.data_mean, config.data_deviation))
    if config.padding:
        layers.append(ChannelPadding(config.padding, config.padding_noise))
    return layers


def _behind(
    config: Config, actnorms: list[Shape], channels: int, invertible_linear: bool, rngs: nnx.Rngs
) -> list[Bijector]:
    """The layers behind a residual block."""
    layers: list[Bijector] = [ActNorm(shape) for shape in actnorms]
    if config.batchnorm:
        layers.append(MovingBatchNorm((channels,)))
    if invertible_linear:
        layers.append(InvertibleLinear(channels, rngs=rngs))
    return layers


def _convolutional(config: ImageFlowConfig, shape: Shape) -> MakeContraction:
    *size, channels = shape

    def conv(channels_in: int, channels_out: int, kernel: int) -> ConvMap:
        return ConvMap(tuple(size), channels_in, channels_out, kernel, config.matmul_dtype)

    if config.dense_depth:
        return densenet(config, conv, channels, None, config.dense_growth, 3)
    hidden = [config.hidden_channels] * (len(config.kernels) - 1)
    return layered(config, conv, channels, hidden, config.kernels, config.norms)


def _fully_connected(config: ImageFlowConfig, dim: int) -> MakeContraction:
    if config.dense_depth:
        return densenet(config, _dense_maps(config), dim, config.fc_dense_first, config.fc_dense_growth, 1)
    hidden = [config.fc_hidden] * (config.fc_layers - 1)
    return layered(config, _dense_maps(config), dim, hidden, [1] * config.fc_layers, None)


def _dense_maps(config: Config) -> MakeLinear:
    return lambda features_in, features_out, kernel: DenseMap(features_in, features_out, config.matmul_dtype)


def _squeezed(shape: Shape) -> Shape:
    height, width, channels = shape
    return height // 2, width // 2, 4 * channels
