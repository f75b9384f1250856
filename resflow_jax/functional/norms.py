"""Induced norms by power iteration, and the soft normalisation that uses them.

    ||W||_{p->q} = max_x ||W x||_q / ||x||_p

Power iteration alternates u <- J_q(W v) and v <- J_p*(W^T u), where J are the
dual maps of `vector_norms` (Boyd 1974, Linear Algebra Appl. 9; Higham 1992, doi
10.1007/BF01396242; in residual flows Chen et al. 2019, arXiv 1906.02735, section on
induced mixed norms). For p = q = 2 that is u <- W v / |W v|, v <- W^T u / |W^T u|.

sigma = u^T W v grows monotonically, from below: for 2 -> 2 towards the largest
singular value, otherwise towards a local maximum. From a positive start it is the
global one if W is positive and p >= q. In general a p -> q norm is NP-hard: several
starts raise the odds but prove nothing, and a bound from above has to come from
elsewhere. p = 1 and q = inf have closed forms.

W is any linear map given as a callable, so for a convolution
it is the zero-padded convolution on its real spatial size, never the reshaped
kernel (Gouk et al. 2018, arXiv 1804.04368; Behrmann et al. 2019, arXiv 1811.00995,
appendix D).

Soft normalisation W * min(1, c / sigma) leaves a map of norm below c alone. Where sigma is a largest norm
of rows or of columns, each of them is normalised by its own, which is enough and shrinks W least.
Gradients flow through sigma = u^T W v with u and v held fixed, which is the
derivative of the norm at convergence, by the envelope theorem. For the orders p
and q there is a loss of its own, with W and v held fixed.
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
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import (
    as_float_array,
    as_float_batch,
    check_callable,
    check_count,
    check_order,
    check_positive,
)
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.functional.starts import excludes_larger, mixed_start, unit
from resflow_jax.functional.texts import fields_text, span, values_of
from resflow_jax.functional.vector_norms import Order, conjugate, dual_map, is_order, positive, vector_norm

Array = jax.Array
LinearFunction = Callable[[Array], Array]


class PowerIterationStatus(NamedTuple):
    """How a power iteration ended. Scalars, or stacked under vmap.

    Attributes:
      iterations: pairs of products (W v, W^T u) done; both chains of a restart do so many.
      residual: distance from stationarity at the last iterate before the final v. For domain 2 it is
        |W^T u - sigma v| / sigma; for 2 -> 2 there is a singular value within residual * sigma of
        sigma. For other orders it is such that residual^2 is about twice the gap in Holder's inequality
        <W^T u, v> <= ||W^T u||_{p*} ||v||_p, relative to sigma (for domains 1 and inf the gap itself).
      converged: whether the tolerances on sigma and on the residual were both met and, with `restart`,
        the second chain excludes a 2 -> 2 norm more than 1 % above sigma (see `functional.starts`).
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
    """Result of `power_iteration`: sigma = u^T W v, u of unit dual codomain norm, v of unit domain norm, the status."""

    sigma: Array
    u: Array
    v: Array
    status: PowerIterationStatus


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
    """Estimates ||W||_{domain -> codomain}, by default the largest singular value, warm-started at v.

    For other orders the result can be a local maximum, below the norm: begin with `best_start`.

    It stops once the relative change of sigma over one iteration is at most `tolerance` and the
    residual (see `PowerIterationStatus`) is at most `residual_tolerance`. Both are relative to the
    whole vector; a test per element, as in the PyTorch implementation, is nearly vacuous for the
    long vectors of a convolution. For 2 -> 2 sigma errs by about residual^2 / (relative gap of the
    spectrum): a crowded spectrum, as of wide convolutions, asks for a tolerance of 1e-6 or less.

    A map with a symmetry keeps some v in a subspace for ever, in which sigma is too small. Two measures are against
    it, neither of them random: results depend on the arguments alone.

    1. A fixed direction, the hash of each index, is mixed into v; its length is a twentieth of `residual_tolerance`.
       From call to call, as in training, what v lacks grows out of it.
    2. With `restart` a second chain starts from that direction alone, beside the first in the same loop. The result is
       that of the larger sigma; the loop goes on until the second chain excludes a norm more than 1 % above.

    Args:
      matvec: v -> W v, linear, between arrays of any shapes.
      v: start vector of matvec's input shape; need not be unit. From zero it starts at the fixed direction.
      rmatvec: u -> W^T u, its transpose; by default JAX transposes matvec.
      domain: order p of the norm of v, from one to infinity; an array strictly inside.
      codomain: order q of the norm of W v, likewise.
      tolerance: bound on the relative change of sigma; may be traced, like the next two.
      residual_tolerance: bound on the residual; by default the square root of `tolerance`.
      max_iterations: cap on the iterations; reaching it shows as `converged` False.
      iterations: if given, exactly this many plain iterations from v are run, with nothing mixed in and without
        restart, as with the fixed count of the papers' code. The status only reports, and knows nothing of what v
        lacks.
      restart: whether the second chain runs. Products are with two vectors at a time then, and a crowded spectrum takes
        some hundred iterations, even from a v that has converged.
      scale: for 2 -> 2, a scalar about as large as the norm of W or as its largest element, to a factor of 1e6. It
        keeps squares within the float type; the result hardly depends on it. By default one more product finds it.

    Returns:
      `PowerIteration(sigma, u, v, status)`; where W is zero u is zero and v stays the start. Not differentiable
      by itself: pass u and v to `spectral_norm`. A sigma that is not finite ends the loop, `converged` False.

    Raises:
      ValueError: if a tolerance is not positive, a count is below one or an order is below one; values of traced
        settings are not checked. If JAX cannot transpose matvec, as where it is not linear.

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
        v_new = jnp.where(sigma > 0, v_new, old.v)  # a zero map must not spoil the next warm start
        residual = _residual(w, old.v, sigma_half, v_new, sigma, domain)
        change = jnp.abs(sigma - old.sigma) / positive(sigma)
        converged = (change <= tolerance) & (residual <= residual_tolerance)
        return PowerIteration(sigma, u, v_new, PowerIterationStatus(old.status.iterations + 1, residual, converged))

    def judged(chains: PowerIteration) -> PowerIteration:
        """The result so far: of two chains that of the larger sigma, converged only where the second lets it be."""
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
        below_cap = chains.status.iterations.ravel()[0] < cap
        return below_cap & running if iterations is None else below_cap

    # The first step cannot meet the test on the change of sigma: it starts from infinity.
    infinity = jnp.asarray(jnp.inf, v.dtype)
    status = PowerIterationStatus(jnp.asarray(0), infinity, jnp.asarray(False))
    u = jax.eval_shape(matvec, v)
    w = jax.eval_shape(rmatvec, u)
    chains = PowerIteration(infinity, jnp.zeros(u.shape, u.dtype), v, status)
    if restart:
        second = chains._replace(v=mixed_start(jnp.zeros_like(v), domain, residual_tolerance))
        chains = jax.tree.map(lambda *leaves: jnp.stack(leaves), chains, second)
    start = jnp.asarray(True), chains
    start = vary_over(start, varying_axes((v, u, w, domain, codomain)))
    result = judged(lax.while_loop(unfinished, step, start)[1])
    return result._replace(sigma=result.sigma * scale)


def check_settings(
    tolerance: float | Array, residual_tolerance: float | Array | None, max_iterations: int | Array
) -> None:
    """Raises ValueError unless a `power_iteration` takes these: positive, the last at least one, or traced scalars."""
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
    """`dual_map` of order 2, for an x whose square neither overflows nor vanishes."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x)))
    return x / positive(norm), norm


