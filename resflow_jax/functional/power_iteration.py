"""Induced norms by power iteration.

    ||W||_{p->q} = max_x ||W x||_q / ||x||_p

Power iteration alternates u <- J_q(W v) and v <- J_p*(W^T u), where J are the dual maps of `vector_norms` (Boyd 1974,
Linear Algebra Appl. 9; Higham 1992, doi 10.1007/BF01396242; for residual flows Chen et al. 2019, arXiv 1906.02735,
section on induced mixed norms). For p = q = 2 this is u <- W v / |W v|, v <- W^T u / |W^T u|.

sigma = u^T W v is a lower bound on the norm and never decreases. For 2 -> 2 it converges to the largest singular value,
for other orders to a local maximum. From a positive start that is the global maximum if W is positive and p >= q. In
general the computation of a p -> q norm is NP-hard. Several starts make a miss less likely but prove nothing; upper
bounds are in `norm_bounds`. Norms with p = 1 or q = inf have closed forms.

W is any linear map, given as a callable. For a convolution it is the zero-padded convolution on its real spatial size,
not the reshaped kernel (Gouk et al. 2018, arXiv 1804.04368; Behrmann et al. 2019, arXiv 1811.00995, appendix D).
Products have the full precision of their dtype (see `primitives.precision`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.checks import (
    as_float_array,
    as_float_batch,
    check_callable,
    check_count,
    check_order,
    check_positive,
    check_scalar,
    check_type,
)
from resflow_jax.functional.primitives.precision import full_precision
from resflow_jax.functional.starts import excludes_larger, fixed_start, mixed_start, unit
from resflow_jax.functional.texts import fields_text, span, values_of
from resflow_jax.functional.vector_norms import Order, conjugate, dual_map, is_order, positive

Array = jax.Array
LinearFunction = Callable[[Array], Array]


class PowerIterationStatus(NamedTuple):
    """How a power iteration ended. The fields are scalars, or stacked under vmap.

    Attributes:
      iterations: int32, number of pairs of products (W v, W^T u). With `restart` both chains do this number.
      residual: distance from stationarity at the last iterate before the final v. For domain 2 it is
        |W^T u - sigma v| / sigma; for 2 -> 2 there is a singular value within residual * sigma of sigma. For other
        orders residual^2 is about twice the gap in Holder's inequality <W^T u, v> <= ||W^T u||_{p*} ||v||_p, relative
        to sigma (for domains 1 and inf it is the gap itself).
      converged: bool, whether the tolerances on sigma and on the residual were both met and, with `restart`, the second
        chain excludes a 2 -> 2 norm more than 1 % above sigma (see `functional.starts`).

    Example:
      >>> w = jnp.diag(jnp.array([3.0, 1.0]))
      >>> status = rf.power_iteration(lambda v: w @ v, jnp.ones(2), max_iterations=1).status
      >>> status.iterations.item(), status.converged.item()
      (1, False)
    """

    iterations: Array
    residual: Array
    converged: Array

    def __repr__(self) -> str:
        fields = [values_of(field) for field in self]
        if any(field is None or not field.size for field in fields):
            return fields_text(self)
        iterations, residual, converged = fields
        is_all = "converged" if converged.all() else "NOT converged"
        if converged.size > 1:
            is_all = f"{np.count_nonzero(converged)} of {converged.size} converged"
        return (
            f"PowerIterationStatus: {is_all}, iterations {span(iterations)}, residual {span(residual, '{:.1e}'.format)}"
        )


class PowerIteration(NamedTuple):
    """Result of `power_iteration`.

    Attributes:
      sigma: scalar u^T W v, a lower bound on the norm of W; equal to it at convergence for 2 -> 2.
      u: array of W's output shape, of unit norm in the norm dual to the codomain's.
      v: array of W's input shape, of unit norm in the domain.
      status: `PowerIterationStatus`.

    Example:
      >>> w = jnp.array([[0.0, 2.0], [1.0, 0.0]])
      >>> sigma, u, v, status = rf.power_iteration(lambda v: w @ v, jnp.ones(2), tolerance=1e-6)
      >>> bool(jnp.isclose(sigma, 2.0)), bool(jnp.isclose(jnp.vdot(u, w @ v), sigma))
      (True, True)
    """

    sigma: Array
    u: Array
    v: Array
    status: PowerIterationStatus


@full_precision()
def power_iteration(
    matvec: LinearFunction,
    v: Array,
    *,
    rmatvec: LinearFunction | None = None,
    domain: Order = 2.0,
    codomain: Order = 2.0,
    tolerance: float | Array = 1e-3,
    residual_tolerance: float | Array | None = None,
    max_iterations: int | Array = 1000,
    iterations: int | None = None,
    restart: bool = True,
    scale: Array | None = None,
) -> PowerIteration:
    """Estimates ||W||_{domain -> codomain} from below, by default the largest singular value, starting from v.

    For orders other than 2 -> 2 the result can be a local maximum, below the norm: use `best_start` first.

    The iteration stops when the relative change of sigma in one iteration is at most `tolerance` and the residual (see
    `PowerIterationStatus`) is at most `residual_tolerance`. For 2 -> 2 the relative error of sigma is about
    residual^2 / (relative gap of the spectrum). Wide convolutions have small gaps: use a tolerance of 1e-6 or less.

    If W has a symmetry, some v stay in a subspace where sigma is too small. Two deterministic measures prevent that:

    1. A fixed pseudo-random direction is added to v, with a length of a twentieth of `residual_tolerance`. Over many
       warm-started calls, as in training, the components that v lacks grow from it.
    2. With `restart`, a second chain starts from this direction, in the same loop. The result is the chain with the
       larger sigma. The loop runs until the second chain excludes a norm more than 1 % above sigma.

    Each iteration costs one product with W and one with W^T, for two vectors with `restart`. No g is evaluated.

    Args:
      matvec: v -> W v, linear, between arrays of any shapes.
      v: start vector, floats of matvec's input shape, of any length. Zero starts from the fixed direction.
      rmatvec: the transpose u -> W^T u. None lets JAX transpose matvec.
      domain: order p of the norm of v, a number in [1, inf] or an array strictly between.
      codomain: order q of the norm of W v, likewise.
      tolerance: bound on the relative change of sigma. This and the next two may be traced.
      residual_tolerance: bound on the residual. None takes the square root of `tolerance`.
      max_iterations: cap on the iterations; if it is reached, `converged` is False.
      iterations: if given, exactly this number of plain iterations runs from v, without the fixed direction and without
        restart, as in the code of Chen et al. (2019). The status then cannot detect that v misses the norm.
      restart: whether the second chain runs. For a spectrum with small gaps it takes some hundred iterations, even if v
        has converged.
      scale: for 2 -> 2, a scalar within a factor of 1e6 of the norm of W or of its largest element. It keeps squares
        within the range of the dtype, and hardly affects the result. None computes one with one more product.

    Returns:
      `PowerIteration(sigma, u, v, status)`. If W is zero, u is zero and v stays the start. It has no derivative: pass u
      and v to `spectral_norm`. If sigma is not finite, the loop ends with `converged` False.

    Raises:
      ValueError: if a tolerance is not positive, or a count or an order is below one; traced values are not checked.
        If JAX cannot transpose matvec, for example because it is not linear.

    Example:
      >>> w = jnp.diag(jnp.array([3.0, 2.0]))
      >>> found = rf.power_iteration(lambda v: w @ v, jnp.ones(2), tolerance=1e-6)
      >>> print(f"{found.sigma:.4f} {found.status.converged}")
      3.0000 True
      >>> found = rf.power_iteration(lambda v: w @ v, jnp.ones(2), iterations=2)
      >>> print(f"{found.sigma:.4f} {found.status.iterations}")
      2.9320 2
    """
    v = as_float_array("v", v)
    if not v.size:
        raise ValueError(f"v: expected at least one number, got shape {v.shape}")
    check_type("restart", restart, bool)
    if scale is not None:
        check_scalar("scale", scale)
    rmatvec = _transposed(matvec, rmatvec, v)
    check_order("domain", domain)
    check_order("codomain", codomain)
    check_settings(tolerance, residual_tolerance, max_iterations)
    if iterations is not None:
        check_count("iterations", iterations, 1)
    restart = restart and iterations is None
    tolerance = jnp.asarray(tolerance, v.dtype)
    residual_tolerance = jnp.sqrt(tolerance) if residual_tolerance is None else jnp.asarray(residual_tolerance, v.dtype)
    cap = max_iterations if iterations is None else iterations
    v = lax.stop_gradient(v)
    v = mixed_start(v, domain, residual_tolerance) if iterations is None else unit(v, domain)
    is_spectral = is_order(domain, 2) and is_order(codomain, 2)
    if is_spectral and scale is None:
        scale = jnp.max(jnp.abs(matvec(v)))
    # The map is scaled once, instead of each of its products: their squares then fit any float type.
    scale = positive(lax.stop_gradient(scale)) if is_spectral else 1
    dual = _unit_and_norm if is_spectral else dual_map

    def advance(old: PowerIteration) -> PowerIteration:
        u, sigma_half = dual(matvec(old.v) / scale, codomain)
        w = rmatvec(u) / scale
        v_new, sigma = dual(w, conjugate(domain))
        v_new = jnp.where(sigma > 0, v_new, old.v)  # for a zero map v stays, as a start for the next call
        residual = _residual(w, old.v, sigma_half, v_new, sigma, domain)
        change = jnp.abs(sigma - old.sigma) / positive(sigma)
        converged = (change <= tolerance) & (residual <= residual_tolerance)
        return PowerIteration(sigma, u, v_new, PowerIterationStatus(old.status.iterations + 1, residual, converged))

    def judged(chains: PowerIteration) -> PowerIteration:
        """The result so far: the chain with the larger sigma, converged only if the second chain excludes more."""
        if not restart:
            return chains
        first, second = (jax.tree.map(lambda leaf, n=n: leaf[n], chains) for n in (0, 1))
        best = jax.tree.map(partial(jnp.where, second.sigma > first.sigma), second, first)
        status = best.status
        settled = excludes_larger(second.sigma, second.status.residual, status.iterations, v.size, best.sigma)
        return best._replace(status=status._replace(converged=status.converged & settled))

    def step(state: tuple[Array, PowerIteration]) -> tuple[Array, PowerIteration]:
        chains = (jax.vmap(advance) if restart else advance)(state[1])
        result = judged(chains)
        return ~result.status.converged & jnp.isfinite(result.sigma), chains

    def unfinished(state: tuple[Array, PowerIteration]) -> Array:
        running, chains = state
        below_cap = chains.status.iterations.ravel()[0].astype(getattr(cap, "dtype", jnp.result_type(int))) < cap
        return below_cap & running if iterations is None else below_cap

    # The first step cannot meet the test on the change of sigma: it starts from infinity.
    infinity = jnp.asarray(jnp.inf, v.dtype)
    status = PowerIterationStatus(jnp.asarray(0, jnp.int32), infinity, jnp.asarray(False))
    u = jax.eval_shape(matvec, v)
    w = jax.eval_shape(rmatvec, u)
    chains = PowerIteration(infinity, jnp.zeros(u.shape, u.dtype), v, status)
    if restart:
        second = chains._replace(v=fixed_start(v.shape, v.dtype, domain))
        chains = jax.tree.map(lambda *leaves: jnp.stack(leaves), chains, second)
    start = jnp.asarray(True), chains
    start = vary_over(start, varying_axes((v, u, w, domain, codomain)))
    result = judged(lax.while_loop(unfinished, step, start)[1])
    return result._replace(sigma=result.sigma * scale)


def check_settings(
    tolerance: float | Array, residual_tolerance: float | Array | None, max_iterations: int | Array
) -> None:
    """Raises ValueError unless the settings of `power_iteration` are valid. Traced scalars are not checked."""
    settings = {"tolerance": tolerance, "residual_tolerance": residual_tolerance, "max_iterations": max_iterations}
    for name, value in settings.items():
        if isinstance(value, Array) and value.shape:
            raise ValueError(f"{name}: expected a scalar, got shape {value.shape}")
        if isinstance(value, jax.core.Tracer):
            continue
        value = value.item() if isinstance(value, Array) else value
        if name == "max_iterations":
            check_count(name, value, 1)
        elif name == "tolerance" or value is not None:
            check_positive(name, value)


def _unit_and_norm(x: Array, _: Order) -> tuple[Array, Array]:
    """`dual_map` of order 2, for an x whose squares neither overflow nor underflow."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x)))
    return x / positive(norm), norm


