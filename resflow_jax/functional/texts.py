"""Short texts of settings, numbers and arrays, for the `repr` of results and layers.

These functions do not fail for any object. An array without known values, such as a traced one, is described by dtype
and shape, and any other unknown object by its type. Numbers are rounded. Upper bounds are rounded up.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, Context
from typing import Any

import jax
import numpy as np

from resflow_jax.functional.activations import Activation

_LONGEST = 60  # largest number of characters for the text of an unknown object
_MOST = 8  # largest number of elements of a tuple that is shown completely
_SIX_DIGITS_UP = Context(prec=6, rounding=ROUND_CEILING)
_IN_PLACE = {"event_shape", "condition_shape"}  # optional arguments that follow from other arguments
_NO_SETTINGS = {"self", "rngs", "key"}


def values_of(array: Any) -> np.ndarray | None:
    """The values of an array or a number on the host, or None if they are unknown.

    They are unknown for a tracer, a shape without values, an array that was donated or lies on other processes, and an
    object that is not an array.
    """
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array | np.ndarray | np.generic | float | int):
        return None
    try:
        values = np.asarray(array)
        return values if values.dtype == bool else values.astype(np.float64)
    except Exception:  # the array is deleted, lies on another process, or has no numbers (PRNG keys)
        return None


def is_number(value: Any) -> bool:
    """Whether this is a single number with a known value."""
    values = values_of(value)
    return values is not None and values.ndim == 0


def described(value: Any) -> str:
    """The dtype and shape of an array, such as "float32[64,2]", or the text of another value."""
    if hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"<{type(value).__name__}>" if hasattr(value, "dtype") else setting(value)


def fields_text(value: tuple) -> str:
    """`Name(field=dtype[shape], ...)` for a named tuple with unknown values."""
    named = zip(value._fields, value, strict=True)
    return f"{type(value).__name__}({', '.join(f'{name}={described(field)}' for name, field in named)})"


def number(value: float) -> str:
    """A number with four significant digits."""
    return f"{float(value):.4g}"


def upper(value: float) -> str:
    """An upper bound with six significant digits, rounded up. A bound below 1 stays below 1: "1 - 1e-07"."""
    value = float(value)
    text = f"{value:.6g}"
    if float(text) < value:
        text = f"{_SIX_DIGITS_UP.create_decimal_from_float(value).normalize():g}"
    return f"1 - {1 - value:.1e}" if value < 1 <= float(text) else text


def span(values: np.ndarray, text: Callable[[float], str] = number) -> str:
    """The range of values: one number if the texts of the least and the largest agree, else "least to largest"."""
    ends = [text(values.min()), text(values.max())]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def count(number: int, what: str) -> str:
    """A number with a noun, such as "1 block" and "1,200 blocks"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def setting(value: Any) -> str:
    """The text of a constructor's argument, on one line."""
    if isinstance(value, Activation):
        return value.name
    if isinstance(value, bool | int | str | type(None)):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        texts = [*map(setting, value)] if len(value) <= _MOST else [*map(setting, value[:3]), "...", setting(value[-1])]
        return listed("()", texts, is_tuple=True)
    if isinstance(value, type) or inspect.isfunction(value):
        return value.__name__
    try:
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            return described(value)
        if dataclasses.is_dataclass(value):
            text = constructor(value, sizes=False)
        else:  # the default repr has an address, which is not informative
            text = (
                f"<{type(value).__name__}>"
                if type(value).__repr__ is object.__repr__
                else " ".join(repr(value).split())
            )
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"<{type(value).__name__}>"


def listed(brackets: str, texts: Iterable[str], *, is_tuple: bool = False) -> str:
    """Texts in brackets."""
    texts = list(texts)
    return f"{brackets[0]}{', '.join(texts)}{',' if is_tuple and len(texts) == 1 else ''}{brackets[1]}"


def constructor(
    value: Any, text: Callable[[Any], str] = setting, /, *, sizes: bool = True, **instead: str | None
) -> str:
    """`Name(...)` for an object, from the attributes that have the names of its constructor's arguments.

    Arguments are shown if they differ from their default.

    Args:
      value: the object.
      text: function from the value of an argument to its text.
      sizes: whether integers and tuples of integers are always shown.
      instead: texts of arguments by name, which replace the attributes; None omits an argument.
    """
    texts, in_order = [], True
    for parameter in _parameters(type(value)):
        name, is_optional = parameter.name, parameter.default is not parameter.empty
        found = instead[name] if name in instead else _attribute_text(value, parameter, text, sizes)
        if found is None:
            in_order = False
            continue
        in_order = in_order and not is_optional and parameter.kind is not parameter.KEYWORD_ONLY
        texts.append(found if in_order else f"{name}={found}")
    return f"{type(value).__name__}({', '.join(texts)})"


def _parameters(cls: type) -> list[inspect.Parameter]:
    """The parameters of a class's constructor, except random streams and keys."""
    try:
        parameters = inspect.signature(cls.__init__).parameters.values()
    except (TypeError, ValueError):
        return []
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p for p in parameters if p.kind not in several and p.name not in _NO_SETTINGS]


def _attribute_text(value: Any, parameter: inspect.Parameter, text: Callable[[Any], str], sizes: bool) -> str | None:
    """The text of the attribute with a parameter's name; None if it is missing or the default."""
    try:
        found = getattr(value, parameter.name)
    except Exception:  # no such attribute, or a property of an incomplete object
        return None
    is_optional = parameter.default is not parameter.empty
    if is_optional and parameter.name in _IN_PLACE:
        return None
    is_shown_size = sizes and _is_size(found) and _is_size(parameter.default)
    if is_optional and not is_shown_size and _is_default(found, parameter.default):
        return None
    return text(found)


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, Activation) and isinstance(default, str):
        return value.name == default
    if isinstance(value, bool | int | float | str | tuple | type(None)) or dataclasses.is_dataclass(value):
        try:
            return bool(value == default)
        except Exception:  # a comparison of arrays inside
            return False
    return value is default


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_size, value))
    return isinstance(value, int) and not isinstance(value, bool)
