"""Checks of arguments. Each raises a ValueError of the form `name: expected ..., got ...`."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST = 2**63 - 1  # of the integers that JAX and NumPy have
_LONGEST = 100  # characters of a name in an error
_ERROR = 1000  # most characters of an error
_LARGEST_FLOAT = sys.float_info.max
_SHOWN = 200  # most characters of a value in an error


def shown(value: Any) -> str:
    """The `repr` of a value for an error, cut off where it is long. It has no control characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested as deep as Python can call, or an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def error_text(error: BaseException) -> str:
    """The text of an error about a file, cut off where it is long, and without control characters of the file."""
    text = str(error)[:_ERROR]
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return text if len(str(error)) <= _ERROR else f"{text}..."


def names_text(names: Iterable[str], most: int = 5) -> str:
    """The first few names in alphabetical order, with their control characters escaped, and the number of others."""
    names = sorted(names)
    texts = [name if name.isprintable() and len(name) <= _LONGEST else f"{name[:_LONGEST]!r}" for name in names[:most]]
    return ", ".join(texts) + (f" and {len(names) - most} more" if len(names) > most else "")


def as_float_batch(name: str, x: Any, event_shape: tuple[int, ...] | None = None, *, least: int = 1) -> jax.Array:
    """Converts x to a JAX array [B, ...], or [B, *event_shape] if that is given, with B >= least. x may be traced.

    A NumPy array is copied to the machine's byte order and to the dtype that JAX uses for it (float64 becomes float32
    unless 64-bit types are enabled). A masked array without masked values is taken as its data.

    Raises:
      ValueError: unless x is a float array of this shape. The message says how to convert other arrays.
    """
    x = _float_array(name, x, f"a float array [B, {_sizes(event_shape)}]")
    if x.ndim < 1 or (event_shape is not None and x.shape[1:] != tuple(event_shape)):
        raise ValueError(f"{name}: expected a float array [B, {_sizes(event_shape)}], got shape {x.shape}")
    if x.shape[0] < least:
        raise ValueError(f"{name}: expected at least one example, got shape {x.shape}")
    return _of_jax(x)


def as_float_array(name: str, x: Any, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Converts x to a JAX array, of the given shape if there is one. Conversions and errors as for `as_float_batch`."""
    x = _float_array(name, x, "a float array" if shape is None else f"a float array [{_sizes(shape)}]")
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"{name}: expected a float array [{_sizes(shape)}], got shape {x.shape}")
    return _of_jax(x)


def as_host_array(name: str, x: Any, expected: str) -> jax.Array | np.ndarray:
    """Returns x, a NumPy or JAX array of any dtype; masked arrays as their data, all in the machine's byte order.

    Raises:
      ValueError: if x is anything else, with `expected` in the message, or has masked values.
    """
    if not isinstance(x, jax.Array | type) and hasattr(x, "__jax_array__"):  # as a variable of Flax
        x = x.__jax_array__()
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        is_data = isinstance(x, Sequence) or hasattr(x, "__array__")
        remedy = f"; pass jnp.asarray({name})" if is_data and not isinstance(x, str | bytes | type) else ""
        raise ValueError(f"{name}: expected {expected}, got {type(x).__name__}{remedy}")
    if isinstance(x, np.ma.MaskedArray):
        if np.ma.is_masked(x):
            raise ValueError(f"{name}: expected {expected} without masked values, got {np.ma.count_masked(x)} of them")
        x = x.data
    return x if isinstance(x, jax.Array) or x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def as_array(name: str, x: Any, expected: str) -> jax.Array:
    """Converts x to a JAX array of any numeric dtype, as `as_float_batch` does; ValueError for other dtypes."""
    x = as_host_array(name, x, expected)
    if not isinstance(x, jax.Array) and not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
        raise ValueError(f"{name}: expected {expected} of numbers, got dtype {x.dtype}")
    return _of_jax(x)


def _float_array(name: str, x: Any, expected: str) -> jax.Array | np.ndarray:
    x = as_host_array(name, x, expected)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected {expected}, got dtype {x.dtype}{_remedy(name, x)}")
    return x


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "..." if shape is None else ", ".join(map(str, shape))


def _remedy(name: str, x: jax.Array | np.ndarray) -> str:
    """The hint of an error on how to convert an array that is not of floats."""
    if not (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
        return ""
    if x.ndim == 4:
        return f"; dequantise images: ({name} + noise) / levels, with uniform noise in [0, 1)"
    return f"; pass {name}.astype(jnp.float32)"


def _of_jax(x: jax.Array | np.ndarray) -> jax.Array:
    """x as a JAX array. NumPy arrays are copied, because they may change while a program still reads them."""
    if isinstance(x, jax.Array):
        return x
    if x.dtype.kind == "f":  # JAX has no floats longer than float64
        with np.errstate(over="ignore"):  # numbers that overflow become infinite
            x = x.astype(jax.dtypes.canonicalize_dtype(np.dtype(f"f{min(x.dtype.itemsize, 8)}")))
    return jnp.array(np.asarray(x))


def check_key(name: str, key: Any, *, optional: bool = False) -> None:
    """Expects one PRNG key of jax.random.key or jax.random.PRNGKey, or None if `optional`. It may be traced."""
    if optional and key is None:
        return
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.shape == ():
                return
            raise ValueError(f"{name}: expected one PRNG key, got keys of shape {key.shape}; jax.vmap takes many")
        if key.dtype == jnp.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
            return
        got = f"an array {key.dtype} {key.shape}"
    else:
        got = repr(key) if isinstance(key, Integral) else type(key).__name__
    raise ValueError(f"{name}: expected a PRNG key, as in jax.random.key(0), got {got}")


def as_key(name: str, key: Any) -> jax.Array:
    """Converts an integer seed to a PRNG key, and checks a PRNG key as `check_key` does."""
    if isinstance(key, Integral) and not isinstance(key, bool):
        if not -_LARGEST <= key <= _LARGEST:
            raise ValueError(f"{name}: expected a seed within 64 bits, got {shown(key)}")
        return jax.random.key(key)
    check_key(name, key)
    return key


def check_type(name: str, value: Any, kind: type) -> None:
    """Expects an instance of this class."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise ValueError(f"{name}: expected {kind.__name__}, got {got}")


def as_sequence(name: str, value: Any, expected: str) -> list[Any]:
    """Converts an iterable to a list; ValueError, with what was expected, for anything else."""
    if isinstance(value, str | bytes | type) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return list(value)


def check_flag(name: str, value: Any) -> None:
    """Expects True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")


def check_flags(config: Any, prefix: str = "") -> None:
    """Raises ValueError unless every field with a bool as default is a bool."""
    for field in fields(config):
        if isinstance(field.default, bool):
            check_type(f"{prefix}{field.name}", getattr(config, field.name), bool)


def check_path(path: Any) -> None:
    """Expects a path of a file, as text or as a path."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path: expected a path of a file, got {shown(path)}")


