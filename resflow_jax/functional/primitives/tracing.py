"""Traces users' functions, so that the arrays they close over become arguments, and equal programs compile once.

A user's function may close over arrays of any kind: floats that are differentiated, integers, PRNG keys, concrete or
traced. `trace` runs it once on abstract values and returns a `Traced`, which takes these arrays as its first argument.
Two `Traced` are equal if their programs are, whatever function objects they came from. So `run` compiles a library
function once for all eager calls with equal programs, even if the caller makes a new lambda for each call, and it sees
all changes of closed-over values. The exception are values that the rule of a `jax.custom_vjp` or `jax.custom_jvp`
reads when it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import jax
import numpy as np

from resflow_jax.functional.checks import check_like
from resflow_jax.functional.primitives.batch_sizes import is_of_rows
from resflow_jax.functional.primitives.jax_internals import (
    ClosedJaxpr,
    EvalTrace,
    Jaxpr,
    Literal,
    WrappedFun,
    jaxpr_as_fun,
    running_trace,
)

COMPILED = 128  # number of compiled programs of eager calls in the cache


class Traced:
    """A traced function, called as traced(closed_over, *args) with args of the types it was traced for.

    Attributes:
      jaxpr: its program, with what it closes over as constants.
      out: the types of its outputs, as `jax.typeof` gives them, in the pytree that it returns.
    """

    def __init__(self, jaxpr: Jaxpr, out: Any):
        self.jaxpr = jaxpr
        self.out = out
        self._tree = jax.tree.structure(out)
        self._hash = hash((self._tree, tuple(eqn.primitive.name for eqn in jaxpr.eqns)))

    def __call__(self, closed_over: list[Any], *args: Any) -> Any:
        return self._tree.unflatten(jaxpr_as_fun(ClosedJaxpr(self.jaxpr, closed_over))(*jax.tree.leaves(args)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Traced):
            return NotImplemented
        return self is other or (self._tree == other._tree and _is_same_jaxpr(self.jaxpr, other.jaxpr))


@dataclass(frozen=True)
class TracedForSizes:
    """Traces of one function g(params, x, *condition) for two batch sizes of x, called as a `Traced` is.

    Attributes:
      whole: the trace for the larger batch.
      part: the other trace.
      size: size of the larger batch.
    """

    whole: Traced
    part: Traced
    size: int

    @staticmethod
    def are_of_rows(whole: tuple[Traced, list[Any]], part: tuple[Traced, list[Any]]) -> bool:
        """Whether two results of `trace` are one function of each row; see `batch_sizes`."""
        return is_of_rows((whole[0].jaxpr, whole[1]), (part[0].jaxpr, part[1]))

    @classmethod
    def of(cls, whole: tuple[Traced, list[Any]], part: tuple[Traced, list[Any]]) -> tuple["TracedForSizes", Any]:
        """The traces, and what both close over together, from two results of `trace`."""
        return cls(whole[0], part[0], whole[0].out.shape[0]), (whole[1], part[1])

    @property
    def out(self) -> Any:
        """The type of the output for the larger batch."""
        return self.whole.out

    def __call__(self, closed_over: Any, params: Any, x: Any, *condition: Any) -> Any:
        number = int(x.shape[0] != self.size)
        return (self.whole, self.part)[number](closed_over[number], params, x, *condition)


def trace(function: Callable[..., Any], *args: Any) -> tuple[Traced, list[Any]]:
    """(traced, closed_over) with traced(closed_over, *args) == function(*args). The args may be abstract."""
    # A new lambda in each call: for the same function JAX would return an earlier trace, even if its closure changed.
    jaxpr, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    return Traced(jaxpr.jaxpr, jax.tree.structure(shapes).unflatten(jaxpr.out_avals)), list(jaxpr.consts)


def trace_residual(
    g: Callable[..., Any], params: Any, name: str, like: jax.Array, *condition: Any
) -> tuple[Traced, list[Any]]:
    """`trace` of g(params, x, *condition), for an x like `like`, the argument called `name`.

    Raises:
      ValueError: unless g keeps the shape and dtype of x.
    """
    traced, closed_over = trace(g, params, like, *condition)
    check_like("g", traced.out, like, name)
    return traced, closed_over


def run(function: Callable[..., Any], static: tuple[Any, ...], *args: Any) -> Any:
    """Computes function(*static, *args), compiled if the call is eager; the last 128 programs are cached.

    A call is eager outside of every jit, scan and shard_map; it may be inside grad or vmap. Otherwise the function is
    traced in place.

    Args:
      function: a pure function.
      static: hashable values.
      *args: pytrees of arrays.
    """
    return _compiled(function, static)(*args) if _is_eager() else function(*static, *args)


@lru_cache(maxsize=COMPILED)
def _compiled(function: Callable[..., Any], static: tuple[Any, ...]) -> Callable[..., Any]:
    return jax.jit(partial(function, *static))


def _is_eager() -> bool:
    """Whether operations are evaluated immediately, perhaps under grad, jvp or vmap."""
    running = running_trace()
    while running is not None and not isinstance(running, EvalTrace):
        if not hasattr(running, "parent_trace") or not _is_of_values(running):
            return False
        running = running.parent_trace
    return True


def _is_of_values(running: Any) -> bool:
    """Whether a trace evaluates operations (with derivatives or batches) instead of recording a program."""
    return type(running).__name__ in ("JVPTrace", "LinearizeTrace", "BatchTrace")


def _is_same_jaxpr(a: Jaxpr, b: Jaxpr) -> bool:
    """Whether two programs are equal up to the names of their variables."""
    numbers: tuple[dict[Any, int], dict[Any, int]] = {}, {}

    def define(one: list[Any], other: list[Any]) -> bool:
        for variables, number in zip((one, other), numbers, strict=True):
            for variable in variables:
                number[variable] = len(number)
        return len(one) == len(other) and all(p.aval == q.aval for p, q in zip(one, other, strict=True))

    def is_same_atom(p: Any, q: Any) -> bool:
        if isinstance(p, Literal) or isinstance(q, Literal):
            same_kind = type(p) is type(q) and p.aval == q.aval
            return same_kind and (p.val is q.val or np.asarray(p.val).tobytes() == np.asarray(q.val).tobytes())
        return numbers[0][p] == numbers[1][q]

    def are_same_atoms(one: list[Any], other: list[Any]) -> bool:
        return len(one) == len(other) and all(map(is_same_atom, one, other))

    if len(a.eqns) != len(b.eqns) or not (define(a.constvars, b.constvars) and define(a.invars, b.invars)):
        return False
    for p, q in zip(a.eqns, b.eqns, strict=True):
        if p.primitive is not q.primitive or not are_same_atoms(p.invars, q.invars):
            return False
        if not (_is_same(p.params, q.params) and define(p.outvars, q.outvars)):
            return False
    return are_same_atoms(a.outvars, b.outvars)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two parameters of operations are certainly equal; False if that is unknown."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, ClosedJaxpr):
        # Arrays inside of an inner program cannot become arguments, so they must be identical objects.
        same_arrays = len(a.consts) == len(b.consts) and all(p is q for p, q in zip(a.consts, b.consts, strict=True))
        return same_arrays and _is_same_jaxpr(a.jaxpr, b.jaxpr)
    if isinstance(a, Jaxpr):
        return _is_same_jaxpr(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, WrappedFun):  # JAX's wrapper of a derivative rule
        return all(_is_same(getattr(a, name), getattr(b, name)) for name in ("f", "transforms", "params"))
    if isinstance(a, FunctionType):
        return _is_same_wrapper(a, b)
    if isinstance(a, float):
        return a.hex() == b.hex()  # distinguishes 0.0 and -0.0, and NaN equals NaN
    try:
        return bool(a == b)
    except Exception:  # an array, or a type without equality
        return False


# Closure variables of JAX's function wrappers that hold results, and do not affect what the wrapper computes.
_STATE = frozenset({"cells", "sentinel", "self", "out_store", "store"})


def _is_same_wrapper(a: FunctionType, b: FunctionType) -> bool:
    """Whether two of JAX's function wrappers do the same. Other functions are equal only if they are identical."""
    if a.__code__ is not b.__code__ or not (a.__module__ or "").startswith("jax."):
        return False
    if not (_is_same(a.__defaults__, b.__defaults__) and _is_same(a.__kwdefaults__, b.__kwdefaults__)):
        return False
    cells = zip(a.__code__.co_freevars, a.__closure__ or (), b.__closure__ or (), strict=True)
    return all(name in _STATE or _is_same(p.cell_contents, q.cell_contents) for name, p, q in cells)
