"""The condition of a map g(params, x, condition): any pytree of arrays with one row for each example of x.

Without a condition it is None, and g takes (params, x).
"""

import inspect
from typing import Any

import jax
from jax.tree_util import keystr

from resflow_jax.functional.checks import as_array, check_callable

Array = jax.Array


def as_condition(condition: Any, name: str, x: Array) -> Any:
    """Converts the leaves of a condition to JAX arrays [B, ...] of any dtype, where B is the batch size of x.

    Args:
      condition: any pytree, or None.
      name: name of the argument x, for errors.
      x: array [B, ...].

    Raises:
      ValueError: if a leaf is not an array, or has another number of rows than x.
    """

    def of_leaf(path, leaf):
        leaf_name = f"condition{keystr(path)}"
        leaf = as_array(leaf_name, leaf, "an array [B, ...]")
        if leaf.ndim < 1 or leaf.shape[0] != x.shape[0]:
            raise ValueError(
                f"{leaf_name}: expected {x.shape[0]} rows, one for each example of {name}, got shape {leaf.shape}"
            )
        return leaf

    if hasattr(condition, "__jax_array__"):  # a variable of Flax, which is also a pytree
        return of_leaf((), condition)
    return jax.tree_util.tree_map_with_path(of_leaf, condition)


def check_map(g: Any, condition: Any) -> None:
    """Raises ValueError unless g takes (params, x), or (params, x, condition) where there is a condition."""
    signature = _signature("g", g)
    if signature is None:
        return
    if condition is None and not _takes(signature, 2):
        if _takes(signature, 3):
            raise ValueError(f"condition: expected a condition, since g takes {signature}, got None")
        raise ValueError(f"g: expected a function of (params, x), got the signature {signature}")
    if condition is not None and not _takes(signature, 3):
        raise ValueError(f"g: expected a function of (params, x, condition), got the signature {signature}")


def check_arguments(name: str, function: Any, arguments: tuple[str, ...]) -> None:
    """Raises ValueError unless a function or a module can be called with these arguments, by position."""
    signature = _signature(name, function)
    if signature is not None and not _takes(signature, len(arguments)):
        raise ValueError(
            f"{name}: expected a callable with the arguments ({', '.join(arguments)}), got the signature {signature}"
        )


def _signature(name: str, function: Any) -> inspect.Signature | None:
    """The signature of a callable; None for builtins and other objects without one. ValueError if not callable."""
    check_callable(name, function)
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def arguments(x: Array, condition: Any) -> tuple[Any, ...]:
    """The arguments of g after its parameters."""
    return (x,) if condition is None else (x, condition)