def _transposed(matvec: LinearFunction, rmatvec: LinearFunction | None, v: Array) -> LinearFunction:
    """rmatvec with a check of its output shape, or the transpose of matvec if rmatvec is None."""
    check_callable("matvec", matvec)
    if rmatvec is None:
        return partial(_transpose, matvec, v.shape, v.dtype)
    check_callable("rmatvec", rmatvec)

    def checked(u):
        w = rmatvec(u)
        if w.shape != v.shape:
            raise ValueError(f"rmatvec: expected an output {v.shape} like v, got {w.shape}")
        return w

    return checked


def _transpose(matvec: LinearFunction, shape: tuple[int, ...], dtype: jnp.dtype, u: Array) -> Array:
    """W^T u, for a W that takes arrays of this shape and dtype."""
    # The input varies over the mesh axes that u varies over. Otherwise its cotangent would be summed over them.
    v = vary_over(jnp.zeros(shape, dtype), varying_axes(u))
    try:
        return jax.linear_transpose(matvec, v)(u)[0]
    except Exception as error:  # JAX raises errors of many kinds
        raise ValueError(
            f"matvec: expected a linear function that JAX can transpose; else give its transpose as rmatvec. "
            f"{type(error).__name__}: {error}"
        ) from error


def best_start(
    matvec: LinearFunction, starts: Array, *, rmatvec: LinearFunction | None = None, **settings
) -> PowerIteration:
    """Runs `power_iteration` from several starts and returns the result with the largest sigma.

    For orders other than 2 -> 2 a single start can end in a local maximum. Random starts miss the global maximum rarely
    for small maps and more often for large ones, and more often for 2 -> 1 and inf -> q than for other orders. The
    result is still only a lower bound on the norm. It costs as much as n power iterations, under vmap.

    Args:
      matvec: v -> W v, linear.
      starts: floats [n, *input shape], for example random.
      rmatvec: the transpose u -> W^T u. None lets JAX transpose matvec.
      **settings: the other settings of `power_iteration`; `restart` is False by default.

    Returns:
      `PowerIteration` of one start, without the leading axis.

    Raises:
      ValueError: if starts are not a float array [n, ...] with n >= 1, and as for `power_iteration`.

    Example:
      >>> w = jnp.array([[2.0, 1.0], [-1.0, 1.0]])
      >>> starts = jax.random.normal(jax.random.key(0), (8, 2))
      >>> found = rf.best_start(lambda v: w @ v, starts, domain=np.inf, codomain=1.0)
      >>> round(float(found.sigma), 4)   # at the vertex v = (1, -1): |1| + |-2| = 3; at (1, 1): |3| + |0| = 3
      3.0
    """
    settings = {"restart": False, "rmatvec": rmatvec, **settings}
    check_callable("matvec", matvec)
    starts = as_float_batch("starts", starts)
    results = jax.vmap(lambda v: power_iteration(matvec, v, **settings))(starts)
    best = jnp.argmax(results.sigma)
    return jax.tree.map(lambda leaf: leaf[best], results)


