"""Which tensor of a PyTorch checkpoint is which variable of a flow, and how their axes and orders differ.

Kernels are [O, I, k, k] and [O, I] in a file, [k, k, I, O] and [I, O] here. Images are [C, H, W] in a file, also where
they are flattened, and [H, W, C] here. The activation `maxmin` of the original puts all maxima before all minima; here
each maximum directly follows its minimum. One list of `Entry` serves reading and writing, so that both include all
tensors.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from resflow_jax.functional.norms import needs_power_iteration
from resflow_jax.interop.torch.classifier import Classifier
from resflow_jax.interop.torch.flow import TorchFlow
from resflow_jax.interop.torch.places import (
    ActNormPart,
    DataConstant,
    Entry,
    Expected,
    Factored,
    Ignored,
    Norm,
    Order,
    Transposed,
)
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.contraction import Layered
from resflow_jax.layers.couplings.coupling import Coupling
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.lipschitz import LipschitzLinear
from resflow_jax.layers.normalization import MovingCentering, Normalization
from resflow_jax.layers.padding import ChannelPadding
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.layers.shapes import Flatten, Reshape, Squeeze
from resflow_jax.models.config import ImageFlowConfig
from resflow_jax.models.residual_flow import ResidualFlow

_BOOKKEEPING = ("last_n_samples", "last_firmom", "last_secmom")


def entries(flow: ResidualFlow, *, dropout: bool = False) -> list[Entry]:
    """Every tensor of the model that has the flow's config, in the order of its state_dict.

    Args:
      flow: a flow whose config the scripts can build, as `interop.torch.config` makes it.
      dropout: whether the blocks of the model have a dropout, which shifts the numbers of the layers after it.
    """
    config = flow.config
    is_image = isinstance(config, ImageFlowConfig)
    found: list[Entry] = []
    for n, scale in enumerate(flow.scales):
        prefix = f"transforms.{n}.chain" if is_image else "chain"
        found += _scale_entries(flow, scale, prefix, is_first=n == 0, dropout=dropout)
    if isinstance(flow, TorchFlow) and flow.classifier is not None:
        found += _classifier(flow.classifier)
    return _with_aliases(found)


def channels_last(shape: tuple[int, int, int]) -> np.ndarray:
    """The order of flattened images, with ours[i] = theirs[order[i]]; the shape is (H, W, C)."""
    height, width, channels = shape
    return np.arange(math.prod(shape)).reshape(channels, height, width).transpose(1, 2, 0).ravel()


def _with_aliases(found: list[Entry]) -> list[Entry]:
    """The entries, with aliases. Orders of norms that several layers share have an average under the first name."""
    first: dict[tuple[int, int | None], str] = {}
    return [
        replace(entry, alias=first.setdefault((id(entry.place.variable), entry.place.row), entry.name))
        if isinstance(entry.place, Transposed)
        else entry
        for entry in found
    ]


def _slots(bijectors: Any, row: int | None = None) -> Iterator[tuple[Bijector, int | None]]:
    """Every layer in order, with its row if it is part of a stack of layers."""
    for bijector in bijectors:
        if isinstance(bijector, Chain):
            yield from _slots(bijector.bijectors, row)
        elif isinstance(bijector, ResidualStack):
            for n in range(bijector.depth):
                yield from _slots(bijector.steps.bijectors, n)
        else:
            yield bijector, row


def _scale_entries(flow: ResidualFlow, scale: Chain, prefix: str, *, is_first: bool, dropout: bool) -> list[Entry]:
    """The tensors of one scale. Layers that are part of the model's chain are counted."""
    config, found, place = flow.config, [], 0
    squeezes = int(is_first and isinstance(config, ImageFlowConfig) and config.scales.squeeze_first)
    image: tuple[int, int, int] | None = None  # (H, W, C) of a flattened image
    for bijector, row in _slots([scale]):
        name = f"{prefix}.{place}"
        if isinstance(bijector, Squeeze) and squeezes:
            squeezes -= 1  # done before the model
            continue
        if isinstance(bijector, ActNorm):
            found += _actnorm(bijector, row, name, image)
        elif isinstance(bijector, InvertibleLinear):
            found += _invertible_linear(bijector, row, name, image)
        elif isinstance(bijector, ResidualBlock):
            found += _block(bijector.contraction, row, name, image, dropout)
        elif isinstance(bijector, Coupling):
            found += _coupling(bijector, name, dropout)
        elif isinstance(bijector, MovingCentering):
            found += _centering(bijector, row, name)
        elif isinstance(bijector, Normalization):
            found += _normalization(bijector, config, name) + _normalization(bijector, config, "init_layer")
        elif isinstance(bijector, Flatten):
            image = bijector.shape
            continue
        elif isinstance(bijector, Reshape):
            image = None
            continue
        elif isinstance(bijector, ChannelPadding):
            continue  # done before the model
        place += 1
    return found


