"""Compares the programs of one function g for two batch sizes.

g treats the rows of a batch independently, but may still depend on their number or on a row's place: by noise of the
batch's shape, by `jnp.arange(len(x))`, by rows of an array that it closes over, by a factor 1 / len(x), or by the count
of rows before it. Such a g gives different values on a part of the batch, without an error. Its jaxpr shows this: it
has other constants, makes an array of the batch's size without x, or has an operation along the axis of the batch, such
as a cumulative sum (see `batch_operations`).
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from resflow_jax.functional.primitives.batch_operations import is_along_batch
from resflow_jax.functional.primitives.jax_internals import ClosedJaxpr, Jaxpr, Literal

Program = tuple[Jaxpr, list[Any]]


def is_of_rows(whole: Program, part: Program) -> bool:
    """Whether two programs are one function of each row, traced for two batch sizes, as far as operations are known.

    They have to do the same operations with the same constants, and none along the axis of the batch. Every array whose
    size depends on the batch has to come from the arguments, or has to have equal rows.

    Args:
      whole: a program, and the arrays that it closes over.
      part: those for the other batch size.
    """
    (a, arrays), (b, others) = whole, part
    if len(arrays) != len(others) or not all(map(_is_same_array, arrays, others)):
        return False
    if len(a.eqns) != len(b.eqns) or _differ(a.constvars, b.constvars):
        return False
    for p, q in zip(a.eqns, b.eqns, strict=True):
        if p.primitive is not q.primitive or len(p.invars) != len(q.invars):
            return False
        if not all(map(_is_same_literal, p.invars, q.invars)):
            return False
        if _differ(p.outvars, q.outvars) and not (_differ(p.invars, q.invars) or _has_equal_rows(p, q)):
            return False
        if is_along_batch(p, q):
            return False
        programs, others = list(_programs(p.params)), list(_programs(q.params))
        if len(programs) != len(others) or not all(map(is_of_rows, programs, others)):
            return False
    return True


def _differ(one: list[Any], other: list[Any]) -> bool:
    """Whether any of the variables differ in shape."""
    return [getattr(p.aval, "shape", ()) for p in one] != [getattr(q.aval, "shape", ()) for q in other]


def _has_equal_rows(p: Any, q: Any) -> bool:
    """Whether an operation without an argument of the batch's size fills its result along the axes that differ.

    A call does if its program does, which `is_of_rows` then compares.
    """
    if p.primitive.name == "iota":
        shapes = p.outvars[0].aval.shape, q.outvars[0].aval.shape
        return shapes[0][p.params["dimension"]] == shapes[1][q.params["dimension"]]
    return p.primitive.name in ("broadcast_in_dim", "custom_jvp_call", "jit", "pjit")


def _is_same_literal(p: Any, q: Any) -> bool:
    """Whether two arguments are equal constants, or no constants."""
    if isinstance(p, Literal) and isinstance(q, Literal):
        return np.array_equal(p.val, q.val, equal_nan=True)
    return not isinstance(p, Literal) and not isinstance(q, Literal)


def _is_same_array(p: Any, q: Any) -> bool:
    if p is q:
        return True
    if isinstance(p, jax.core.Tracer) or isinstance(q, jax.core.Tracer) or jax.typeof(p) != jax.typeof(q):
        return False
    if jax.dtypes.issubdtype(jax.typeof(p).dtype, jax.dtypes.extended):
        return False
    return np.asarray(p).tobytes() == np.asarray(q).tobytes()


def _programs(value: Any) -> Iterator[Program]:
    """The programs in the parameters of an operation, as the body of a loop."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr, value.consts
    elif isinstance(value, Jaxpr):
        yield value, []
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _programs(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _programs(inner)