def _residual(w: Array, v: Array, sigma: Array, v_next: Array, sigma_next: Array, domain: Order) -> Array:
    """The distance of v from stationarity, given w = W^T u and v_next = J_p*(w). See `PowerIterationStatus`.

    Let z = w / sigma. Since <z, v> = <J_p(v), v> = 1 and <z, v_next> = ||z||_p*,

        <z - J_p(v), v_next - v> = (||z||_p* - 1) + (1 - <J_p(v), v_next>),

    which is a sum of two gaps in Holder's inequality. Both factors on the left vanish at a stationary point, so
    rounding errors do not hide the small gaps. For p = 2 the product with ||z||_p* is |z - v|^2. For p = 1 and inf, v
    and v_next are vertices, and the gap of z alone is computed, by the same formula without J_p(v).
    """
    scale = positive(sigma)
    if is_order(domain, 2):
        return jnp.sqrt(jnp.sum(jnp.square((w - sigma * v) / scale)))
    polyhedral = is_order(domain, 1) or is_order(domain, math.inf)
    dual = jnp.zeros_like(v) if polyhedral else dual_map(v, domain)[0]
    squared = jnp.vdot(w / scale - dual, v_next - v) * (sigma_next / scale)
    return jnp.sqrt(jnp.maximum(squared, 0))