def _actnorm(layer: ActNorm, row: int | None, name: str, image: tuple[int, int, int] | None) -> list[Entry]:
    shape = layer.shift.shape[row is not None :]
    if len(shape) == 3 or image:
        name, order = f"{name}.fc_module", partial(channels_last, image or shape)
    else:
        order = None
    return _scale_and_bias(layer, row, name, math.prod(shape), order)


def _scale_and_bias(layer: ActNorm, row: int | None, name: str, size: int, order: Order) -> list[Entry]:
    return [
        Entry(f"{name}.weight", (size,), ActNormPart(layer, "weight", row, order), is_parameter=True),
        Entry(f"{name}.bias", (size,), ActNormPart(layer, "bias", row, order), is_parameter=True),
        Entry(f"{name}.initialized", (), Expected(np.asarray(1))),
    ]


def _vector(name: str, variable: nnx.Variable, row: int | None, size: int, order: Order = None) -> Entry:
    is_parameter = isinstance(variable, nnx.Param)
    return Entry(name, (size,), Transposed(variable, row, (size,), orders=(order,)), is_parameter)


def _scalar(name: str, variable: nnx.Variable, row: int | None, shape: tuple[int, ...] = ()) -> Entry:
    return Entry(name, shape, Transposed(variable, row, shape, tuple(range(len(shape))), (None,) * len(shape)), True)


def _invertible_linear(
    layer: InvertibleLinear, row: int | None, name: str, image: tuple[int, int, int] | None
) -> list[Entry]:
    size = layer.lower.shape[-1]
    order = partial(channels_last, image) if image else None
    name = f"{name}.fc_module.weight" if image else f"{name}.weight"
    return [Entry(name, (size, size), Factored(layer, row, order), is_parameter=True)]


def _centering(layer: MovingCentering, row: int | None, name: str) -> list[Entry]:
    size = layer.bias.shape[-1]
    return [
        _vector(f"{name}.bias", layer.bias, row, size),
        Entry(f"{name}.step", None, Ignored(np.zeros(1, np.float32))),
        _vector(f"{name}.running_mean", layer.mean, row, size),
    ]


def _normalization(layer: Normalization, config: ImageFlowConfig, name: str) -> list[Entry]:
    """Constants of the data. After a squeeze the script applies them only to the first channels."""
    found = []
    for part, variable, values, other in (
        ("mean", layer.mean, config.data.mean, 0.0),
        ("std", layer.std, config.data.std, 1.0),
    ):
        values = (*values, *[other] * (variable.shape[0] - len(values)))
        size = config.shape[-1]
        found.append(Entry(f"{name}.{part}", (size,), DataConstant(variable, values, size)))
    return found


def _block(
    contraction: Layered, row: int | None, name: str, image: tuple[int, int, int] | None, dropout: bool
) -> list[Entry]:
    found = [
        Entry(f"{name}.geom_p", (), Ignored(np.zeros(())), is_parameter=True),
        Entry(f"{name}.lamb", (), Ignored(np.asarray(2, np.float32)), is_parameter=True),
        *(Entry(f"{name}.{part}", None, Ignored(np.zeros(1, np.float32))) for part in _BOOKKEEPING),
    ]
    prefix = f"{name}.nnet.nnet" if image else f"{name}.nnet"
    numbers = itertools.count()
    activations = iter(contraction.activation_params)
    after_maxmin = contraction.activation.name == "maxmin"

    def activation():
        where = f"{prefix}.{next(numbers)}"
        found.extend(_scalar(f"{where}.{part}", variable, row, (1,)) for part, variable in next(activations).items())

    if contraction.preactivation:
        if contraction.pre_center is not None:
            found += _centering(contraction.pre_center, row, f"{prefix}.{next(numbers)}")
        activation()
    last = len(contraction.linears) - 1
    for n, linear in enumerate(contraction.linears):
        if n == last and dropout:
            next(numbers)
        order_in = partial(channels_last, image) if image and n == 0 else None
        if after_maxmin and (n or contraction.preactivation):
            order_in = partial(_maxima_beside_minima, linear.kernel.shape[-2])
        order_out = partial(channels_last, image) if image and n == last else None
        found += _lipschitz_linear(linear, row, f"{prefix}.{next(numbers)}", order_in, order_out)
        if contraction.centers:
            found += _centering(contraction.centers[n], row, f"{prefix}.{next(numbers)}")
        if n < last:
            activation()
    return found


