"""Checks of concrete values.

Checks of inputs do not delay the computation: they start before it and finish after it was dispatched. For example:

    with checked("x", x, dtype, domain):  # a NumPy array is checked here, a traced array never
        z = compiled(x)  # dispatched; when the block ends, the check raises if a value is wrong
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Domain(NamedTuple):
    """The range of allowed values; by default all finite numbers.

    Attributes:
      low, high: the ends: numbers, or arrays that broadcast against an example.
      text: name of the range in errors; an array of names if the ends are arrays.
      remark: text at the end of errors.
    """

    low: float | np.ndarray = -math.inf
    high: float | np.ndarray = math.inf
    text: str | np.ndarray = ""
    remark: str = ""


ANYWHERE = Domain()
UNIT_INTERVAL = Domain(0, 1, "[0, 1]")


@contextmanager
def checked(name: str, x: Any, dtype: Any, domain: Domain = ANYWHERE) -> Iterator[None]:
    """A context around a computation on x: checks that x, cast to a dtype, is finite and within a domain.

    A NumPy array is checked on the host, before the computation. A JAX array may still be pending, lie on an
    accelerator, or be shared by several processes: a small program that computes three numbers is dispatched before the
    computation, and its result is read after it. An array on one CPU is read on the host after the computation. If the
    computation raises and a value is wrong, the error about the value is raised. Traced arrays are not checked.

    Raises:
      ValueError: it names the argument, and is the same in every process.
    """
    check = _begin(name, x, dtype, domain)
    try:
        yield
    finally:
        check()


def number_of_overflows(results: Any) -> int:
    """The number of examples whose solution is not finite, or whose other results are NaN.

    Args:
      results: a pytree of arrays [B, ...], the solutions first. A log-density after them may be -inf. Traced arrays are
        not checked, for example the values of a call under `jax.grad`.
    """
    return _count(results, firsts="isfinite")


def report_nan(what: str, results: Any) -> None:
    """Warns of examples with NaN in a pytree of arrays [B, ...] that a call returns; traced arrays are not checked.

    It blocks until the arrays are computed. Inputs are finite, so NaN means that a solve did not finish, or that
    numbers overflowed the dtype.

    Args:
      what: the name of the call.
      results: what it returns.
    """
    if found := _count(results):
        number = jax.tree.leaves(results)[0].shape[0]
        warnings.warn(f"{what}: {found} of {number} examples are NaN", RuntimeWarning, stacklevel=4)


def _count(results: Any, firsts: str = "isnan") -> int:
    """The number of examples with NaN; in the first array with any value that is not finite if `firsts` says so."""
    leaves = jax.tree.leaves(results)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return 0
    if all(map(_is_on_one_cpu, leaves)):
        return int(_examples(np, [np.asarray(leaf) for leaf in leaves], firsts))
    return int(_counted(leaves, firsts))


@partial(jax.jit, static_argnames="firsts")
def _counted(leaves: list[Array], firsts: str) -> Array:
    return _examples(jnp, leaves, firsts)


def _examples(xp: Any, leaves: list[Any], firsts: str) -> Any:
    first = xp.isnan(leaves[0]) if firsts == "isnan" else ~xp.isfinite(leaves[0])
    is_bad = first, *map(xp.isnan, leaves[1:])
    return reduce(operator.or_, (bad.any(axis=tuple(range(1, bad.ndim))) for bad in is_bad)).sum()


def _begin(name: str, x: Any, dtype: Any, domain: Domain) -> Callable[[], None]:
    """Begins the check. The returned function finishes it, and raises."""
    if not isinstance(x, jax.Array) and hasattr(x, "__jax_array__"):  # as a variable of Flax
        x = x.__jax_array__()
    if isinstance(x, jax.core.Tracer):
        return _nothing
    if not isinstance(x, jax.Array):
        _check_on_host(name, x, dtype, domain)
        return _nothing
    if _is_on_one_cpu(x):
        return partial(_check_on_host, name, x, dtype, domain)
    with jax.ensure_compile_time_eval():  # a program that is being traced may hold x
        numbers = _numbers(x, dtype, _axes(domain))
    return partial(_check_numbers, name, numbers, dtype, domain)


def _nothing() -> None: ...


def _is_on_one_cpu(x: Array) -> bool:
    return len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu"


def _axes(domain: Domain) -> int | None:
    """The axes to reduce: the batch axis if the domain differs by element, else all axes."""
    return 0 if np.ndim(domain.low) or np.ndim(domain.high) else None


@partial(jax.jit, static_argnames=("dtype", "axes"))
def _numbers(x: Array, dtype: Any, axes: int | None) -> tuple[Array, Array, Array]:
    """The number of values that are not finite, and the least and the largest of the others."""
    x = x.astype(dtype)
    is_finite = jnp.isfinite(x)
    low, high = jnp.where(is_finite, x, math.inf), jnp.where(is_finite, x, -math.inf)
    return jnp.sum(~is_finite), low.min(axes, initial=math.inf), high.max(axes, initial=-math.inf)


def _check_on_host(name: str, x: Any, dtype: Any, domain: Domain) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.asarray(x).astype(dtype, copy=False)
        low, high = x.min(_axes(domain), initial=math.inf), x.max(_axes(domain), initial=-math.inf)  # NaN if any is
    others = 0 if x.size == 0 or np.isfinite([low, high]).all() else np.count_nonzero(~np.isfinite(x))
    _judge(name, others, low, high, dtype, domain)


def _check_numbers(name: str, numbers: tuple[Array, Array, Array], dtype: Any, domain: Domain) -> None:
    _judge(name, *jax.device_get(numbers), dtype, domain)


def _judge(name: str, others: Any, low: Any, high: Any, dtype: Any, domain: Domain) -> None:
    if others:
        raise ValueError(f"{name}: expected finite values, got {others} that are not in {np.dtype(dtype)}")
    is_outside = np.asarray((low < domain.low) | (high > domain.high))
    if is_outside.any():
        place, first = "", np.unravel_index(is_outside.argmax(), is_outside.shape)
        if is_outside.ndim:
            place = f" in column {first[0]}" if len(first) == 1 else f" at {tuple(map(int, first))}"
        text, low, high = (np.broadcast_to(part, is_outside.shape)[first] for part in (domain.text, low, high))
        raise ValueError(f"{name}: expected values in {text}{place}, got [{low}, {high}]{domain.remark}")
