"""Which tensor of a PyTorch checkpoint is which variable of a flow, and how their axes and orders differ.

Kernels are [O, I, k, k] and [O, I] there, [k, k, I, O] and [I, O] here; images are [C, H, W] there, also where they
are flattened, [H, W, C] here; `maxmin` puts all maxima in front of all minima there, each pair side by side here. One
list of `Entry` serves reading and writing, so that neither can forget a tensor which the other knows.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from resflow_jax.functional.norms import needs_power_iteration
from resflow_jax.interop.torch.classifier import Classifier
from resflow_jax.interop.torch.flow import TorchFlow
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.contraction import Layered
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.lipschitz import LipschitzLinear
from resflow_jax.layers.normalization import MovingCentering, Normalization
from resflow_jax.layers.padding import ChannelPadding
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.layers.shapes import Flatten, Reshape, Squeeze
from resflow_jax.models.config import ImageFlowConfig
from resflow_jax.models.residual_flow import ResidualFlow

_BOOKKEEPING = ("last_n_samples", "last_firmom", "last_secmom")

Order = np.ndarray | None  # of an axis: ours[i] = theirs[order[i]]; None where it is the same


class Canvas:
    """Copies of a flow's variables on the host, to be read and painted on; `commit` puts them back.

    Those of an abstract flow (of `nnx.eval_shape`) start as zeros.
    """

    def __init__(self):
        self._arrays: dict[int, tuple[nnx.Variable, np.ndarray]] = {}

    def __getitem__(self, variable: nnx.Variable) -> np.ndarray:
        if id(variable) not in self._arrays:
            value = variable.get_value()
            is_abstract = isinstance(value, jax.ShapeDtypeStruct)
            array = np.zeros(value.shape, value.dtype) if is_abstract else np.array(value)
            self._arrays[id(variable)] = variable, array
        return self._arrays[id(variable)][1]

    def commit(self) -> None:
        for variable, array in self._arrays.values():
            variable.set_value(jnp.asarray(array))


class Place(Protocol):
    """Where a tensor's numbers are in a flow."""

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        """Writes the tensor into the variables; raises ValueError with what was expected if it does not fit."""

    def take(self, canvas: Canvas) -> np.ndarray:
        """The tensor that stands for the variables."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
      name: its key in the state_dict.
      shape: its shape there; None where that does not matter.
      place: where its numbers are in the flow.
      is_parameter: whether it is a parameter there, and so has an average.
      alias: the name that it has in the list of averages, where one parameter has several names.
    """

    name: str
    shape: tuple[int, ...] | None
    place: Place
    is_parameter: bool = False
    alias: str | None = None

    @property
    def averaged_name(self) -> str:
        """Its key among the averages."""
        return self.alias or self.name


@dataclass(frozen=True)
class Same:
    """A variable, or one row of it in a stack: a tensor of this shape, transposed, taken in orders, and reshaped."""

    variable: nnx.Variable
    row: int | None
    shape: tuple[int, ...]
    axes: tuple[int, ...] = (0,)
    orders: tuple[Order, ...] = (None,)

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        tensor = tensor.transpose(self.axes)
        for axis, order in enumerate(self.orders):
            tensor = tensor if order is None else np.take(tensor, order, axis)
        ours = _row(canvas[self.variable], self.row)
        ours[...] = tensor.reshape(ours.shape)

    def take(self, canvas: Canvas) -> np.ndarray:
        ours = _row(canvas[self.variable], self.row)
        tensor = ours.reshape([self.shape[axis] for axis in self.axes])
        for axis, order in enumerate(self.orders):
            tensor = tensor if order is None else np.take(tensor, np.argsort(order), axis)
        return tensor.transpose(np.argsort(self.axes))


