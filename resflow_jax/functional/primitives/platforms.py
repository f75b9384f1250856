"""Chooses between implementations of a function, for a CPU and for accelerators, and traces only the one it needs.

`lax.platform_dependent` traces all branches, which doubles the time to compile a program. Here a branch is traced when
the program is lowered for its platform. The first two are traced if JAX differentiates or batches the operation.
`jax.experimental.checkify` does not check inside of it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import jax
from jax import lax

from resflow_jax.functional.primitives.jax_internals import Primitive, ad, batching, is_divided, mlir

Flat = Callable[..., list[jax.Array]]

_by_platform_p = Primitive("by_platform")
_by_platform_p.multiple_results = True


def by_platform(
    *args: Any,
    cpu: Callable[..., Any],
    default: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    out: Any,
) -> Any:
    """Computes cpu(*args) on a CPU, tpu(*args) on a TPU, and default(*args) on other platforms.

    Args:
      *args: pytrees of arrays. The functions must depend on nothing else, and must not close over traced arrays.
      cpu: a pure function.
      default: a pure function with the same result.
      tpu: the same, for programs that the compiler does not divide among devices. `default` takes its place in programs
        that are divided or batched, and if it is None.
      out: the types of the outputs, as `jax.typeof` gives them.
    """
    leaves, tree = jax.tree.flatten(args)
    types, out_tree = jax.tree.flatten(out)

    def flat(function):
        return lambda *leaves: jax.tree.leaves(function(*tree.unflatten(leaves)))

    branches = {"cpu": flat(cpu), "default": flat(default), "tpu": flat(default if tpu is None else tpu)}
    return out_tree.unflatten(_by_platform_p.bind(*leaves, **branches, types=tuple(types)))


def _at_once(*leaves, cpu: Flat, default: Flat, **_) -> list[jax.Array]:
    """The operation with two branches traced, so that JAX can transform it."""
    return lax.platform_dependent(*leaves, cpu=cpu, default=default)


_by_platform_p.def_impl(_at_once)
_by_platform_p.def_abstract_eval(lambda *leaves, types, **_: types)
mlir.register_lowering(_by_platform_p, mlir.lower_fun(lambda *leaves, default, **_: default(*leaves)))
mlir.register_lowering(_by_platform_p, mlir.lower_fun(lambda *leaves, cpu, **_: cpu(*leaves)), platform="cpu")


def _lower_for_tpu(context, *leaves, default, tpu, **_):
    function = default if is_divided(context) else tpu
    return mlir.lower_fun(lambda *leaves, **_: function(*leaves))(context, *leaves)


mlir.register_lowering(_by_platform_p, _lower_for_tpu, platform="tpu")


def _jvp(primals, tangents, **params):
    has_tangent = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def function(*differentiated):
        values = iter(differentiated)
        return _at_once(*(next(values) if has else x for has, x in zip(has_tangent, primals, strict=True)), **params)

    return jax.jvp(
        function, *([x for has, x in zip(has_tangent, xs, strict=True) if has] for xs in (primals, tangents))
    )


def _batch(leaves, axes, **params):
    outs = jax.vmap(lambda *leaves: _at_once(*leaves, **params), axes)(*leaves)
    return outs, [0] * len(outs)


ad.primitive_jvps[_by_platform_p] = _jvp
batching.primitive_batchers[_by_platform_p] = _batch


_target: ContextVar[str | None] = ContextVar("target", default=None)


def target_platform() -> str:
    """The platform that programs are traced for, "cpu", "tpu", or another: JAX's own unless in `compiling_for`."""
    return _target.get() or jax.default_backend()


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Inside, the sizes in new programs are those for a platform, though JAX runs on another: to compile ahead."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def number_of_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def threads_per_cpu_device() -> int:
    """`number_of_cores`, divided by JAX's CPU devices; at least one. It starts JAX.

    XLA divides a large operation of one CPU device among this number of threads.
    """
    try:
        return max(1, number_of_cores() // jax.local_device_count("cpu"))
    except RuntimeError:  # JAX was started without CPUs
        return 1