def _transposed(matvec: LinearFunction, rmatvec: LinearFunction | None, v: Array) -> LinearFunction:
    """The transpose of matvec for None, else rmatvec, with a ValueError if what it returns has not the shape of v."""
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
    """W^T u, where W takes arrays of that shape."""
    # An input that differs over the axes over which u does: otherwise its cotangent would be summed over them.
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
    """The `power_iteration` that ends highest among those from starts [n, *input shape]; same settings.

    Random starts miss the global maximum rarely for tiny maps and more often for larger ones, and 2 -> 1
    and inf -> q more often than orders in between. Without `restart`, unless it is asked for.
    """
    settings = {"restart": False, "rmatvec": rmatvec, **settings}
    check_callable("matvec", matvec)
    starts = as_float_batch("starts", starts)
    results = jax.vmap(lambda v: power_iteration(matvec, v, **settings))(starts)
    best = jnp.argmax(results.sigma)
    return jax.tree.map(lambda leaf: leaf[best], results)


def spectral_norm(matvec: LinearFunction, u: Array, v: Array) -> Array:
    """sigma = u^T W v with u and v held fixed: differentiable in whatever matvec closes over.

    With the vectors of a `power_iteration` that has converged it is the induced norm of W, and so is its derivative,
    by the envelope theorem: the rank-one matrix u v^T for a dense W.

      found = rf.power_iteration(lambda v: w @ v, jnp.ones(3))
      gradient = jax.grad(lambda w: rf.spectral_norm(lambda v: w @ v, found.u, found.v))(w)

    Args:
      matvec: v -> W v, linear.
      u: of W's output shape, of unit norm (for orders other than 2, unit in the norm dual to the codomain's).
      v: of W's input shape, of unit norm.

    Returns:
      A scalar. It never exceeds the norm of W.

    Raises:
      ValueError: if u or v is no float array, or if u has not the shape of matvec(v).
    """
    check_callable("matvec", matvec)
    u, v = as_float_array("u", u), as_float_array("v", v)
    w = matvec(lax.stop_gradient(v))
    if w.shape != u.shape:
        raise ValueError(f"u: expected the shape {w.shape} of matvec(v), got {u.shape}")
    return jnp.vdot(lax.stop_gradient(u), w)


