"""Short texts of settings, numbers and arrays: what the `repr` of results and of layers is made of.

Nothing here fails, whatever it is given: an array whose values are not known, as a traced one, is described by dtype
and shape, any other object by its type. Numbers are rounded; bounds are rounded away from what they bound.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, Context
from typing import Any

import jax
import numpy as np

from resflow_jax.functional.activations import Activation

_LONGEST = 60  # characters of a setting that is no array, number, name or tuple of such
_MOST = 8  # elements of a tuple that are all shown
_SIX_DIGITS_UP = Context(prec=6, rounding=ROUND_CEILING)
_IN_PLACE = {"event_shape", "condition_shape"}  # optional arguments that say what other arguments say too
_NO_SETTINGS = {"self", "rngs", "key"}


def values_of(array: Any) -> np.ndarray | None:
    """The values of an array or a number on the host, None where they are not known.

    That is so of a tracer, a shape without values, an array that was donated or lies on other processes, and an object
    that is no array.
    """
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array | np.ndarray | np.generic | float | int):
        return None
    try:
        values = np.asarray(array)
        return values if values.dtype == bool else values.astype(np.float64)
    except Exception:  # the array is deleted, lies elsewhere, or holds what is no number, as PRNG keys
        return None


def is_number(value: Any) -> bool:
    """Whether it is one number, and known."""
    values = values_of(value)
    return values is not None and values.ndim == 0


def described(value: Any) -> str:
    """dtype[shape] of anything that has both, as "float32[64,2]", or what the value is."""
    if hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"<{type(value).__name__}>" if hasattr(value, "dtype") else setting(value)


def fields_text(value: tuple) -> str:
    """`Name(field=dtype[shape], ...)` of a named tuple whose values are not all known."""
    named = zip(value._fields, value, strict=True)
    return f"{type(value).__name__}({', '.join(f'{name}={described(field)}' for name, field in named)})"


def number(value: float) -> str:
    """Four significant digits."""
    return f"{float(value):.4g}"


def upper(value: float) -> str:
    """An upper bound with six significant digits, rounded up; below 1 also where that would give 1."""
    value = float(value)
    text = f"{value:.6g}"
    if float(text) < value:
        text = f"{_SIX_DIGITS_UP.create_decimal_from_float(value).normalize():g}"
    return f"1 - {1 - value:.1e}" if value < 1 <= float(text) else text


def span(values: np.ndarray, text: Callable[[float], str] = number) -> str:
    """One number where all are equal in this text, else "least to largest"."""
    ends = [text(values.min()), text(values.max())]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def count(number: int, what: str) -> str:
    """A number of things, as "1 block" and "1,200 blocks"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def setting(value: Any) -> str:
    """An argument of a constructor, on one line."""
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
        else:  # an address says nothing
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
    """`Name(...)` of an object, from the arguments of its constructor that it has as attributes.

    Arguments are there where they are not the default; with `sizes` whole numbers and tuples of them always.

    Args:
      value: the object.
      text: of one argument.
      sizes: whether sizes are always shown.
      instead: texts of arguments by name, in the place of the attributes; None leaves one out.
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
    """The parameters of a class's constructor that can be settings."""
    try:
        parameters = inspect.signature(cls.__init__).parameters.values()
    except (TypeError, ValueError):
        return []
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p for p in parameters if p.kind not in several and p.name not in _NO_SETTINGS]


def _attribute_text(value: Any, parameter: inspect.Parameter, text: Callable[[Any], str], sizes: bool) -> str | None:
    """The attribute of a parameter's name; None where there is none, or it is the default."""
    try:
        found = getattr(value, parameter.name)
    except Exception:  # there is none, or it is a property of an object that is half made
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
        except Exception:  # of arrays inside
            return False
    return value is default


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_size, value))
    return isinstance(value, int) and not isinstance(value, bool)
