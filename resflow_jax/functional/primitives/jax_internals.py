"""Everything that this library uses of JAX beyond its documented interface. A new JAX release can break only this file.

Primitive                           defines a new operation
ad, batching, mlir                  the registries for the rules of an operation
ClosedJaxpr, Jaxpr, Literal         traced programs, which `tracing` compares
jaxpr_as_fun                        runs a traced program
running_trace, EvalTrace            the trace that is running, for which there is no public interface
WrappedFun                          JAX's wrapper of a derivative rule, which `tracing` compares
"""

from typing import Any

from jax._src import core
from jax._src.linear_util import WrappedFun
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

EvalTrace = core.EvalTrace


def running_trace() -> Any:
    """The trace that records or evaluates operations now."""
    return core.trace_ctx.trace


__all__ = [
    "ClosedJaxpr",
    "EvalTrace",
    "Jaxpr",
    "Literal",
    "Primitive",
    "WrappedFun",
    "ad",
    "batching",
    "jaxpr_as_fun",
    "mlir",
    "running_trace",
]
