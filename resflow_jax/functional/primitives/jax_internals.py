"""All that this library uses of JAX beyond its documented interface. A new release of JAX can break this file alone.

Primitive                           new operations, each with its rules
ad, batching, mlir                  where these rules are registered
ClosedJaxpr, Jaxpr, Literal         traced programs, which are compared
jaxpr_as_fun                        runs one
running_trace, EvalTrace            which trace is running; no public interface tells
WrappedFun                          what JAX makes of a rule of derivatives, to compare two
"""

from typing import Any

from jax._src import core
from jax._src.linear_util import WrappedFun
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

EvalTrace = core.EvalTrace


def running_trace() -> Any:
    """The trace that operations go to now."""
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