def check_callable(name: str, value: Any) -> None:
    """Expects a function."""
    if not callable(value):
        raise ValueError(f"{name}: expected a function, got {type(value).__name__}")


def check_batch(name: str, x: Any, event_shape: tuple[int, ...] | None = None) -> None:
    """Expects a float array [B, ...], or [B, *event_shape] if that is given. It may be traced."""
    shape = "..." if event_shape is None else ", ".join(map(str, event_shape))
    expected = f"{name}: expected a float array [B, {shape}]"
    if not hasattr(x, "dtype"):
        raise ValueError(f"{expected}, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{expected}, got dtype {x.dtype}")
    if x.ndim < 1 or (event_shape is not None and x.shape[1:] != event_shape):
        raise ValueError(f"{expected}, got shape {x.shape}")


def check_like(name: str, out: Any, x: jax.Array, like: str = "x") -> None:
    """Expects what a function `name` returns to have the shape and dtype of x, its argument called `like`."""
    if getattr(out, "shape", None) != x.shape or out.dtype != x.dtype:
        got = f"{out.dtype} {out.shape}" if hasattr(out, "shape") else type(out).__name__
        raise ValueError(f"{name}: expected an output {x.dtype} {x.shape} like {like}, got {got}")


def check_count(name: str, value: Any, least: int) -> None:
    """Expects an integer of at least `least`, within 64 bits."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {shown(value)}")
    if value > _LARGEST:
        raise ValueError(f"{name}: expected an integer within 64 bits, got {shown(value)}")


def as_shape(name: str, value: Any) -> tuple[int, ...]:
    """Converts a tuple or list of positive integers to a tuple of Python integers."""
    if not isinstance(value, tuple | list):
        raise ValueError(f"{name}: expected a tuple of sizes, such as (3,), got {shown(value)}")
    for size in value:
        check_count(name, size, 1)
    return tuple(map(int, value))


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Expects one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}; got {shown(value)}")


def check_open_interval(name: str, value: Any, low: float, high: float) -> None:
    """Expects a number strictly between `low` and `high`."""
    if not isinstance(value, Real) or not low < value < high:
        raise ValueError(f"{name}: expected a number in ({low}, {high}), got {shown(value)}")


def check_scalar(name: str, value: Any) -> None:
    """Expects a number, or an array of one number. It may be traced."""
    dtype = getattr(value, "dtype", None)
    is_scalar = getattr(value, "shape", None) == () and dtype is not None and jnp.issubdtype(dtype, jnp.number)
    if not (isinstance(value, Real) or is_scalar):
        raise ValueError(f"{name}: expected a number, got {shown(value)}")


def check_finite(name: str, value: Any) -> None:
    """Expects a number that is neither infinite nor NaN."""
    number = float(value) if isinstance(value, np.floating) else value  # _LARGEST_FLOAT would be infinite in float32
    if not isinstance(number, Real) or not (abs(number) <= _LARGEST_FLOAT):
        raise ValueError(f"{name}: expected a finite number, got {shown(value)}")


def check_positive(name: str, value: Any) -> None:
    """Expects a positive number."""
    if not isinstance(value, Real) or not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {shown(value)}")


def check_order(name: str, value: Any) -> None:
    """Expects the order of a vector norm: a number in [1, inf], or a float array of shape []."""
    is_scalar = getattr(value, "shape", None) == () and jnp.issubdtype(value.dtype, jnp.floating)
    if not (_is_order(value) if isinstance(value, Real) else is_scalar):
        raise ValueError(f"{name}: expected an order of at least 1 (or inf), got {shown(value)}")


def _is_order(value: Real) -> bool:
    return value >= 1 and (value <= _LARGEST or isinstance(value, float))
