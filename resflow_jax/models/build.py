"""Makes the bijector of a configuration: chains of layers, with the shape after each."""

import math
from collections.abc import Callable, Sequence

from flax import nnx

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.logit import Logit
from resflow_jax.layers.multi_scale import MultiScale
from resflow_jax.layers.normalization import Normalization
from resflow_jax.layers.padding import ChannelPadding
from resflow_jax.layers.shapes import Flatten, Reshape, Squeeze
from resflow_jax.layers.spline import Spline
from resflow_jax.models.blocks import Around, MakeContraction, MakeLinear, densenet, layered, residual_blocks
from resflow_jax.models.config import FlowConfig, ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.groups import Padding

Shape = tuple[int, ...]
# The blocks of one scale on images (H, W, C): the layers, and the shape of their output event.
MakeBlocks = Callable[[ImageFlowConfig, int, Shape, nnx.Rngs], tuple[list[Bijector], Shape]]


def build_bijector(config: FlowConfig, rngs: nnx.Rngs) -> Bijector:
    """The bijector from x to z [B, D]."""
    if isinstance(config, VectorFlowConfig):
        return _vector_chain(config, rngs)
    return image_bijector(config, data_layers(config), convolutional_blocks, rngs)


def image_bijector(config: ImageFlowConfig, first: list[Bijector], blocks: MakeBlocks, rngs: nnx.Rngs) -> Bijector:
    """Joins the scales of a flow of images to one bijector; `first` are the layers before all blocks."""
    scales = []
    for scale, shape in enumerate(_entrances(config)):
        layers = list(first) if scale == 0 else []
        made, event = blocks(config, scale, shape, rngs)
        layers += made
        is_last = scale == len(config.blocks) - 1
        layers += _tail_after(config, event, rngs) if is_last else _squeeze_after(event, shape)
        scales.append(Chain(layers))
    if config.scales.factor_out and len(scales) > 1:
        return MultiScale(scales, config.shape)
    event = Chain(scales).output_shape(config.shape)
    if len(event) > 1:
        scales.append(Flatten(event))
    return Chain(scales)


