"""Converts a composed flow to JSON and back: its layers and their arguments.

    {"type": "Chain", "arguments": {"bijectors": [{"type": "ActNorm", "arguments": {"shape": [6]}}, ...]}}

Every layer, base and contraction of this package stores the arguments of its constructor in attributes of the same
names, so one function describes all of them. `build` calls only the public classes of this package. It imports no name
of a description and executes nothing in it. An object of another class, such as a user's own module, is described only
by its name, {"unknown": "package.Class"}, and cannot be built.

Arrays among the arguments are written with their values, because a layer may check them. Infinite numbers and NaN are
strings, because JSON lacks them.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.activations import ACTIVATIONS, Activation, get_activation
from resflow_jax.functional.checks import names_text, shown
from resflow_jax.layers.contraction import TrustedContraction
from resflow_jax.layers.contraction_block import ContractionBlock
from resflow_jax.layers.lipschitz import deferred_norms
from resflow_jax.layers.module import Module
from resflow_jax.layers.residual import ResidualStack

_MISSING = object()


class UnknownClassError(ValueError):
    """A description names a class of another package."""


@cache
def classes() -> dict[str, type]:
    """The classes that descriptions may name, by name: public layers, bases, contractions, flows and settings."""
    import resflow_jax

    public = [getattr(resflow_jax, name) for name in resflow_jax.__all__]
    found = [cls for cls in public if isinstance(cls, type) and _is_described(cls)]
    return {cls.__name__: cls for cls in found}


def _is_described(cls: type) -> bool:
    return issubclass(cls, Module) or (dataclasses.is_dataclass(cls) and cls is not Activation)


def describe(value: Any) -> Any:
    """Describes a layer, base, flow or argument in plain JSON values."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        return describe(value.item())
    if isinstance(value, np.ndarray | jax.Array | nnx.Variable):
        array = np.asarray(value[...] if isinstance(value, nnx.Variable) else value)
        return {"array": _plain(array.tolist()), "dtype": str(array.dtype)}
    if isinstance(value, int | float):
        return _plain(value)
    if value is ...:
        return {"constant": "..."}
    if isinstance(value, list | tuple | nnx.List):
        return [describe(item) for item in value]
    if isinstance(value, Activation) and ACTIVATIONS.get(value.name) is value:
        return {"activation": value.name}
    cls = type(value)
    arguments = dict(_arguments(value)) if classes().get(cls.__name__) is cls else {"": _MISSING}
    if any(given is _MISSING for given in arguments.values()):  # the constructor's arguments are unknown
        return {"unknown": f"{cls.__module__}.{cls.__qualname__}"}
    return {"type": cls.__name__, "arguments": {name: describe(given) for name, given in arguments.items()}}


def _arguments(value: Any) -> Iterator[tuple[str, Any]]:
    """The constructor's arguments for an object like this one, as pairs (name, value)."""
    if isinstance(value, ContractionBlock):
        contraction = value.contraction
        is_trusted = isinstance(contraction, TrustedContraction)
        yield "contraction", contraction.module if is_trusted else contraction
        if is_trusted:
            yield from ((n, getattr(contraction, n)) for n in ("lipschitz", "event_shape", "condition_shape"))
        if hasattr(value, "solver"):
            yield "solver", value.solver
    elif isinstance(value, ResidualStack):
        yield "step", value.unstacked()[0]
        yield "depth", value.depth
    else:
        for name in _parameters(type(value)):
            yield name, getattr(value, name, _MISSING)


@cache
def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class's constructor, except `rngs`."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    # A class without a constructor has *args and **kwargs.
    is_any = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.name != "rngs" and p.kind not in is_any}


