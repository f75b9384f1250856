"""Spectral norms by power iteration, and the soft normalisation that uses them.

Power iteration alternates u <- W v / |W v| and v <- W^T u / |W^T u|; then
sigma = u^T W v grows monotonically towards the largest singular value, from
below. W is any linear map given as a callable and its transpose, so for a
convolution it is the zero-padded convolution on its real spatial size, never the
reshaped kernel (Gouk et al. 2018, arXiv 1804.04368; Behrmann et al. 2019, arXiv
1811.00995, appendix D).

Soft normalisation W * min(1, c / sigma) leaves a map of norm below c alone.
Gradients flow through sigma = u^T W v with u and v held fixed, which is the
derivative of the largest singular value at convergence.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.checks import check_count, check_positive

Array = jax.Array
LinearFunction = Callable[[Array], Array]


class PowerIterationStatus(NamedTuple):
    """How a power iteration ended. Scalars, or stacked under vmap.

    Attributes:
      iterations: pairs of products (W v, W^T u) done.
      residual: |W^T u - sigma v| / sigma at the last iterate before the final v; there is a
        singular value within residual * sigma of sigma, and it is the largest one unless the
        start was orthogonal to its vector.
      converged: whether the tolerances on sigma and on the residual were both met.
    """

    iterations: Array
    residual: Array
    converged: Array


class PowerIteration(NamedTuple):
    """Result of `power_iteration`: sigma = u^T W v, unit vectors u and v, and the status."""

    sigma: Array
    u: Array
    v: Array
    status: PowerIterationStatus


def power_iteration(
    matvec: LinearFunction,
    rmatvec: LinearFunction,
    v: Array,
    *,
    tolerance: float = 1e-3,
    residual_tolerance: float | None = None,
    max_iterations: int = 200,
    iterations: int | None = None,
) -> PowerIteration:
    """Estimates the largest singular value of a linear map, warm-started at v.

    It stops once the relative change of sigma over one iteration is at most `tolerance` and the
    residual |W^T u - sigma v| / sigma is at most `residual_tolerance`. Both are relative to the
    whole vector; a test per element, as in the PyTorch implementation, is nearly vacuous for the
    long vectors of a convolution. sigma errs by about residual^2 / (relative gap of the spectrum): a
    crowded spectrum, as of wide convolutions, asks for a tolerance of 1e-6 or less.

    Args:
      matvec: v -> W v, linear.
      rmatvec: u -> W^T u, its transpose.
      v: start vector of matvec's input shape, not orthogonal to the leading one; need not be unit.
      tolerance: bound on the relative change of sigma.
      residual_tolerance: bound on the residual; by default the square root of `tolerance`.
      max_iterations: cap on the iterations; reaching it shows as `converged` False.
      iterations: if given, exactly this many iterations are run and the status only reports.

    Returns:
      `PowerIteration(sigma, u, v, status)`; where W is zero u is zero and v stays. Not differentiable
      by itself: pass u and v to `spectral_norm`.

    Raises:
      ValueError: if a tolerance is not positive or a count is below one.
    """
    check_positive("tolerance", tolerance)
    if residual_tolerance is None:
        residual_tolerance = tolerance**0.5
    check_positive("residual_tolerance", residual_tolerance)
    cap, name = (max_iterations, "max_iterations") if iterations is None else (iterations, "iterations")
    check_count(name, cap, 1)

    def step(state: tuple[Array, PowerIteration]) -> tuple[Array, PowerIteration]:
        old = state[1]
        u, sigma_half = _unit(matvec(old.v))
        w = rmatvec(u)
        residual = _norm(w - sigma_half * old.v) / _positive(sigma_half)
        v_new, sigma = _unit(w)
        v_new = jnp.where(sigma > 0, v_new, old.v)  # a zero map must not spoil the next warm start
        change = jnp.abs(sigma - old.sigma) / _positive(sigma)
        converged = (change <= tolerance) & (residual <= residual_tolerance)
        status = PowerIterationStatus(old.status.iterations + 1, residual, converged)
        return ~converged, PowerIteration(sigma, u, v_new, status)

    def unfinished(state: tuple[Array, PowerIteration]) -> Array:
        running, result = state
        below_cap = result.status.iterations < cap
        return below_cap & running if iterations is None else below_cap

    v = lax.stop_gradient(_unit(v)[0])
    u_like = jax.eval_shape(matvec, v)
    infinity = jnp.asarray(jnp.inf, v.dtype)
    status = PowerIterationStatus(jnp.asarray(0), infinity, jnp.asarray(False))
    start = PowerIteration(infinity, jnp.zeros(u_like.shape, u_like.dtype), v, status)
    # The first step cannot meet the test on the change of sigma: it starts from infinity.
    return lax.while_loop(unfinished, step, (jnp.asarray(True), start))[1]


def spectral_norm(matvec: LinearFunction, u: Array, v: Array) -> Array:
    """sigma = u^T W v with u and v held fixed: differentiable in whatever matvec closes over."""
    return jnp.vdot(lax.stop_gradient(u), matvec(lax.stop_gradient(v)))


def soft_normalize(kernel: Array, sigma: Array, coefficient: float) -> Array:
    """kernel * min(1, coefficient / sigma): norm at most `coefficient` if sigma is exact."""
    return kernel / jnp.maximum(1.0, sigma / coefficient)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _positive(x: Array) -> Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _unit(x: Array) -> tuple[Array, Array]:
    norm = _norm(x)
    return x / _positive(norm), norm
