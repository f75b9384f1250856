"""Where the numbers of a tensor of a PyTorch checkpoint are in a flow: one class for each relation between them.

Each `Place` has `put`, which writes a tensor into variables, and `take`, which gives the tensor for variables. Both
work on a `Canvas`, which has copies of the variables on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from resflow_jax.functional.checks import shown
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.lipschitz import LipschitzLinear

# Order of an axis, ours[i] = theirs[order()[i]]; None where both have the same order. It is a function, because the
# sizes of entries are compared with those in a file before anything of that size is made.
Order = Callable[[], np.ndarray] | None


class Canvas:
    """Copies of a flow's variables on the host, to be read and written; `commit` puts them back.

    The copies of an abstract flow (from `nnx.eval_shape`) start as zeros.
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
        """Gives every variable that was asked for its copy."""
        for variable, array in self._arrays.values():
            variable.set_value(jnp.asarray(array))


class Place(Protocol):
    """Where the numbers of a tensor are in a flow."""

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        """Writes the tensor into the variables. Raises ValueError, with what was expected, if it does not fit."""

    def take(self, canvas: Canvas) -> np.ndarray:
        """Returns the tensor for the variables."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
      name: its key in the state_dict.
      shape: its shape there; None if the shape does not matter.
      place: where its numbers are in the flow.
      is_parameter: whether it is a parameter there. Parameters have averages.
      alias: its name in the list of averages, where one parameter has several names.
    """

    name: str
    shape: tuple[int, ...] | None
    place: Place
    is_parameter: bool = False
    alias: str | None = None

    @property
    def averaged_name(self) -> str:
        """Its key in the list of averages."""
        return self.alias or self.name


@dataclass(frozen=True)
class Transposed:
    """A variable, or one row of it in a stack, as a tensor of this shape, transposed, reordered and reshaped.

    Attributes:
      variable: the variable.
      row: its row, where it is that of a stack of layers; None for the whole variable.
      shape: shape of the tensor.
      axes: axes of the tensor in the order of the variable's.
      orders: order of each axis of the variable.
    """

    variable: nnx.Variable
    row: int | None
    shape: tuple[int, ...]
    axes: tuple[int, ...] = (0,)
    orders: tuple[Order, ...] = (None,)

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        tensor = tensor.transpose(self.axes)
        for axis, order in enumerate(self.orders):
            tensor = tensor if order is None else np.take(tensor, order(), axis)
        ours = _row(canvas[self.variable], self.row)
        ours[...] = tensor.reshape(ours.shape)

    def take(self, canvas: Canvas) -> np.ndarray:
        ours = _row(canvas[self.variable], self.row)
        tensor = ours.reshape([self.shape[axis] for axis in self.axes])
        for axis, order in enumerate(self.orders):
            tensor = tensor if order is None else np.take(tensor, np.argsort(order()), axis)
        return tensor.transpose(np.argsort(self.axes))


@dataclass(frozen=True)
class ActNormPart:
    """The weight or the bias of y = (x + bias) exp(weight): the log_scale of an `ActNorm`, and minus its center.

    Reading sets the std to 1 and the shift to 0. Writing folds those of the flow into weight and bias.
    """

    layer: ActNorm
    part: Literal["weight", "bias"]
    row: int | None
    order: Order

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        layer = self.layer
        tensor = tensor if self.order is None else tensor[self.order()]
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
        return tensor if self.order is None else tensor[np.argsort(self.order())]


@dataclass(frozen=True)
class Factored:
    """The matrix of an `InvertibleLinear`, [O, I]. Its transpose is factored as P L U in float64 to be read."""

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
            order = self.order()
            weight = weight[order][:, order]
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
            back = np.argsort(self.order())
            weight = weight[back][:, back]
        return weight.T


@dataclass(frozen=True)
class Expected:
    """A tensor whose value the config or the state of the flow fixes; a file must have the same."""

    value: np.ndarray

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None:
        if not np.array_equal(tensor, self.value):
            raise ValueError(f"expected {shown(self.value.tolist())}, got {shown(tensor.tolist())}")

    def take(self, canvas: Canvas) -> np.ndarray:
        return self.value


@dataclass(frozen=True)
class DataConstant:
    """A constant of the data for every channel. The tensor has those of the first channels; the config has all."""

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
    """A tensor that only training uses, or that is computed again. It is not read; a fresh model's value is written."""

    value: np.ndarray

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None: ...

    def take(self, canvas: Canvas) -> np.ndarray:
        return self.value


@dataclass(frozen=True)
class Norm:
    """The norm of a layer when it was last applied. It is not read; it is computed to be written."""

    linear: LipschitzLinear
    row: int | None

    def put(self, canvas: Canvas, tensor: np.ndarray) -> None: ...

    def take(self, canvas: Canvas) -> np.ndarray:
        graphdef, state = nnx.split(self.linear)
        if self.row is not None:
            state = jax.tree.map(lambda leaf: leaf[self.row], state)
        return np.asarray(nnx.merge(graphdef, state).norm())


def _row(array: np.ndarray, row: int | None) -> np.ndarray:
    """The array, or one of its rows, as a view."""
    return array if row is None else array[row, ...]