def build(description: Any, rngs: nnx.Rngs, name: str = "structure") -> Any:
    """Builds the object that `describe` described, with new arrays. Under `jax.eval_shape` it computes nothing.

    Args:
      description: plain JSON values.
      rngs: random streams for layers that draw their parameters.
      name: name of the description, for errors.

    Raises:
      UnknownClassError: for a class of another package.
      ValueError: for values that `describe` does not write, and for unknown, missing or invalid arguments of a class.
        The message names the place.
    """
    if isinstance(description, list):
        return tuple(build(item, rngs, f"{name}[{n}]") for n, item in enumerate(description))
    if not isinstance(description, dict):
        return description
    keys = set(description)
    if keys == {"float"}:
        return _number(description["float"], name)
    if keys == {"constant"} and description["constant"] == "...":
        return ...
    if keys == {"array", "dtype"}:
        return _array(description, name)
    if keys == {"activation"}:
        return get_activation(description["activation"])
    if keys == {"unknown"}:
        raise UnknownClassError(f"{name}: expected a class of resflow_jax, got {_brief(description)}")
    if keys != {"type", "arguments"} or not isinstance(description["arguments"], dict):
        raise ValueError(f"{name}: expected the type and the arguments of a layer, got the keys {names_text(keys)}")
    cls = classes().get(description["type"]) if isinstance(description["type"], str) else None
    if cls is None:
        raise UnknownClassError(f"{name}: expected a class of resflow_jax, got {shown(description['type'])}")
    return _call(cls, description["arguments"], rngs, name)


def _call(cls: type, arguments: dict[str, Any], rngs: nnx.Rngs, name: str) -> Any:
    """Makes an object of the class with these arguments."""
    parameters = {"step": None, "depth": None} if cls is ResidualStack else _parameters(cls)
    if unknown := arguments.keys() - parameters.keys():
        raise ValueError(f"{name}: expected arguments of {cls.__name__}, got {names_text(unknown)}")
    if cls is ResidualStack:
        if lacking := parameters.keys() - arguments.keys():
            raise ValueError(f"{name}: expected the arguments step and depth, got none for {', '.join(lacking)}")
        step = arguments["step"]
        given = {"make_step": lambda rngs: build(step, rngs, f"{name}.step"), "depth": arguments["depth"]}
    else:
        given = {key: build(value, rngs, f"{name}.{key}") for key, value in arguments.items()}
    if "rngs" in inspect.signature(cls.__init__).parameters:
        given["rngs"] = rngs
    try:
        with deferred_norms():
            return cls(**given)
    except UnknownClassError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if str(error).startswith(f"{name}."):
            raise
        raise ValueError(f"{name}: expected arguments that {cls.__name__} takes, got others: {error}") from error


def number_of_layers(description: Any) -> int:
    """The number of objects in a description that `build` makes by calling a class."""
    found, left = 0, [description]
    while left:
        value = left.pop()
        found += isinstance(value, dict) and "type" in value
        left.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return found


def difference(expected: Any, found: Any, name: str = "") -> str | None:
    """The first difference between two descriptions, in words; None if they agree.

    An argument on one side only does not count as a difference, because another version of a class may lack it.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys() and "type" in {*expected, *found}:
            return _unlike(expected, found, name)
        if expected.get("type") != found.get("type"):
            return _unlike(expected, found, name)
        pairs = ((key, expected[key], found[key]) for key in expected if key in found)
        differences = (difference(a, b, _place(name, key)) for key, a, b in pairs)
        return next((text for text in differences if text is not None), None)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        differences = (difference(a, b, f"{name}[{n}]") for n, (a, b) in pairs)
        return next((text for text in differences if text is not None), None)
    return None if expected == found else _unlike(expected, found, name)


def _place(name: str, key: str) -> str:
    if key == "arguments":
        return name
    return f"{name}.{key}" if name else key


def _unlike(expected: Any, found: Any, name: str) -> str:
    return f"{name or 'flow'}: expected {_brief(expected)}, got {_brief(found)}"


def _brief(description: Any) -> str:
    if isinstance(description, dict):
        description = description.get("type") or description.get("unknown") or description
        return description if isinstance(description, str) and description.isprintable() else shown(description)
    return shown(description)


def _plain(value: Any) -> Any:
    """Converts infinite numbers and NaN in nested lists to values that JSON has."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _number(value: Any, name: str) -> float:
    if value not in ("inf", "-inf", "nan"):
        raise ValueError(f"{name}: expected inf, -inf or nan, got {shown(value)}")
    return float(value)


def _array(description: dict[str, Any], name: str) -> np.ndarray:
    def numbers(value: Any) -> Any:
        if isinstance(value, list):
            return [numbers(item) for item in value]
        return _number(value["float"], name) if isinstance(value, dict) and set(value) == {"float"} else value

    try:
        return np.asarray(numbers(description["array"]), jnp.dtype(description["dtype"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected the numbers of an array with their dtype, got others: {error}") from error