def needs_power_iteration(domain: Order, codomain: Order) -> bool:
    """Whether a norm has no closed form: unless domain is 1 or codomain infinity, and not an array.

    Raises ValueError for an order below one.
    """
    check_order("domain", domain)
    check_order("codomain", codomain)
    return not (is_order(domain, 1) or is_order(codomain, math.inf))


def induced_norm(
    linear_map: LinearMap, kernel: Array, u: Array, v: Array, domain: Order = 2.0, codomain: Order = 2.0
) -> Array:
    """||W||_{domain -> codomain} of a layer's map, differentiable in the kernel alone.

    Where there is a closed form it is exact, and u and v do not matter; otherwise it is u^T W v with the
    vectors of `power_iteration`, times the factor of a map that holds `copies` of W (it exceeds one for
    domain > codomain only). Gradients in learnable orders come from `order_loss`.
    """
    return jnp.max(channel_norms(linear_map, kernel, u, v, domain, codomain))


def channel_norms(
    linear_map: LinearMap, kernel: Array, u: Array, v: Array, domain: Order = 2.0, codomain: Order = 2.0
) -> Array:
    """Norms to be limited for the map's norm to be: their maximum is `induced_norm`.

    Of every output channel, [O], where the norm is the largest of rows (codomain inf); of every input channel, [I, 1],
    where it is the largest of columns (domain 1); otherwise of the whole, a scalar. Broadcasts against the kernel.
    """
    domain, codomain = (lax.stop_gradient(order) if isinstance(order, Array) else order for order in (domain, codomain))
    if not needs_power_iteration(domain, codomain):
        return _closed_form(linear_map, kernel, domain, codomain)
    sigma = spectral_norm(partial(linear_map.matvec, kernel), u, v)
    return with_copies(sigma, linear_map.copies, domain, codomain)


def order_loss(linear_map: LinearMap, kernel: Array, v: Array, domain: Order, codomain: Order) -> Array:
    """||W v||_codomain / ||v||_domain, differentiable in the orders alone, with W and v held fixed.

    At the maximiser v it is the norm, and its derivative is the norm's, by the envelope theorem.
    """
    kernel, v = lax.stop_gradient((kernel, v))
    if not needs_power_iteration(domain, codomain):
        return jnp.max(_closed_form(linear_map, kernel, domain, codomain))
    sigma = vector_norm(linear_map.matvec(kernel, v), codomain) / vector_norm(v, domain)
    return with_copies(sigma, linear_map.copies, domain, codomain)


def soft_normalize(kernel: Array, sigma: Array, coefficient: float) -> Array:
    """kernel * min(1, coefficient / sigma): norm at most `coefficient` if sigma, as of `channel_norms`, is exact."""
    return kernel / trailing(jnp.maximum(1.0, sigma / coefficient), kernel)


def _residual(w: Array, v: Array, sigma: Array, v_next: Array, sigma_next: Array, domain: Order) -> Array:
    """How far v is from stationary, given w = W^T u and v_next = J_p*(w). See `PowerIterationStatus`.

    With z = w / sigma, <z, v> = <J_p(v), v> = 1 and <z, v_next> = ||z||_p* turn

        <z - J_p(v), v_next - v> = (||z||_p* - 1) + (1 - <J_p(v), v_next>)

    into a sum of two gaps in Holder's inequality; on the left each factor vanishes at a stationary
    point, so that rounding errors do not hide the small gaps. Times ||z||_p* it is |z - v|^2 for p = 2.
    For p = 1 and inf the gap of z alone is such a sum of small terms: v and v_next are vertices.
    """
    scale = positive(sigma)
    if is_order(domain, 2):
        return jnp.sqrt(jnp.sum(jnp.square((w - sigma * v) / scale)))
    polyhedral = is_order(domain, 1) or is_order(domain, math.inf)
    dual = jnp.zeros_like(v) if polyhedral else dual_map(v, domain)[0]
    squared = jnp.vdot(w / scale - dual, v_next - v) * (sigma_next / scale)
    return jnp.sqrt(jnp.maximum(squared, 0))


def _closed_form(linear_map: LinearMap, kernel: Array, domain: Order, codomain: Order) -> Array:
    """The norms of all columns, or of all rows."""
    if is_order(domain, 1):
        return linear_map.column_norms(kernel, codomain)
    return linear_map.row_norms(kernel, domain)


def with_copies(sigma: Array, copies: int, domain: Order, codomain: Order) -> Array:
    """||W + ... + W||_{p->q} of a direct sum: sigma * max_a ||a||_q / ||a||_p = sigma * copies^max(0, 1/q - 1/p)."""
    if copies == 1:
        return sigma
    exponent = jnp.maximum(0.0, 1 / codomain - 1 / domain)
    return sigma * copies ** jnp.asarray(exponent, sigma.dtype)