@dataclass(frozen=True)
class ActNormPart:
    """The weight or the bias of y = (x + bias) exp(weight): the log_scale of an `ActNorm`, and minus its center.

    A file is read with a std of 1 and a shift of 0. Where a flow has others, they are part of what is written.
    """

    layer: ActNorm
    part: Literal["weight", "bias"]
    row: int | None
    order: Order

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        layer = self.layer
        tensor = tensor if self.order is None else tensor[self.order]
        if self.part == "weight":
            new = (layer.log_scale, tensor), (layer.std, np.ones_like(tensor))
        else:
            new = (layer.center, -tensor), (layer.shift, np.zeros_like(tensor))
        for variable, values in new:
            ours = _row(canvas[variable], self.row)
            ours[...] = values.reshape(ours.shape)

    def take(self, canvas: Canvas) -> np.ndarray:
        layer = self.layer
        variables = layer.center, layer.std, layer.log_scale, layer.shift
        parts = [_row(canvas[variable], self.row) for variable in variables]
        center, std, log_scale, shift = (np.asarray(part, np.float64).ravel() for part in parts)
        if self.part == "weight":
            tensor = log_scale - np.log(std)
        else:
            tensor = np.where(shift == 0, -center, shift * np.exp(-log_scale) * std - center)
        tensor = tensor.astype(parts[0].dtype)
        return tensor if self.order is None else tensor[np.argsort(self.order)]


@dataclass(frozen=True)
class Factored:
    """The matrix of an `InvertibleLinear`: W^T = P L U from [O, I] in float64, and back."""

    layer: InvertibleLinear
    row: int | None
    order: Order

    def _parts(self, canvas: Canvas) -> list[np.ndarray]:
        layer = self.layer
        variables = layer.rows, layer.lower, layer.upper, layer.log_scale, layer.sign
        return [_row(canvas[variable], self.row) for variable in variables]

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        weight = np.asarray(tensor, np.float64).T
        if self.order is not None:
            weight = weight[self.order][:, self.order]
        permutation, lower, upper = scipy.linalg.lu(weight, p_indices=True)  # weight = (L U)[permutation]
        diagonal = np.diagonal(upper)
        if not (np.isfinite(diagonal).all() and diagonal.all()):
            raise ValueError("expected an invertible matrix, got a singular one")
        new = (
            np.argsort(permutation),
            np.tril(lower, -1),
            np.triu(upper, 1),
            np.log(np.abs(diagonal)),
            np.sign(diagonal),
        )
        for ours, part in zip(self._parts(canvas), new, strict=True):
            ours[...] = part

    def take(self, canvas: Canvas) -> np.ndarray:
        rows, *factors = self._parts(canvas)
        lower, upper, log_scale, sign = (np.asarray(factor, np.float64) for factor in factors)
        weight = np.empty_like(lower)
        weight[rows] = (np.tril(lower, -1) + np.eye(len(rows))) @ (
            np.triu(upper, 1) + np.diag(sign * np.exp(log_scale))
        )
        if self.order is not None:
            back = np.argsort(self.order)
            weight = weight[back][:, back]
        return weight.T


@dataclass(frozen=True)
class Expected:
    """A number that the config or the flow's state fixes: it must be that in a file."""

    value: np.ndarray

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        if not np.array_equal(tensor, self.value):
            raise ValueError(f"expected {self.value.tolist()}, got {tensor.tolist()}")

    def take(self, canvas: Canvas) -> np.ndarray:
        return self.value


@dataclass(frozen=True)
class DataConstant:
    """A constant of the data for every channel, of which the tensor has the first: it must be that of the config."""

    variable: nnx.Variable
    values: tuple[float, ...]
    size: int

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        Expected(self.take(canvas)).put(canvas, tensor)
        canvas[self.variable][...] = self.values

    def take(self, canvas: Canvas) -> np.ndarray:
        return np.asarray(self.values[: self.size], np.float32)


@dataclass(frozen=True)
class Ignored:
    """What training kept for itself, or what is computed anew: not read; written as a fresh model has it."""

    value: np.ndarray

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None: ...

    def take(self, canvas: Canvas) -> np.ndarray:
        return self.value


@dataclass(frozen=True)
class Norm:
    """The norm of a layer when it was last applied: not read, and computed to be written."""

    linear: LipschitzLinear
    row: int | None

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None: ...

    def take(self, canvas: Canvas) -> np.ndarray:
        graphdef, state = nnx.split(self.linear)
        if self.row is not None:
            state = jax.tree.map(lambda leaf: leaf[self.row], state)
        return np.asarray(nnx.merge(graphdef, state).norm())


