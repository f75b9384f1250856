"""Checks of concrete values, which wait for no result: begun before a computation, read when it is under way.

In this way:

    with checked("x", x, dtype, domain):  # a NumPy array is checked at once, a traced one never
        z = compiled(x)  # dispatched; then the check raises, where a value is wrong
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Domain(NamedTuple):
    """Where the values of an example may be, by default anywhere.

    Attributes:
      low, high: the ends; numbers, or arrays that broadcast against an example from its last axis on.
      text: how the error calls them; an array of such texts where the ends are arrays.
      remark: what the error adds.
    """

    low: float | np.ndarray = -math.inf
    high: float | np.ndarray = math.inf
    text: str | np.ndarray = ""
    remark: str = ""


ANYWHERE = Domain()
UNIT_INTERVAL = Domain(0, 1, "[0, 1]")


@contextmanager
def checked(name: str, x: Any, dtype: Any, domain: Domain = ANYWHERE) -> Iterator[None]:
    """Around a computation on x: checks that x, cast to a dtype, is finite and within a domain.

    A NumPy array is checked before the computation, on the host. Of a JAX array, which may still be computed, be on an
    accelerator or be shared by several processes, three numbers are asked for before the computation and waited for
    behind it; an array of one CPU is looked at there. Where the computation raises, a wrong value is named instead.
    Traced arrays have no values to check.

    Raises:
      ValueError: that names the argument; the same in every process.
    """
    check = _begin(name, x, dtype, domain)
    try:
        yield
    finally:
        check()


def _begin(name: str, x: Any, dtype: Any, domain: Domain) -> Callable[[], None]:
    """What ends the check, and raises."""
    if isinstance(x, jax.core.Tracer):
        return _nothing
    if not isinstance(x, jax.Array):
        _check_on_host(name, x, dtype, domain)
        return _nothing
    if len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu":
        return partial(_check_on_host, name, x, dtype, domain)
    return partial(_check_numbers, name, _numbers(x, dtype, _axes(domain)), dtype, domain)


def _nothing() -> None: ...


def _axes(domain: Domain) -> int | None:
    """The batch alone where the domain differs by element, else all axes."""
    return 0 if np.ndim(domain.low) or np.ndim(domain.high) else None


@partial(jax.jit, static_argnames=("dtype", "axes"))
def _numbers(x: Array, dtype: Any, axes: int | None) -> tuple[Array, Array, Array]:
    """How many values are not finite, and the least and the largest of the others."""
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
