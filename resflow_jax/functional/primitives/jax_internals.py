"""Everything that this library uses of JAX beyond its documented interface. A new JAX release can break only this file.

Primitive                           defines a new operation
ad, batching, mlir                  the registries for the rules of an operation
ClosedJaxpr, Jaxpr, Literal         traced programs, which `tracing` compares
jaxpr_as_fun                        runs a traced program
is_divided                          whether the compiler divides a program among devices: JAX has no public way to ask
has_started                         whether JAX has started its backends, which read their flags then
running_trace, EvalTrace            the trace that is running, for which there is no public interface
WrappedFun                          JAX's wrapper of a derivative rule, which `tracing` compares
"""

import math
from typing import Any

from jax._src import core
from jax._src.linear_util import WrappedFun
from jax._src.xla_bridge import backends_are_initialized as has_started
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

EvalTrace = core.EvalTrace


def running_trace() -> Any:
    """The trace that records or evaluates operations now."""
    return core.trace_ctx.trace


def is_divided(context: Any) -> bool:
    """Whether the compiler divides the operations of a program, of a lowering rule's context, among several devices.

    It does so for `jax.jit` on several devices, but not inside of `jax.shard_map` over all of its mesh.
    """
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices > 1
    return math.prod(size for name, size in axes.mesh.shape.items() if name not in axes.manual_axes) > 1


__all__ = [
    "ClosedJaxpr",
    "EvalTrace",
    "Jaxpr",
    "Literal",
    "Primitive",
    "WrappedFun",
    "ad",
    "batching",
    "has_started",
    "is_divided",
    "jaxpr_as_fun",
    "mlir",
    "running_trace",
]
