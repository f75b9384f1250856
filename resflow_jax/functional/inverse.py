"""The inverse of y = x + g(x): the solution of x = y - g(x), with an implicit derivative.

The derivative comes from the implicit function theorem: dx = (I + J)^-1 (dy - dg). The same solver applies (I + J)^-1,
or its transpose in reverse mode, as the solution of u = b - J u. The iterations are not stored.

Products in g have the full precision of their dtype (see `primitives.precision`): with the rounded factors that are the
default of GPUs and TPUs no solve would reach a tolerance of 1e-6.

A solve reports through its status. A compiled program never calls back to Python, since such a call can deadlock. If no
status is requested, an example that has not converged is reported thus:

                          on_failure="warn"             on_failure="raise"
    an eager call         RuntimeWarning, best guess    InverseError
    inside jit or vmap    best guess                    NaN for the example
    a derivative          NaN for the example           NaN for the example

An eager call waits for its result. A call under grad, but outside of jit, is eager too.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.batch_axes import check_automatic, vary_alike, vary_over, varying_axes
from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.checks import as_float_batch, check_flag
from resflow_jax.functional.conditions import arguments, as_condition, check_map
from resflow_jax.functional.events import Events, is_tree
from resflow_jax.functional.iteration import InverseStatus, Solver, example_max, iterate
from resflow_jax.functional.primitives.derivatives import reverse_only
from resflow_jax.functional.primitives.precision import full_precision, wide_dtype
from resflow_jax.functional.primitives.tracing import Traced, run, trace_residual
from resflow_jax.functional.solvers import Anderson
from resflow_jax.functional.trees import kept
from resflow_jax.functional.values import number_of_overflows

Array = jax.Array


class InverseError(RuntimeError):
    """The inverse of an eager call did not converge or is not finite, and the solver has `on_failure="raise"`.

    The message gives the number of such examples, and the largest residual of those that did not converge.

    Example:
      >>> solver = rf.FixedPoint(max_iterations=2, on_failure="raise")
      >>> try:
      ...     rf.residual_inverse(lambda w, x: w * x, 0.9, jnp.ones((3, 1)), solver=solver)
      ... except rf.InverseError as error:
      ...     print(error)
      residual_inverse: 3 of 3 examples did not converge; largest residual 8.10e-01
    """


def residual_inverse(
    g: Callable[..., Array],
    params: Any,
    y: Any,
    *,
    condition: Any = None,
    solver: Solver = Anderson(),
    return_status: bool = False,
) -> Any | tuple[Any, InverseStatus]:
    """Solves x + g(params, x) = y, or x + g(params, x, condition) = y, for x.

    The solution exists and is unique if g is a contraction in x (Banach; Behrmann et al. 2019, arXiv 1811.00995,
    algorithm 1). Each example stops at its own tolerance. `InverseStatus.error_bound` bounds the error.

    The result is differentiable in params, y, the floats of the condition and whatever g closes over, in any mode and
    order, by the implicit function theorem. An eager call compiles once for equal g, shapes and kind of solver; other
    tolerances and caps do not recompile. The function is deterministic.

    Cost: one evaluation of g for each iteration of the slowest example, about log(tolerance) / log(L) for
    `FixedPoint` and often far fewer for `Anderson`; for a derivative as many jvps or vjps of g.

    Args:
      g: pure function (params, x) -> array of x's shape and dtype. It must be a contraction in x and treat the
        examples of a batch independently. It may close over arrays of any dtype, including traced ones.
      params: any pytree.
      y: floats [B, ...], or a pytree of such arrays with one batch size and dtype; g then takes and returns such trees.
      condition: None, or any pytree of arrays [B, ...] of any dtype, one row for each example. g is then called as
        g(params, x, condition), and must be a contraction in x for every condition.
      solver: `FixedPoint`, `Anderson` or `Broyden`, with its tolerance and cap on iterations.
      return_status: whether to return the status as well.

    Returns:
      x like y, or (x, `InverseStatus`). Without the status, examples that did not converge are reported as
      `solver.on_failure` says; see the table at the head of this module. An example with numbers that are not finite
      stops at once, unconverged.

    Raises:
      ValueError: if y is not a float array with a batch axis, if g changes its shape or dtype, if `solver` is not a
        solver, if an array of the condition has another batch size than y, or if g does not take a condition.
      InverseError: in an eager call, if an example did not converge and `solver.on_failure` is "raise".

    Example:
      >>> g = lambda w, x: 0.5 * jnp.sin(w * x)
      >>> x = jnp.arange(6.0).reshape(3, 2)
      >>> found, status = rf.residual_inverse(g, 1.0, x + g(1.0, x), return_status=True)
      >>> bool(jnp.allclose(found, x, atol=1e-4)), status.converged.tolist()
      (True, [True, True, True])
    """
    check_flag("return_status", return_status)
    check_map(g, condition)
    events = None
    if is_tree(y):
        events, y = Events.of("y", y, least=0)
        g = events.wrap(g)
    x, status = solution(g, params, as_float_batch("y", y, least=0), condition, solver)
    x = x if events is None else events.unpack(x)
    return (x, status) if return_status else reported(x, status, "residual_inverse", solver.on_failure)


def solution(
    g: Callable[..., Array],
    params: Any,
    y: Array,
    condition: Any,
    solver: Solver,
    *,
    orders: int = 0,
    name: str = "y",
) -> tuple[Array, InverseStatus]:
    """The solution x of x + g(params, x, *condition) = y and its status.

    Args:
      g: as in `residual_inverse`.
      params: any pytree.
      y: floats [B, ...].
      condition: as in `residual_inverse`.
      solver: a solver.
      orders: orders of the reverse mode that keeps only the solution, 1 or 2, see `solve_and_recompute`; 0 for `solve`.
      name: name of y, for errors.
    """
    check_solver(solver)
    check_map(g, condition)
    check_automatic(name, y)
    condition = as_condition(condition, name, y)
    y = vary_over(y, varying_axes((y, params, condition)))
    with full_precision():
        traced, closed_over = trace_residual(g, params, name, *arguments(y, condition))
        missing = set(varying_axes(traced.out)) - set(varying_axes(y))
        if missing:  # g closes over arrays that vary over more axes
            y = vary_over(y, tuple(sorted(missing)))
            traced, closed_over = trace_residual(g, params, name, *arguments(y, condition))
        rule, limits = solver.split(y.dtype)
        method, settings = (solve_and_recompute, (orders,)) if orders else (solve, ())
        return run(method, (*settings, traced, rule), limits, closed_over, params, condition, y)


def check_solver(solver: Any) -> None:
    """Raises ValueError unless this is a solver."""
    if not isinstance(solver, Solver):
        raise ValueError(f"solver: expected Anderson(), FixedPoint() or Broyden(), got {solver!r}")


def solve(
    g: Traced, rule: Solver, limits: Any, closed_over: Any, params: Any, condition: Any, y: Array
) -> tuple[Array, InverseStatus]:
    """The solution and its status. Its derivatives have any mode and order; reverse mode stores g's activations."""
    solver = rule.with_limits(limits)

    def iterated(equation, start):
        # Not x - equation(x), which would add further rounding errors to those of y - g(x).
        scale = jnp.maximum(1, example_max(y))
        x, status = iterate(lambda x: y - g(closed_over, params, x, condition), start, solver, scale)
        wide = wide_dtype(y.dtype)  # custom_root takes only floats as aux, and bfloat16 cannot count beyond 256
        return x, jax.tree.map(lambda leaf: leaf.astype(wide), status)

    def equation(x):
        return x + g(closed_over, params, x, condition) - y

    x, aux = lax.custom_root(equation, y, iterated, partial(_solve_linear, solver), has_aux=True)
    iterations, residual, residual_norm, converged = lax.stop_gradient(aux)
    residual, residual_norm = residual.astype(y.dtype), residual_norm.astype(y.dtype)
    return x, InverseStatus(iterations.astype(jnp.int32), residual, residual_norm, converged > 0)


