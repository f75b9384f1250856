"""Any object with log_prob(z) and sample(key, n) as a base distribution."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import as_shape
from resflow_jax.layers.bijector import Constant
from resflow_jax.layers.conditions import ANY, ConditionShape
from resflow_jax.layers.module import List
from resflow_jax.models.bases.base import Base, Shape

Array = jax.Array

_SIGNATURES = {"log_prob": "log_prob(z) -> [B]", "sample": "sample(key, n) -> [n, ...]"}
_BRIDGES = ("distrax", "numpyro")


class ObjectBase(Base):
    """A base distribution from any object with log_prob(z) -> [B] and sample(key, n) -> [n, *event_shape].

    Both methods must be functions of JAX, since a flow compiles them. If the object is a module of Flax NNX, it is a
    part of the flow, and its parameters are trained with it. If it is another pytree, its arrays become `Constant`,
    which training does not change. Any other object is part of the structure, and fixed.

    The object is conditional if both methods have a parameter named `condition`. They are then called with [B, ...] or
    [n, ...]. The shape of one condition is the object's attribute `condition_shape` if there is one.

    Args:
      distribution: the object.
      event_shape: shape of one z.

    Raises:
      ValueError: for a method that is missing or returns another shape, and if only one method takes a condition. From
        `sample`, for a temperature other than 1, since the mean of the object is unknown.
    """

    def __init__(self, distribution: Any, event_shape: Shape):
        self.event_shape = as_shape("event_shape", event_shape)
        for name, signature in _SIGNATURES.items():
            if isinstance(distribution, type):
                raise ValueError(f"base: expected an object, got the class {distribution.__name__}")
            if not callable(getattr(distribution, name, None)):
                got = f"{type(distribution).__name__}, which has none"
                raise ValueError(f"base: expected an object with the method {signature}, got {got}")
        self.condition_shape = _condition_shape(distribution)
        if isinstance(distribution, nnx.Module):
            self.module, self.arrays, self.fixed = distribution, None, None
        else:
            leaves, structure = jax.tree.flatten(distribution)
            is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
            arrays = [leaf for leaf, found in zip(leaves, is_array, strict=True) if found]
            others = [None if found else leaf for leaf, found in zip(leaves, is_array, strict=True)]
            self.module = None
            self.arrays = List(Constant(jnp.asarray(array)) for array in arrays)
            self.fixed = _Fixed(structure, tuple(is_array), tuple(others))
        if self.condition_shape is not ANY:
            self._check_shapes(type(distribution))

    @property
    def distribution(self) -> Any:
        """The object, with the arrays that this module holds now."""
        if self.module is not None:
            return self.module
        return self.fixed.unflatten([array[...] for array in self.arrays])

    def log_prob(self, z: Array, condition: Array | None = None) -> Array:
        return self.distribution.log_prob(z, **self._given(condition)).astype(z.dtype)

    def sample(
        self, key: Array, num_samples: int, condition: Array | None = None, temperature: float | Array = 1.0
    ) -> Array:
        if isinstance(temperature, jax.core.Tracer) or np.any(np.asarray(temperature) != 1):
            got = "a traced value" if isinstance(temperature, jax.core.Tracer) else repr(temperature)
            raise ValueError(f"temperature: expected 1 for a base of {self._name()}, which has none, got {got}")
        return self.distribution.sample(key, num_samples, **self._given(condition))

    def _given(self, condition: Array | None) -> dict[str, Array]:
        return {} if self.condition_shape is None else {"condition": condition}

    def _name(self) -> str:
        return type(self.distribution).__name__

    def _check_shapes(self, kind: type) -> None:
        """Raises ValueError unless both methods return the expected shapes for two examples."""
        dtype = jnp.result_type(float)

        def two(key, condition):
            z = self.distribution.sample(key, 2, **self._given(condition))
            return z, self.distribution.log_prob(z, **self._given(condition))

        condition = None if self.condition_shape is None else jax.ShapeDtypeStruct((2, *self.condition_shape), dtype)
        remedy = ""
        library = kind.__module__.partition(".")[0]
        if library in _BRIDGES:
            remedy = f"; for a distribution of {library} pass rf.interop.{library}.base(distribution)"
        try:
            found = jax.eval_shape(two, jax.eval_shape(jax.random.key, 0), condition)
        except Exception as error:
            raise ValueError(
                f"base: expected an object whose methods {' and '.join(_SIGNATURES.values())} JAX can trace, got "
                f"{kind.__name__}: {type(error).__name__}: {error}{remedy}"
            ) from error
        for name, value, expected in zip(("sample(key, 2)", "log_prob(z)"), found, self._two_shapes(), strict=True):
            if getattr(value, "shape", None) != expected:
                got = f"shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
                expectation = f"{name} of {kind.__name__} to return an array of shape {expected}"
                raise ValueError(f"base: expected {expectation}, got {got}{remedy}")

    def _two_shapes(self) -> tuple[Shape, Shape]:
        return (2, *self.event_shape), (2,)


class _Fixed:
    """The leaves of a pytree that are not arrays: a static attribute of a module, compared by content if possible."""

    def __init__(self, structure: Any, is_array: tuple[bool, ...], others: tuple[Any, ...]):
        self.structure, self.is_array, self.others = structure, is_array, others

    def unflatten(self, arrays: list[Array]) -> Any:
        arrays = iter(arrays)
        pairs = zip(self.is_array, self.others, strict=True)
        return jax.tree.unflatten(self.structure, [next(arrays) if found else other for found, other in pairs])

    def __eq__(self, other: Any) -> bool:
        if self is other or not isinstance(other, _Fixed):
            return self is other
        try:
            return bool((self.structure, self.is_array, self.others) == (other.structure, other.is_array, other.others))
        except Exception:  # as for arrays inside the structure
            return False

    def __hash__(self) -> int:
        return hash((self.structure, self.is_array))


def _condition_shape(distribution: Any) -> ConditionShape:
    """The object's `condition_shape`, or ANY, if both methods take a condition; None if neither does."""
    takes = {name: "condition" in _parameters(getattr(distribution, name)) for name in _SIGNATURES}
    if len(set(takes.values())) > 1:
        with_, without = sorted(takes, key=takes.get, reverse=True)
        raise ValueError(
            f"base: expected both methods of {type(distribution).__name__} to take a condition or neither, got "
            f"{with_} with one and {without} without"
        )
    if not takes["log_prob"]:
        return None
    shape = getattr(distribution, "condition_shape", ANY)
    return shape if shape is ANY or shape is None else as_shape("condition_shape", shape)


def _parameters(method: Any) -> set[str]:
    try:
        return set(inspect.signature(method).parameters)
    except (TypeError, ValueError):  # for methods written in C
        return set()


def as_base(base: Any, event_shape: Shape) -> Base:
    """A `Base` as it is; any other object with log_prob(z) and sample(key, n) as an `ObjectBase` of this event shape.

    Raises:
      ValueError: for an object without one of these methods, or whose methods return other shapes.
    """
    return base if isinstance(base, Base) else ObjectBase(base, event_shape)
