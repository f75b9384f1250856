"""Conditions c of p(x | c): which layers take one, of which shape, and in which shapes a caller may pass it.

A layer's `condition_shape` is None if it takes no condition, the shape of one example's condition if that is known,
and ANY if any condition fits, as in a module of the user.
"""

from collections.abc import Iterable
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import as_float_array

ANY = ...
ConditionShape = tuple[int, ...] | EllipsisType | None


def common_condition_shape(shapes: Iterable[tuple[str, ConditionShape]]) -> ConditionShape:
    """The condition shape of a composition, from the names and the condition shapes of its parts.

    Raises:
      ValueError: if two parts take conditions of different shapes; it names both.
    """
    found: ConditionShape = None
    whose = ""
    for name, shape in shapes:
        if shape is None:
            continue
        if found is None or found is ANY:
            found, whose = shape, name
        elif shape is not ANY and shape != found:
            raise ValueError(
                f"condition: expected one shape for all layers, got {found} in {whose} and {shape} in {name}"
            )
    return found


def as_condition(condition: Any, shape: ConditionShape, batch: tuple[int, ...], dtype: Any = None) -> jax.Array | None:
    """A caller's condition as an array [*batch, *shape], or None if no part takes one.

    Args:
      condition: floats [*shape], one for all examples, or [*batch, *shape], one for each; a batch axis of size one is
        broadcast.
      shape: the condition shape of the layers.
      batch: leading axes of the examples.
      dtype: dtype of the result, that of the examples; None keeps the condition's own.

    Raises:
      ValueError: for a condition that is missing, not expected, or of another shape or dtype.
    """
    if shape is None:
        if condition is not None:
            raise ValueError(f"condition: expected None, since no part takes a condition, got {_described(condition)}")
        return None
    text = "..." if shape is ANY else ", ".join(map(str, shape))
    batch_text = ", ".join(map(str, batch))
    expected = f"floats [{batch_text}, {text}], one for each example"
    if shape is not ANY:
        expected += f", or [{text}], one for all"
    if condition is None:
        raise ValueError(f"condition: expected {expected}, got None")
    own_dtype = getattr(condition, "dtype", None)
    if own_dtype is not None and (jnp.issubdtype(own_dtype, jnp.integer) or jnp.issubdtype(own_dtype, jnp.bool_)):
        raise ValueError(f"condition: expected {expected}, got dtype {own_dtype}; for classes use jax.nn.one_hot")
    condition = as_float_array("condition", condition)
    condition = condition if dtype is None else condition.astype(dtype)
    if shape is ANY:
        own = condition.shape[len(batch) :]
        remedy = "; to share one among all examples, give its shape, as in ResidualBlock(module, condition_shape=...)"
    else:
        own, remedy = tuple(shape), ""
        if condition.shape == own:
            return jnp.broadcast_to(condition, (*batch, *own))
    leading = condition.shape[: condition.ndim - len(own)]
    fits = len(leading) == len(batch) and all(a in (1, b) for a, b in zip(leading, batch, strict=True))
    if not fits or condition.shape[len(leading) :] != own:
        raise ValueError(f"condition: expected {expected}, got shape {condition.shape}{remedy}")
    return jnp.broadcast_to(condition, (*batch, *own))


def _described(condition: Any) -> str:
    return f"shape {condition.shape}" if hasattr(condition, "shape") else repr(condition)
