"""The `repr` of layers and of flows: a line for a layer, a table for a composition.

    Chain: events (6,), 15,372 parameters
      layer                                                     event shape  parameters  Lip(g) bound
      ActNorm((6,))                                             (6,)                 12
      ResidualBlock(LipschitzMLP(6, hidden=(64, 64)))           (6,)              5,000  0.941192

A layer is shown by the arguments of its constructor. A text that fits on a line is one line; otherwise its parts
follow, indented. Only shapes and sizes are computed: the network does not run, and no array is read. The last column is
the bound that the coefficients of the contractions set, and that `certify` proves. "not proved" marks a bound that the
user states. The parameters of a stack are those of all its layers.

A class of modules may define `_repr_text`, `_repr_parts` and `_repr_promise`, as `Module` describes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from resflow_jax.functional.texts import constructor, count, listed, setting, upper

Shape = tuple[int, ...]

_WIDTH = 100  # of a line's text; a longer composition is split into lines for its parts, other layers are cut
_DEEPEST = 6  # levels of nested modules that a line shows


class Part(NamedTuple):
    """A module that has a line of its own in the table of another.

    Attributes:
      module: the module.
      shape: shape of the events that it takes; None if unknown.
      label: start of the line.
    """

    module: Any
    shape: Shape | None = None
    label: str = ""


class Parts(NamedTuple):
    """The content of the table of a module.

    Attributes:
      heading: the name above the parts.
      parts: the modules that have lines of their own.
      facts: texts for the head of the table, instead of the shapes of events.
    """

    heading: str
    parts: list[Part]
    facts: tuple[str, ...] = ()


class Promise(NamedTuple):
    """The bound on Lip(g), None if there is none; `is_word`: whether the user states it, so that it is not proved."""

    bound: float | None
    is_word: bool


class _Row(NamedTuple):
    text: str
    shape: str
    parameters: str
    promise: str


_HEAD = _Row("  layer", "event shape", "parameters", "Lip(g) bound")


def module_text(module: nnx.Module) -> str:
    """The text of a module; it never fails."""
    try:
        parts = module._repr_parts(getattr(module, "event_shape", None))
        return _table(module, parts) if parts and parts.parts else _line(module)
    except Exception:  # a module may be incomplete, or hold something other than arrays
        return f"{type(module).__name__}(...)"


def short_text(module: Any, depth: int = 0) -> str:
    """A module, or any setting, on one line."""
    if isinstance(module, nnx.List | list) or (
        isinstance(module, tuple) and any(isinstance(m, nnx.Module) for m in module)
    ):
        return listed("[]", (short_text(part, depth) for part in module))
    if not isinstance(module, nnx.Module):
        return setting(module)
    if depth == _DEEPEST:
        return f"{type(module).__name__}(...)"
    text = getattr(module, "_repr_text", None)
    try:
        inside = partial(short_text, depth=depth + 1)
        return constructor(module, inside) if text is None else text(inside)
    except Exception:
        return f"{type(module).__name__}(...)"


def parameters_text(module: nnx.Module) -> str:
    """The number of a module's parameters, for a stack of all its layers; "?" if sizes are unknown."""
    number = 0
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            for leaf in jax.tree.leaves(node.get_raw_value()):
                if not isinstance(getattr(leaf, "shape", None), tuple):
                    return "?"
                number += math.prod(leaf.shape)
    return f"{number:,}"


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), or None where it fails or an argument is None: an unknown shape stays unknown."""
    if any(arg is None for arg in args):
        return None
    try:
        return function(*args)
    except Exception:
        return None


def _line(module: nnx.Module) -> str:
    number = parameters_text(module)
    facts = [count(int(number.replace(",", "")), "parameter") if number not in ("?", "0") else ""]
    promise = _promise_text(module)
    facts += [f"Lip(g) bound {promise}"] if promise else []
    facts = [fact for fact in facts if fact]
    return short_text(module) + (f"  # {', '.join(facts)}" if facts else "")


def _table(module: nnx.Module, parts: "Parts") -> str:
    rows = [_HEAD] + [row for part in parts.parts for row in _rows(part, 1)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row.text:<{widths[0]}}  {row.shape:<{widths[1]}}  {row.parameters:>{widths[2]}}  {row.promise}".rstrip()
        for row in rows
    ]
    facts = parts.facts or (f"events {_shapes(module, getattr(module, 'event_shape', None))}",)
    facts = [*facts, f"{parameters_text(module)} parameters"]
    return "\n".join([f"{parts.heading}: {', '.join(facts)}", *lines])


def _rows(part: Part, depth: int) -> list[_Row]:
    module, shape, label = part
    indent = "  " * depth + label
    text, parts = short_text(module), None
    if len(indent + text) > _WIDTH and hasattr(module, "_repr_parts"):
        parts = module._repr_parts(shape)
    if not parts:
        text = text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
        return [_Row(indent + text, _shapes(module, shape), parameters_text(module), _promise_text(module))]
    rows = [_Row(indent + parts.heading, _shapes(module, shape), parameters_text(module), "")]
    for inside in parts.parts:
        rows += _rows(inside, depth + 1)
    return rows


def _shapes(module: Any, shape: Shape | None) -> str:
    """The shapes of events that enter and leave, as far as they are known; one shape if they are equal."""
    if shape is None:
        return "?" if hasattr(module, "output_shape") else ""
    after = attempt(module.output_shape, shape) if hasattr(module, "output_shape") else shape
    shapes = [str(tuple(shape)), "?" if after is None else str(tuple(after))]
    return shapes[0] if shapes[0] == shapes[1] else " -> ".join(shapes)


def _promise_text(module: nnx.Module) -> str:
    """The largest bound of the contractions inside; empty if there are none."""
    nodes = (node for _, node in nnx.iter_modules(module))
    found = [node._repr_promise() for node in nodes if hasattr(node, "_repr_promise")]
    found = [promise for promise in found if promise is not None]
    if not found:
        return ""
    if any(promise.bound is None for promise in found):
        return "no bound"
    bound = upper(max(promise.bound for promise in found))
    return f"{bound}, not proved" if any(promise.is_word for promise in found) else bound