def feature_shapes(config: ImageFlowConfig) -> list[Shape]:
    """(H, W, C) of the output of every scale after its squeeze; with factoring out, of the half that continues."""
    shape = _entrance(config)
    shapes = []
    for _ in config.blocks[1:]:
        shape = _squeezed(shape)
        if config.scales.factor_out:
            shape = (*shape[:2], shape[2] // 2)
        shapes.append(shape)
    return [*shapes, shape]


def data_layers(config: ImageFlowConfig) -> list[Bijector]:
    """The layers before the first block: logit, spline, normalisation, padding, and the first squeeze."""
    noise = padding_layers(config.data.padding)
    return [*logit(config), *normalization(config), *noise, *first_squeeze(config)]


def logit(config: ImageFlowConfig) -> list[Bijector]:
    """The logit of images and the splines after it, if any. Their knots cover the logits of [0, 1]."""
    alpha, bins = config.data.logit_alpha, config.data.spline_bins
    layers: list[Bijector] = [] if alpha is None else [Logit(alpha)]
    return [*layers, Spline(config.shape[-1:], bins, math.log1p(-alpha) - math.log(alpha))] if bins else layers


def normalization(config: FlowConfig, others: int = 0) -> list[Bijector]:
    """Data normalisation, if any; the last `others` channels pass through."""
    data = config.data
    if data.mean is None:
        return []
    return [Normalization((*data.mean, *[0] * others), (*data.std, *[1] * others))]


def padding_layers(padding: Padding) -> list[Bijector]:
    """The layer that appends noise, if any."""
    if not padding.channels:
        return []
    return [ChannelPadding(padding.channels, padding.noise, padding.scale, padding.shift)]


def first_squeeze(config: ImageFlowConfig) -> list[Bijector]:
    """The squeeze before the first scale, of padded images, if any."""
    if not config.scales.squeeze_first:
        return []
    return [Squeeze((*config.shape[:2], config.shape[2] + config.data.padding.channels))]


def convolutional_blocks(
    config: ImageFlowConfig, scale: int, shape: Shape, rngs: nnx.Rngs
) -> tuple[list[Bijector], Shape]:
    """The convolutional blocks of one scale, with an ActNorm per channel, per feature, or both."""
    between = config.between
    actnorms = []
    if between.actnorm:
        actnorms.append(shape[-1:])
    if between.feature_actnorm:
        actnorms.append(shape)
    around = Around(config, actnorms, shape[-1], between.invertible_linear)
    return blocks_of_scale(config, scale, _convolutional(config, scale, shape), around, rngs), shape


def blocks_of_scale(
    config: ImageFlowConfig, scale: int, contraction: MakeContraction, around: Around, rngs: nnx.Rngs
) -> list[Bijector]:
    """The residual blocks of one scale, and for the first scale the ActNorms before them."""
    is_first = scale == 0
    layers: list[Bijector] = []
    if is_first and config.between.first_actnorm:
        layers += [ActNorm(shape) for shape in around.actnorms]
    layers += residual_blocks(config, contraction, around, config.blocks[scale], first=is_first, rngs=rngs)
    return layers


def fully_connected(
    config: ImageFlowConfig, dim: int, depth: int, width: int, norms: Sequence[float] | None
) -> MakeContraction:
    """Blocks of `depth` dense layers, or DenseNets; without centering inside."""
    if config.densenet.depth:
        return densenet(config, _dense_maps(config), dim, config.tail.densenet_first, config.tail.densenet_growth, 1)
    return layered(config, _dense_maps(config), dim, [width] * (depth - 1), [1] * depth, norms, False)


def _vector_chain(config: VectorFlowConfig, rngs: nnx.Rngs) -> Chain:
    dim = config.dim + config.data.padding.channels
    actnorms = [(dim,)] if config.between.actnorm else []
    layers = normalization(config) + padding_layers(config.data.padding)
    if config.between.first_actnorm:
        layers += map(ActNorm, actnorms)
    if config.densenet.depth:
        contraction = densenet(config, _dense_maps(config), dim, None, config.densenet.growth, 1)
    else:
        kernels = [1] * (len(config.hidden) + 1)
        centering = config.between.centering == "layers"
        contraction = layered(config, _dense_maps(config), dim, config.hidden, kernels, config.norms.orders, centering)
    around = Around(config, actnorms, dim, config.between.invertible_linear)
    layers += residual_blocks(config, contraction, around, config.blocks, first=True, rngs=rngs)
    return Chain(layers)


def _squeeze_after(event: Shape, shape: Shape) -> list[Bijector]:
    """From the output event of a scale's blocks to the next scale's (H, W, C); the event may be flat."""
    if event == shape:
        return [Squeeze(shape)]
    return [Reshape(event, shape), Squeeze(shape)]


def _tail_after(config: ImageFlowConfig, event: Shape, rngs: nnx.Rngs) -> list[Bijector]:
    """The tail, if any, after the last convolutional blocks; it first flattens their output event if needed."""
    if not config.tail.blocks:
        return []
    flatten = [Flatten(event)] if len(event) > 1 else []
    return [*flatten, *_tail(config, math.prod(event), rngs)]


def _tail(config: ImageFlowConfig, dim: int, rngs: nnx.Rngs) -> list[Bijector]:
    """The dense blocks on flattened images, with an ActNorm per feature."""
    actnorms = [(dim,)] if config.between.actnorm or config.between.feature_actnorm else []
    tail = config.tail
    contraction = fully_connected(config, dim, tail.layers, tail.hidden, tail.norms)
    return residual_blocks(
        config, contraction, Around(config, actnorms, dim, False), tail.blocks, first=False, rngs=rngs
    )


def _entrances(config: ImageFlowConfig) -> list[Shape]:
    """(H, W, C) of the input of every scale's blocks."""
    return [_entrance(config), *feature_shapes(config)[:-1]]


def _entrance(config: ImageFlowConfig) -> Shape:
    """(H, W, C) of the input of the first scale's blocks."""
    shape = (*config.shape[:2], config.shape[2] + config.data.padding.channels)
    return _squeezed(shape) if config.scales.squeeze_first else shape


def _convolutional(config: ImageFlowConfig, scale: int, shape: Shape) -> MakeContraction:
    *size, channels = shape

    def conv(channels_in: int, channels_out: int, kernel: int) -> ConvMap:
        return ConvMap(tuple(size), channels_in, channels_out, kernel, matmul_dtype=config.matmul_dtype)

    if config.densenet.depth:
        return densenet(config, conv, channels, None, config.densenet.growth, 3)
    widths = config.hidden_channels
    hidden = [widths[scale] if isinstance(widths, tuple) else widths] * (len(config.kernels) - 1)
    centering = config.between.centering == "layers"
    return layered(config, conv, channels, hidden, config.kernels, config.norms.orders, centering)


def _dense_maps(config: FlowConfig) -> MakeLinear:
    return lambda features_in, features_out, kernel: DenseMap(features_in, features_out, config.matmul_dtype)


def _squeezed(shape: Shape) -> Shape:
    height, width, channels = shape
    return height // 2, width // 2, 4 * channels
