"""From a configuration to the scales of a flow: chains of layers, with the shape after each."""

import math
from collections.abc import Sequence

from flax import nnx

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain, MultiScale
from resflow_jax.layers.logit import Logit
from resflow_jax.layers.normalization import Normalization
from resflow_jax.layers.padding import ChannelPadding
from resflow_jax.layers.shapes import Flatten, Reshape, Squeeze
from resflow_jax.models.blocks import Around, Config, MakeContraction, MakeLinear, densenet, layered, residual_blocks
from resflow_jax.models.classifier import Classifier
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig

Shape = tuple[int, ...]


def build_bijector(config: Config, rngs: nnx.Rngs) -> Bijector:
    """The bijector from x to z [B, D]."""
    if isinstance(config, VectorFlowConfig):
        return _vector_chain(config, rngs)
    scales = _image_scales(config, rngs)
    if config.factor_out and len(scales) > 1:
        return MultiScale(scales, config.shape)
    event = Chain(scales).output_shape(config.shape)
    return Chain([*scales, Flatten(event)] if len(event) > 1 else scales)


def build_classifier(config: Config, rngs: nnx.Rngs) -> Classifier | None:
    """The classifier on the features of every scale, or none."""
    if isinstance(config, VectorFlowConfig) or not config.classes:
        return None
    return Classifier(feature_shapes(config), config.classifier_channels, config.classes, rngs=rngs)


def feature_shapes(config: ImageFlowConfig) -> list[Shape]:
    """(H, W, C) of the features of every scale; see `models.classifier`."""
    shape = _entrance(config)
    shapes = []
    for _ in config.blocks[1:]:
        shape = _squeezed(shape)
        if config.factor_out:
            shape = (*shape[:2], shape[2] // 2)
        shapes.append(shape)
    return [*shapes, shape]


def _entrance(config: ImageFlowConfig) -> Shape:
    """(H, W, C) of what the first scale takes."""
    shape = (*config.shape[:2], config.shape[2] + config.padding)
    return _squeezed(shape) if config.squeeze_first else shape


def _image_scales(config: ImageFlowConfig, rngs: nnx.Rngs) -> list[Chain]:
    """The chain of every scale."""
    layers, chains, features = _image_data_layers(config), [], feature_shapes(config)
    shapes = [_entrance(config), *features[:-1]]
    for scale, (depth, shape) in enumerate(zip(config.blocks, shapes, strict=True)):
        event = (math.prod(shape),) if config.fully_connected else shape
        actnorms = [event[-1:]] * config.actnorm + [event] * config.feature_actnorm
        if config.fully_connected:
            layers.append(Flatten(shape))
            contraction = _fully_connected(config, event[0], len(config.kernels), config.hidden_channels, config.norms)
        else:
            contraction = _convolutional(config, shape)
        if scale == 0 and config.first_actnorm:
            layers += map(ActNorm, actnorms)
        around = Around(config, actnorms, event[-1], config.invertible_linear)
        layers += residual_blocks(config, contraction, around, depth, first=scale == 0, rngs=rngs)
        if scale < len(config.blocks) - 1:
            if config.fully_connected:
                layers.append(Reshape(event, shape))
            layers.append(Squeeze(shape))
        elif config.fc_blocks:
            layers += [] if config.fully_connected else [Flatten(shape)]
            event = (math.prod(shape),)
            actnorms = [event] if config.actnorm or config.feature_actnorm else []
            around = Around(config, actnorms, event[0], False)
            dense = _fully_connected(config, event[0], config.fc_layers, config.fc_hidden, config.fc_norms)
            layers += residual_blocks(config, dense, around, config.fc_blocks, first=False, rngs=rngs)
        chains.append(Chain(layers))
        layers = []
    return chains


def _vector_chain(config: VectorFlowConfig, rngs: nnx.Rngs) -> Chain:
    dim = config.dim + config.padding
    actnorms = [(dim,)] if config.actnorm else []
    layers = _normalization(config, 0) + _padding(config)
    if config.first_actnorm:
        layers += map(ActNorm, actnorms)
    if config.dense_depth:
        contraction = densenet(config, _dense_maps(config), dim, None, config.dense_growth, 1)
    else:
        kernels = [1] * (len(config.hidden) + 1)
        centering = config.centering == "layers"
        contraction = layered(config, _dense_maps(config), dim, config.hidden, kernels, config.norms, centering)
    around = Around(config, actnorms, dim, config.invertible_linear)
    layers += residual_blocks(config, contraction, around, config.blocks, first=True, rngs=rngs)
    return Chain(layers)


def _image_data_layers(config: ImageFlowConfig) -> list[Bijector]:
    """What is done to images at the entrance of the flow, the first squeeze included."""
    logit = [] if config.logit_alpha is None else [Logit(config.logit_alpha)]
    padding = _padding(config)
    squeeze: list[Bijector] = []
    if config.squeeze_first:
        squeeze.append(Squeeze((*config.shape[:2], config.shape[2] + config.padding)))
    if config.squeezed_data:
        return [*padding, *squeeze, *_normalization(config, 4 * config.padding)]
    normalization = _normalization(config, 0)
    data = [*normalization, *padding, *logit] if config.padding_first else [*logit, *normalization, *padding]
    return [*data, *squeeze]


def _normalization(config: Config, others: int) -> list[Bijector]:
    """That of the data, which leaves so many channels behind its own as they are."""
    if config.data_mean is None:
        return []
    return [Normalization((*config.data_mean, *[0] * others), (*config.data_deviation, *[1] * others))]


def _padding(config: Config) -> list[Bijector]:
    if not config.padding:
        return []
    return [ChannelPadding(config.padding, config.padding_noise, config.padding_scale, config.padding_shift)]


def _convolutional(config: ImageFlowConfig, shape: Shape) -> MakeContraction:
    *size, channels = shape

    def conv(channels_in: int, channels_out: int, kernel: int) -> ConvMap:
        return ConvMap(tuple(size), channels_in, channels_out, kernel, matmul_dtype=config.matmul_dtype)

    if config.dense_depth:
        return densenet(config, conv, channels, None, config.dense_growth, 3)
    hidden = [config.hidden_channels] * (len(config.kernels) - 1)
    return layered(config, conv, channels, hidden, config.kernels, config.norms, config.centering == "layers")


def _fully_connected(
    config: ImageFlowConfig, dim: int, depth: int, width: int, norms: Sequence[float] | None
) -> MakeContraction:
    """Blocks of `depth` dense layers, or DenseNets; without centering inside."""
    if config.dense_depth:
        return densenet(config, _dense_maps(config), dim, config.fc_dense_first, config.fc_dense_growth, 1)
    return layered(config, _dense_maps(config), dim, [width] * (depth - 1), [1] * depth, norms, False)


def _dense_maps(config: Config) -> MakeLinear:
    return lambda features_in, features_out, kernel: DenseMap(features_in, features_out, config.matmul_dtype)


def _squeezed(shape: Shape) -> Shape:
    height, width, channels = shape
    return height // 2, width // 2, 4 * channels
