"""The inverse of y = x + g(x), by any solver of x = y - g(x), with an implicit derivative.

The derivative comes from the implicit function theorem: dx = (I + J)^-1 (dy - dg), where
(I + J)^-1, and its transpose in reverse mode, are applied by the same solver, to u = b - J u.
Nothing of the iterations is stored.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.checks import check_choice, check_residual
from resflow_jax.functional.iteration import ON_FAILURE, InverseStatus, Solver, example_max, iterate, wide_dtype
from resflow_jax.functional.solvers import Anderson

Array = jax.Array


class InverseError(RuntimeError):
    """An inverse, or its derivative, did not converge, and the solver was told to raise."""


def residual_inverse(
    g: Callable[[Any, Array], Array],
    params: Any,
    y: Array,
    *,
    solver: Solver = Anderson(),
    return_status: bool = False,
) -> Array | tuple[Array, InverseStatus]:
    """Solves x + g(params, x) = y for x, each example to its own tolerance.

    Differentiable in params, y and whatever g closes over, in any mode and order.

    Args:
      g: pure function (params, x) -> array of x's shape and dtype, a contraction in x, each
        example of the batch by itself.
      params: any pytree.
      y: floats [B, ...].
      solver: `FixedPoint`, `Anderson` or `Broyden`, with its tolerance and iteration cap.
      return_status: whether to return the status as well.

    Returns:
      x like y, or (x, `InverseStatus`). Without the status, an example that did not converge is
      reported as `solver.on_failure` says; see `report_unconverged`. The solves of the derivative
      always are.

    Raises:
      ValueError: if y is not a float array with a batch axis or g changes its shape or dtype.
      InverseError: if an example did not converge and `solver.on_failure` is "raise".
    """
    check_residual("y", g, params, y)

    def solve(equation, start):
        # Not x - equation(x): its rounding would be added to that of y - g(x).
        x, status = iterate(lambda x: y - g(params, x), start, solver, jnp.maximum(1, example_max(y)))
        wide = wide_dtype(y.dtype)  # custom_root wants float aux, and counts may pass 256
        return x, jax.tree.map(lambda leaf: leaf.astype(wide), status)

    def solve_linear(operator, b):
        # operator(u) = u + J u, or its transpose in reverse mode. The solution is linear in b, so its
        # accuracy must not depend on b's scale: the tolerance is relative to max |b|.
        u, status = iterate(lambda u: b - (operator(u) - u), b, solver, example_max(b))
        report_unconverged(status, "the derivative of the inverse", solver.on_failure)
        return u

    def tangent_solve(operator, b):
        return lax.custom_linear_solve(operator, b, solve_linear, solve_linear)

    x, aux = lax.custom_root(lambda x: x + g(params, x) - y, y, solve, tangent_solve, has_aux=True)
    iterations, residual, residual_norm, converged = lax.stop_gradient(aux)
    residual, residual_norm = residual.astype(y.dtype), residual_norm.astype(y.dtype)
    status = InverseStatus(iterations.astype(jnp.int32), residual, residual_norm, converged > 0)
    if return_status:
        return x, status
    report_unconverged(status, "residual_inverse", solver.on_failure)
    return x


def report_unconverged(status: InverseStatus, what: str, on_failure: str) -> None:
    """Warns or raises, as a solver's `on_failure` says, if an example did not converge.

    Works under jit, by a host callback: an `InverseError` surfaces there as a JaxRuntimeError that
    quotes it, once the result is waited for.

    Args:
      status: of a solve, with any leading axes.
      what: what was solved, the start of the message.
      on_failure: "warn" for a RuntimeWarning, "raise" for an `InverseError`.
    """
    check_choice("on_failure", on_failure, ON_FAILURE)
    jax.debug.callback(partial(_report, what=what, on_failure=on_failure), status.converged, status.residual)


def _report(converged: np.ndarray, residual: np.ndarray, what: str, on_failure: str) -> None:
    failed = ~np.asarray(converged)
    if not failed.any():
        return
    largest = np.max(np.asarray(residual, float)[failed])
    message = f"{what}: {failed.sum()} of {failed.size} examples did not converge; largest residual {largest:.2e}"
    if on_failure == "raise":
        raise InverseError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