def _coupling(layer: Coupling, name: str, dropout: bool) -> list[Entry]:
    """The network of a coupling block; dense layers act on the flattened half of the channels."""
    network = layer.network
    prefix = f"{name}.nnet" if network.on_grid else f"{name}.nnet.nnet"
    numbers, found, last = itertools.count(), [], len(network.linears) - 1
    activations = iter(network.activation_params)
    for n, linear in enumerate(network.linears):
        if n or network.preactivation:
            where = f"{prefix}.{next(numbers)}"
            found += [_scalar(f"{where}.{part}", v, None, (1,)) for part, v in next(activations).items()]
        if n == last and dropout:
            next(numbers)
        where = f"{prefix}.{next(numbers)}"
        *window, size_in, size_out = linear.kernel.shape
        flat_in, flat_out = not window and n == 0, not window and n == last
        orders = [None] * len(window)
        orders.append(partial(channels_last, network.shape_in) if flat_in else None)
        orders.append(partial(channels_last, network.shape_out) if flat_out else None)
        shape, axes = (size_out, size_in, *window), (2, 3, 1, 0) if window else (1, 0)
        found.append(Entry(f"{where}.weight", shape, Transposed(linear.kernel, None, shape, axes, tuple(orders)), True))
        found.append(_vector(f"{where}.bias", linear.bias, None, size_out, orders[-1]))
    return found


def _maxima_beside_minima(size: int) -> np.ndarray:
    """[min_0, max_0, min_1, ...] of [max_0, max_1, ..., min_0, ...]."""
    return np.arange(size).reshape(2, -1)[::-1].T.ravel()


def _lipschitz_linear(
    linear: LipschitzLinear, row: int | None, name: str, order_in: Order, order_out: Order
) -> list[Entry]:
    *window, size_in, size_out = linear.linear_map.kernel_shape
    axes = (2, 3, 1, 0) if window else (1, 0)
    shape = (size_out, size_in, *window)
    orders = (*[None] * len(window), order_in, order_out)
    found = [
        Entry(f"{name}.weight", shape, Transposed(linear.kernel, row, shape, axes, orders), is_parameter=True),
        _vector(f"{name}.bias", linear.bias, row, size_out, order_out),
        Entry(f"{name}.scale", (), Norm(linear, row)),
    ]
    learned = isinstance(linear.domain, nnx.Param)
    if learned:
        found += [_scalar(f"{name}.{part}", getattr(linear, part), row) for part in ("domain", "codomain")]
    elif not needs_power_iteration(linear.domain, linear.codomain):
        return found
    if window:
        size = linear.linear_map.size
        found.append(Entry(f"{name}.initialized", (), Expected(np.asarray(1))))
        found.append(Entry(f"{name}.spatial_dims", (2,), Expected(np.asarray(size, np.float32))))
        if window != [1, 1]:
            order_in, order_out = (partial(channels_last, (*size, channels)) for channels in (size_in, size_out))
            size_in, size_out = math.prod(size) * size_in, math.prod(size) * size_out
    found.append(_vector(f"{name}.u", linear.u, row, size_out, order_out))
    found.append(_vector(f"{name}.v", linear.v, row, size_in, order_in))
    return found


def _classifier(classifier: Classifier) -> list[Entry]:
    found = []
    for n, head in enumerate(classifier.heads):
        name = f"classification_heads.{n}"
        *window, size_in, size = head.kernel.shape
        shape = (size, size_in, *window)
        place = Transposed(head.kernel, None, shape, (2, 3, 1, 0), (None,) * 4)
        found.append(Entry(f"{name}.0.weight", shape, place, is_parameter=True))
        found.append(_vector(f"{name}.0.bias", head.bias, None, size))
        found += _scale_and_bias(head.norm, None, f"{name}.1", size, None)
    shape = classifier.kernel.shape[::-1]
    place = Transposed(classifier.kernel, None, shape, (1, 0), (None, None))
    return [
        *found,
        Entry("logit_layer.weight", shape, place, is_parameter=True),
        _vector("logit_layer.bias", classifier.bias, None, shape[0]),
    ]
