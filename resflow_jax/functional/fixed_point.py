"""The inverse of y = x + g(x), by fixed-point iteration with an implicit derivative.

    x <- y - g(x),     |x_n - x*| <= L^n / (1 - L) * |x_1 - x_0|      (Banach)

converges for every contraction g (Behrmann et al. 2019, arXiv 1811.00995, algorithm 1). Each
example stops by itself once no element of it moves by more than the tolerance,

    max |x_new - x| <= tolerance * max(1, max |x|, max |y|),

where x_new - x = y - g(x) - x is the residual of the equation (never its square), or once it
moves by at most 64 units of rounding and no longer less than before: no more can be had. The
derivative comes from the implicit function theorem: dx = (I + J)^-1 (dy - dg), where
(I + J)^-1, and its transpose in reverse mode, are applied by the same kind of iteration,
u <- b - J u. Nothing of the iterations is stored.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.checks import check_count, check_positive, check_residual

Array = jax.Array

_TOLERANCES = {16: 1e-2, 32: 1e-6, 64: 1e-12}  # by bits of the dtype


@dataclass(frozen=True)
class FixedPoint:
    """Settings of the fixed-point iteration.

    Attributes:
      tolerance: bound on the last step, relative to max(1, max |x|, max |y|) of the example; by
        default 1e-6 in float32, 1e-12 in float64, 1e-2 in 16-bit floats.
      max_iterations: cap on the evaluations of g; convergence takes about
        log(tolerance) / log(L) of them.

    Raises:
      ValueError: if the tolerance is not positive or the cap is below one.
    """

    tolerance: float | None = None
    max_iterations: int = 1000

    def __post_init__(self):
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        check_count("max_iterations", self.max_iterations, 1)

    def tolerance_for(self, dtype: Any) -> float:
        """The tolerance in force for arrays of this float dtype."""
        return _TOLERANCES[jnp.finfo(dtype).bits] if self.tolerance is None else self.tolerance


class InverseStatus(NamedTuple):
    """How the fixed-point iterations of a batch ended; every field has shape [B].

    Attributes:
      iterations: evaluations of g used by each example, summed over the blocks of a flow.
      residual: max |y - g(x) - x| one iterate before the x returned, the last step taken; the
        largest over the blocks of a flow. The error of x is at most residual * L / (1 - L) in the
        norm in which g has Lipschitz constant L.
      converged: whether the last step was within the tolerance or down to rounding, in every
        block of a flow.
    """

    iterations: Array
    residual: Array
    converged: Array


def residual_inverse(
    g: Callable[[Any, Array], Array],
    params: Any,
    y: Array,
    *,
    solver: FixedPoint = FixedPoint(),
    return_status: bool = False,
) -> Array | tuple[Array, InverseStatus]:
    """Solves x + g(params, x) = y for x, each example to its own tolerance.

    Differentiable in params, y and whatever g closes over, in any mode and order.

    Args:
      g: pure function (params, x) -> array of x's shape and dtype, a contraction in x, each
        example of the batch by itself.
      params: any pytree.
      y: floats [B, ...].
      solver: tolerance and iteration cap.
      return_status: whether to return the status as well.

    Returns:
      x like y, or (x, `InverseStatus`). Without the status, an example that did not converge
      raises a RuntimeWarning (from a host callback under jit).

    Raises:
      ValueError: if y is not a float array with a batch axis or g changes its shape or dtype.
    """
    check_residual("y", g, params, y)

    def solve(equation, start):
        # Not x - equation(x): its rounding would be added to that of y - g(x).
        x, status = _iterate(lambda x: y - g(params, x), start, solver, jnp.maximum(1, _example_max(y)))
        return x, jax.tree.map(lambda leaf: leaf.astype(y.dtype), status)  # custom_root wants float aux

    def solve_linear(operator, b):
        # operator(u) = u + J u, or its transpose in reverse mode. The solution is linear in b, so its
        # accuracy must not depend on b's scale: the tolerance is relative to max |b|.
        u, status = _iterate(lambda u: b - (operator(u) - u), b, solver, _example_max(b))
        warn_unconverged(status, "the derivative of the inverse")
        return u

    def tangent_solve(operator, b):
        return lax.custom_linear_solve(operator, b, solve_linear, solve_linear)

    x, aux = lax.custom_root(lambda x: x + g(params, x) - y, y, solve, tangent_solve, has_aux=True)
    iterations, residual, converged = lax.stop_gradient(aux)
    status = InverseStatus(iterations.astype(jnp.int32), residual, converged > 0)
    if return_status:
        return x, status
    warn_unconverged(status, "residual_inverse")
    return x


def warn_unconverged(status: InverseStatus, what: str) -> None:
    """Raises a RuntimeWarning on the host if an example did not converge; works under jit."""
    jax.debug.callback(_warn, status, what=what)


def _warn(status: InverseStatus, what: str) -> None:
    failed = ~status.converged
    if failed.any():
        warnings.warn(
            f"{what}: {failed.sum()} of {failed.size} examples did not converge; "
            f"largest last step {status.residual.max():.2e}",
            RuntimeWarning,
            stacklevel=2,
        )


def _iterate(
    step: Callable[[Array], Array], start: Array, solver: FixedPoint, scale: Array
) -> tuple[Array, InverseStatus]:
    """Repeats x <- step(x), freezing each example once its step is within tolerance * max(scale, max |x|)
    or down to rounding.
    """
    batch, tolerance = start.shape[0], solver.tolerance_for(start.dtype)
    rounding = 64 * jnp.finfo(start.dtype).eps

    def advance(state):
        x, status = state
        x_new = step(x)
        change = _example_max(x_new - x)
        size = jnp.maximum(scale, _example_max(x_new))
        stalled = (change <= rounding * size) & (change >= status.residual)
        small = (change <= tolerance * size) | stalled
        active = ~status.converged
        x = jnp.where(active.reshape(-1, *[1] * (x.ndim - 1)), x_new, x)
        return x, InverseStatus(
            status.iterations + active,
            jnp.where(active, change, status.residual),
            status.converged | small,
        )

    def unfinished(state):
        status = state[1]
        return jnp.any(~status.converged & (status.iterations < solver.max_iterations))

    status = InverseStatus(jnp.zeros(batch, jnp.int32), jnp.full(batch, jnp.inf, start.dtype), jnp.zeros(batch, bool))
    return lax.while_loop(unfinished, advance, (start, status))


def _example_max(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)