def _solve_linear(solver: Solver, operator: Callable[[Array], Array], b: Array) -> Array:
    """The solution u of operator(u) = b for operator(u) = u + J u, or its transpose; NaN where it does not converge."""

    def iterated(operator, b):
        # The solution is linear in b, so its accuracy must not depend on b's scale: the tolerance is relative to
        # max |b|.
        u, status = iterate(lambda u: b - (operator(u) - u), b, solver, example_max(b))
        return _nan_where_unconverged(u, status.converged)

    return lax.custom_linear_solve(operator, b, iterated, iterated)


def solve_and_recompute(
    orders: int, g: Traced, rule: Solver, limits: Any, closed_over: Any, params: Any, condition: Any, y: Array
) -> tuple[Array, InverseStatus]:
    """The same as `solve`, with a derivative for which only the solution is kept: g is evaluated again.

    Its derivatives are those of a Neumann estimate. With orders = 1: first-order reverse mode, and forward mode over
    that. With orders = 2: reverse mode, and reverse mode over that, also inside of a scan. (There JAX below 0.12 cannot
    differentiate `solve` twice in reverse mode.)
    """
    token = reverse_only((closed_over, params, condition, y))
    x, fields = _recomputing(orders, g, rule, limits, closed_over, params, condition, y, token)
    iterations, residual, residual_norm, converged = lax.stop_gradient(fields)
    return x, InverseStatus(iterations.astype(jnp.int32), residual, residual_norm, converged > 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _recomputing(orders, g, rule, limits, closed_over, params, condition, y, token):
    x, status = solve(g, rule, limits, closed_over, params, condition, y)
    # Floats: under a derivative, outputs of other dtypes would have no rules for the operations that follow.
    iterations, converged = (field.astype(jnp.float32) for field in (status.iterations, status.converged))
    return x, status._replace(iterations=iterations, converged=converged)


def _recomputing_forward(orders, g, rule, limits, closed_over, params, condition, y, token):
    inputs = limits, closed_over, params, condition
    if orders == 2:  # the solution has this rule again
        found = _recomputing(orders, g, rule, *inputs, y, token)
        return found, kept((*inputs, found[0]))
    found = _recomputing.__wrapped__(orders, g, rule, *inputs, y, token)  # it has that of `solve`
    return found, (*inputs, found[0])


def _recomputing_backward(orders, g, rule, known, cotangents):
    limits, closed_over, params, condition, x = known
    _, transposed = jax.vjp(lambda x: g(closed_over, params, x, condition), x)
    u = _solve_linear(rule.with_limits(limits), lambda u: u + transposed(u)[0], cotangents[0])
    _, pullback = jax.vjp(lambda *args: -g(*args[:2], x, args[2]), closed_over, params, condition)
    return None, *pullback(u), u, None


_recomputing.defvjp(_recomputing_forward, _recomputing_backward)


def reported(x: Any, status: InverseStatus, what: str, on_failure: str) -> Any:
    """Reports examples that did not converge, as the table at the head of this module says, and returns x.

    If all solves converged, an eager call reports examples that are not finite in the same way: an explicit inverse
    that overflowed has no status of its own.

    Args:
      x: solutions [B, ...], or a pytree of such arrays. In a compiled program the result may have NaN for examples;
        derivatives may in every program.
      status: its fields are [B] or [blocks, B]. An example has converged if it did in all blocks.
      what: name of the solve, the start of the message.
      on_failure: "warn" or "raise".

    Raises:
      InverseError: if `on_failure` is "raise", the status is concrete, and an example did not converge.
    """
    if isinstance(status.converged, jax.core.Tracer):
        return _marked(x, status, on_failure == "raise")
    if status.converged.is_fully_addressable:
        failed, largest = _worst(np, np.asarray(status.converged), np.asarray(status.residual, float))
    else:  # on devices of several processes: two numbers that every process can read
        failed, largest = jax.jit(partial(_worst, jnp))(status.converged, status.residual)
    others = 0 if failed else number_of_overflows(x)
    if failed or others:
        message = f"{what}: {failed or others} of {status.converged.shape[-1]} examples "
        message += f"did not converge; largest residual {largest:.2e}" if failed else "are not finite"
        if on_failure == "raise":
            raise InverseError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return _marked(x, status, False) if failed else x


def _worst(xp: Any, converged: Any, residual: Any) -> tuple[Any, Any]:
    """The number of examples that failed in some block, and the largest residual of a failed solve."""
    return (~_of_all_blocks(converged)).sum(), xp.max(xp.where(converged, -xp.inf, residual), initial=-xp.inf)


def _of_all_blocks(converged: Any) -> Any:
    """Whether each example converged in all blocks, [B], from [B] or [blocks, B]."""
    return converged.all(axis=tuple(range(converged.ndim - 1)))


def _marked(x: Any, status: InverseStatus, in_value: bool) -> Any:
    """x, with derivatives of NaN for examples that have not converged; their values are NaN too if `in_value`."""
    converged = _of_all_blocks(status.converged)
    return jax.tree.map(lambda leaf: _judged(in_value, *vary_alike(leaf, converged)), x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _judged(in_value: bool, x: Array, converged: Array) -> Array:
    return _nan_where_unconverged(x, converged) if in_value else x


@_judged.defjvp
def _judged_jvp(in_value, primals, tangents):
    x, converged = primals
    # A product, not a selection: NaN times a cotangent of zero is NaN, and the transpose of a selection would be zero.
    factor = jnp.where(converged, 1, jnp.nan).astype(x.dtype)
    return _judged(in_value, x, converged), tangents[0] * per_example(factor, x)


def _nan_where_unconverged(x: Array, converged: Array) -> Array:
    return jnp.where(per_example(converged, x), x, jnp.nan)
