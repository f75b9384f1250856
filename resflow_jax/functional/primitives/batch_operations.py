"""Operations of JAX that combine rows of a batch, or depend on the place of a row.

Each is seen twice, in the programs of one function for two batch sizes. The axis of the batch is where the shapes of an
argument differ. Operations that are not listed here, such as elementwise ones, count as operations on each row.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Axes = set[int]


def is_along_batch(p: Any, q: Any) -> bool:
    """Whether an operation, in the programs for two batch sizes, looks along the axis of the batch.

    A scan over rows does if it carries something from one row to the next.
    """
    name = p.primitive.name
    if name == "scan":
        return p.params["length"] != q.params["length"] and _has_carry(p)
    batch_axes = [_batch_axes(a, b) for a, b in zip(p.invars, q.invars, strict=True)]
    if not any(batch_axes):
        return False
    check = _CHECKS.get(name) or next((of for start, of in _STARTS.items() if name.startswith(start)), None)
    return check is not None and check(p, batch_axes)


def _has_carry(scan: Any) -> bool:
    """Whether a scan returns a carry, which has the shape that its body gives it; other results have an axis more."""
    results, of_body = scan.outvars, scan.params["jaxpr"].jaxpr.outvars
    return len(results) != len(of_body) or any(
        a.aval.ndim == b.aval.ndim for a, b in zip(results, of_body, strict=True)
    )


def _batch_axes(p: Any, q: Any) -> Axes:
    """The axes in which two arguments differ in size."""
    shapes = (getattr(of.aval, "shape", ()) for of in (p, q))
    return {axis for axis, (m, n) in enumerate(zip(*shapes, strict=False)) if m != n}


def _of_axes(name: str) -> Callable[[Any, list[Axes]], bool]:
    """A check of operations that look along the axes, or the one axis, that a parameter has."""

    def check(p: Any, batch_axes: list[Axes]) -> bool:
        axes = set(np.atleast_1d(p.params[name]).tolist())
        return any(axes & of_argument for of_argument in batch_axes)

    return check


def _slice(p: Any, batch_axes: list[Axes]) -> bool:
    shape, strides = p.invars[0].aval.shape, p.params["strides"]
    is_whole = [
        (start, limit) == (0, size)
        for start, limit, size in zip(p.params["start_indices"], p.params["limit_indices"], shape, strict=True)
    ]
    return any(not is_whole[axis] or (strides is not None and strides[axis] != 1) for axis in batch_axes[0])


def _pad(p: Any, batch_axes: list[Axes]) -> bool:
    return any(any(p.params["padding_config"][axis]) for axis in batch_axes[0])


def _dynamic_slice(p: Any, batch_axes: list[Axes]) -> bool:
    return any(p.params["slice_sizes"][axis] != p.invars[0].aval.shape[axis] for axis in batch_axes[0])


def _gather(p: Any, batch_axes: list[Axes]) -> bool:
    of_rows = set(p.params["dimension_numbers"].operand_batching_dims)
    sizes, shape = p.params["slice_sizes"], p.invars[0].aval.shape
    return any(sizes[axis] != shape[axis] for axis in batch_axes[0] - of_rows)


def _dynamic_update_slice(p: Any, batch_axes: list[Axes]) -> bool:
    return any(p.invars[1].aval.shape[axis] != p.invars[0].aval.shape[axis] for axis in batch_axes[0])


def _scatter(p: Any, batch_axes: list[Axes]) -> bool:
    return bool(batch_axes[0] & set(p.params["dimension_numbers"].scatter_dims_to_operand_dims))


def _dot_general(p: Any, batch_axes: list[Axes]) -> bool:
    contracted, _ = p.params["dimension_numbers"]
    return any(axes & set(of) for axes, of in zip(batch_axes, contracted, strict=True))


def _convolution(p: Any, batch_axes: list[Axes]) -> bool:
    return bool(batch_axes[1] or batch_axes[0] - {p.params["dimension_numbers"].lhs_spec[0]})


def _window(p: Any, batch_axes: list[Axes]) -> bool:
    return any(p.params["window_dimensions"][axis] != 1 for axis in batch_axes[0])


def _last_axis(p: Any, batch_axes: list[Axes]) -> bool:
    return p.invars[0].aval.ndim - 1 in batch_axes[0]


_CHECKS: dict[str, Callable[[Any, list[Axes]], bool]] = {
    "concatenate": _of_axes("dimension"),
    "conv_general_dilated": _convolution,
    "correlate": lambda p, batch_axes: bool(batch_axes[0] or batch_axes[1]),  # of `primitives.convolution`
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "pad": _pad,
    "reduce": _of_axes("dimensions"),
    "reduce_precision": lambda p, batch_axes: False,
    "reduce_scatter": lambda p, batch_axes: True,
    "reduce_window": _window,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "rev": _of_axes("dimensions"),
    "slice": _slice,
    "sort": _of_axes("dimension"),
    "split": _of_axes("axis"),
    "top_k": _last_axis,
}
# by the beginning of a name
_STARTS = {"reduce_": _of_axes("axes"), "arg": _of_axes("axes"), "cum": _of_axes("axis"), "scatter": _scatter}
