"""The inverse of y = x + g(x), by any solver of x = y - g(x), with an implicit derivative.

The derivative comes from the implicit function theorem: dx = (I + J)^-1 (dy - dg), where
(I + J)^-1, and its transpose in reverse mode, are applied by the same solver, to u = b - J u.
Nothing of the iterations is stored.

A solve reports by its status; nothing inside a compiled program calls back to Python, which could wait for ever for
the thread that it blocks. Where no status is asked for and an example has not converged:

                          on_failure="warn"             on_failure="raise"
    an eager call         RuntimeWarning, best guess    InverseError
    inside jit or vmap    best guess                    NaN for the example
    a derivative          NaN for the example           NaN for the example

An eager call has to wait for its result; under grad alone it is eager still.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.checks import as_float_batch
from resflow_jax.functional.conditions import arguments, as_condition, check_map
from resflow_jax.functional.events import Events, is_tree
from resflow_jax.functional.iteration import InverseStatus, Solver, example_max, iterate, wide_dtype
from resflow_jax.functional.primitives.tracing import Traced, run, trace_residual
from resflow_jax.functional.solvers import Anderson

Array = jax.Array


class InverseError(RuntimeError):
    """An inverse did not converge in an eager call, and the solver was told to raise."""


def residual_inverse(
    g: Callable[..., Array],
    params: Any,
    y: Any,
    *,
    condition: Any = None,
    solver: Solver = Anderson(),
    return_status: bool = False,
) -> Any | tuple[Any, InverseStatus]:
    """Solves x + g(params, x) = y, or x + g(params, x, condition) = y, for x, each example to its own tolerance.

    Differentiable in params, y, the floats of the condition and whatever g closes over, in any mode and order. An eager
    call compiles once for equal g, shapes and kind of solver, whatever its tolerance and cap.

    Args:
      g: pure function (params, x) -> array of x's shape and dtype, a contraction in x, each
        example of the batch by itself. It may close over arrays of any dtype, traced ones too.
      params: any pytree.
      y: floats [B, ...], or a pytree of such of one batch size and dtype; g then takes and returns trees like y.
      condition: what else g depends on, example by example: None, or any pytree of arrays [B, ...] of any dtype. g is
        then called as g(params, x, condition), and has to contract in x alone.
      solver: `FixedPoint`, `Anderson` or `Broyden`, with its tolerance and iteration cap.
      return_status: whether to return the status as well.

    Returns:
      x like y, or (x, `InverseStatus`). Without the status, an example that did not converge is reported as
      `solver.on_failure` says; see the table in the head of this module. An example that is not finite ends at once,
      unconverged.

    Raises:
      ValueError: if y is not a float array with a batch axis, if g changes its shape or dtype, if solver is none, if
        an array of the condition has not the batch axis of y, or if g does not take a condition.
      InverseError: in an eager call, if an example did not converge and `solver.on_failure` is "raise".
    """
    check_map(g, condition)
    events = None
    if is_tree(y):
        events, y = Events.of("y", y, least=0)
        g = events.wrap(g)
    y = as_float_batch("y", y, least=0)
    condition = as_condition(condition, "y", y)
    check_solver(solver)
    y = vary_over(y, varying_axes((y, params, condition)))
    traced, closed_over = trace_residual(g, params, "y", *arguments(y, condition))
    if missing := set(varying_axes(traced.out)) - set(varying_axes(y)):  # what g closes over differs over more axes
        y = vary_over(y, tuple(sorted(missing)))
        traced, closed_over = trace_residual(g, params, "y", *arguments(y, condition))
    rule, limits = solver.split(y.dtype)
    x, status = run(_solve, (traced, rule), limits, closed_over, params, condition, y)
    x = x if events is None else events.unpack(x)
    return (x, status) if return_status else reported(x, status, "residual_inverse", solver.on_failure)


def check_solver(solver: Any) -> None:
    """Raises ValueError for anything but a solver."""
    if not isinstance(solver, Solver):
        raise ValueError(f"solver: expected Anderson(), FixedPoint() or Broyden(), got {solver!r}")


def _solve(
    g: Traced, rule: Solver, limits: Any, closed_over: Any, params: Any, condition: Any, y: Array
) -> tuple[Array, InverseStatus]:
    solver = rule.with_limits(limits)

    def solve(equation, start):
        # Not x - equation(x): its rounding would be added to that of y - g(x).
        scale = jnp.maximum(1, example_max(y))
        x, status = iterate(lambda x: y - g(closed_over, params, x, condition), start, solver, scale)
        wide = wide_dtype(y.dtype)  # custom_root wants float aux, and counts may pass 256
        return x, jax.tree.map(lambda leaf: leaf.astype(wide), status)

    def solve_linear(operator, b):
        # operator(u) = u + J u, or its transpose in reverse mode. The solution is linear in b, so its
        # accuracy must not depend on b's scale: the tolerance is relative to max |b|.
        u, status = iterate(lambda u: b - (operator(u) - u), b, solver, example_max(b))
        return _nan_where_unconverged(u, status.converged)

    def tangent_solve(operator, b):
        return lax.custom_linear_solve(operator, b, solve_linear, solve_linear)

    def equation(x):
        return x + g(closed_over, params, x, condition) - y

    x, aux = lax.custom_root(equation, y, solve, tangent_solve, has_aux=True)
    iterations, residual, residual_norm, converged = lax.stop_gradient(aux)
    residual, residual_norm = residual.astype(y.dtype), residual_norm.astype(y.dtype)
    return x, InverseStatus(iterations.astype(jnp.int32), residual, residual_norm, converged > 0)


def reported(x: Any, status: InverseStatus, what: str, on_failure: str) -> Any:
    """x, after a warning or an error in an eager call, or with NaN in a compiled program; see the module's head.

    Args:
      x: array [B, ...], or a tree of such, of examples whose solves have this status.
      status: with fields [B], or [blocks, B], of which an example needs all.
      what: what was solved, the start of the message.
      on_failure: as of a solver.

    Raises:
      InverseError: if on_failure is "raise" and the status, not traced, tells of an example that did not converge.
    """
    if isinstance(status.converged, jax.core.Tracer):
        if on_failure == "warn":
            return x
        converged = _of_all_blocks(status.converged)
        return jax.tree.map(lambda leaf: _nan_where_unconverged(leaf, converged), x)
    if status.converged.is_fully_addressable:
        failed, largest = _worst(np, np.asarray(status.converged), np.asarray(status.residual, float))
    else:  # on devices of several processes: numbers that each of them can read
        failed, largest = jax.jit(partial(_worst, jnp))(status.converged, status.residual)
    if failed:
        message = f"{what}: {failed} of {status.converged.shape[-1]} examples did not converge; largest residual "
        message += f"{largest:.2e}"
        if on_failure == "raise":
            raise InverseError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return x


def _worst(xp: Any, converged: Any, residual: Any) -> tuple[Any, Any]:
    """How many examples failed in any block, and the largest residual of a solve that failed."""
    return (~_of_all_blocks(converged)).sum(), xp.max(xp.where(converged, -xp.inf, residual), initial=-xp.inf)


def _of_all_blocks(converged: Any) -> Any:
    """[B] of [B] or [blocks, B]."""
    return converged.all(axis=tuple(range(converged.ndim - 1)))


def _nan_where_unconverged(x: Array, converged: Array) -> Array:
    return jnp.where(per_example(converged, x), x, jnp.nan)