def entries(flow: ResidualFlow, *, dropout: bool = False) -> list[Entry]:
    """Every tensor of the model that has the flow's config, in its own order.

    Args:
      flow: of a config that the scripts can build, as `interop.torch.config` makes them.
      dropout: whether the model has a dropout in its blocks, which shifts the numbers of the layers behind it.
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
    """The order with ours[i] = theirs[order[i]] of flattened images; shape: (H, W, C)."""
    height, width, channels = shape
    return np.arange(math.prod(shape)).reshape(channels, height, width).transpose(1, 2, 0).ravel()


def _row(array: np.ndarray, row: int | None) -> np.ndarray:
    """The array, or one of its rows, as a view."""
    return array if row is None else array[row, ...]


def _with_aliases(found: list[Entry]) -> list[Entry]:
    """Learned orders that several layers share are known to the averages by the first of their names."""
    first: dict[tuple[int, int | None], str] = {}
    return [
        replace(entry, alias=first.setdefault((id(entry.place.variable), entry.place.row), entry.name))
        if isinstance(entry.place, Same)
        else entry
        for entry in found
    ]


def _slots(bijectors: Any, row: int | None = None) -> Iterator[tuple[Bijector, int | None]]:
    """Every layer in order, with its row if it is part of a stack."""
    for bijector in bijectors:
        if isinstance(bijector, Chain):
            yield from _slots(bijector.bijectors, row)
        elif isinstance(bijector, ResidualStack):
            for n in range(bijector.depth):
                yield from _slots(bijector.steps.bijectors, n)
        else:
            yield bijector, row


def _scale_entries(flow: ResidualFlow, scale: Chain, prefix: str, *, is_first: bool, dropout: bool) -> list[Entry]:
    """Those of one scale; layers that have a place in the model's chain are counted."""
    config, found, place = flow.config, [], 0
    squeezes = int(is_first and isinstance(config, ImageFlowConfig) and config.scales.squeeze_first)
    image: tuple[int, int, int] | None = None  # (H, W, C) of what is flattened
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
        name, order = f"{name}.fc_module", channels_last(image or shape)
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
    return Entry(name, (size,), Same(variable, row, (size,), orders=(order,)), is_parameter)


def _scalar(name: str, variable: nnx.Variable, row: int | None, shape: tuple[int, ...] = ()) -> Entry:
    return Entry(name, shape, Same(variable, row, shape, tuple(range(len(shape))), (None,) * len(shape)), True)


def _invertible_linear(
    layer: InvertibleLinear, row: int | None, name: str, image: tuple[int, int, int] | None
) -> list[Entry]:
    size = layer.lower.shape[-1]
    order = channels_last(image) if image else None
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
    """Constants of the data, which the script applies to the first channels alone behind a squeeze."""
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
    behind_maxmin = contraction.activation.name == "maxmin"

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
        order_in = channels_last(image) if image and n == 0 else None
        if behind_maxmin and (n or contraction.preactivation):
            order_in = _maxima_beside_minima(linear.kernel.shape[-2])
        order_out = channels_last(image) if image and n == last else None
        found += _lipschitz_linear(linear, row, f"{prefix}.{next(numbers)}", order_in, order_out)
        if contraction.centers:
            found += _centering(contraction.centers[n], row, f"{prefix}.{next(numbers)}")
        if n < last:
            activation()
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
        Entry(f"{name}.weight", shape, Same(linear.kernel, row, shape, axes, orders), is_parameter=True),
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
            order_in, order_out = channels_last((*size, size_in)), channels_last((*size, size_out))
            size_in, size_out = order_in.size, order_out.size
    found.append(_vector(f"{name}.u", linear.u, row, size_out, order_out))
    found.append(_vector(f"{name}.v", linear.v, row, size_in, order_in))
    return found


def _classifier(classifier: Classifier) -> list[Entry]:
    found = []
    for n, head in enumerate(classifier.heads):
        name = f"classification_heads.{n}"
        *window, size_in, size = head.kernel.shape
        shape = (size, size_in, *window)
        found.append(Entry(f"{name}.0.weight", shape, Same(head.kernel, None, shape, (2, 3, 1, 0), (None,) * 4), True))
        found.append(_vector(f"{name}.0.bias", head.bias, None, size))
        found += _scale_and_bias(head.norm, None, f"{name}.1", size, None)
    shape = classifier.kernel.shape[::-1]
    place = Same(classifier.kernel, None, shape, (1, 0), (None, None))
    return [
        *found,
        Entry("logit_layer.weight", shape, place, is_parameter=True),
        _vector("logit_layer.bias", classifier.bias, None, shape[0]),
    ]
