"""The monotone map y = f(x): w + g(w) = sqrt(2) x, y = sqrt(2) w - x, for any contraction g; and its inverse.

    x = (w + g(w)) / sqrt(2),   y = (w - g(w)) / sqrt(2)
    dy/dx = (I - J)(I + J)^-1,  J = dg/dw at w             (the Cayley transform of J)
    log|det dy/dx| = log det(I - J) - log det(I + J)

(Ahn et al. 2022, arXiv 2210.08176). f is strictly monotone: 2 <f(a) - f(b), a - b> = |dw|^2 - |dg|^2 > 0, with the
differences dw of the two w and dg of g there. With Lip(g) <= L < 1 both f and f^-1 have Lipschitz constants of at most
(1 + L) / (1 - L), while x + g(x) reaches only 1 + L. The inverse is the same map with -g, and has the same w.

w is solved for as in `functional.inverse`. The log-det at w is estimated as in `functional.logdet`, with the series of
`functional.cayley_series`. The derivative of w is that of the implicit function theorem, so the gradient of the
log-det is complete: it has the part through w.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from resflow_jax.functional.checks import as_float_batch, check_flag
from resflow_jax.functional.conditions import check_map
from resflow_jax.functional.estimators import Estimator, Roulette, reverse_orders
from resflow_jax.functional.events import Events, is_tree
from resflow_jax.functional.inverse import reported, solution
from resflow_jax.functional.iteration import InverseStatus, Solver
from resflow_jax.functional.logdet import Residual, log_det_of_form
from resflow_jax.functional.solvers import Anderson

Array = jax.Array

ROOT = math.sqrt(2)


def monotone(
    g: Residual,
    params: Any,
    x: Any,
    *,
    condition: Any = None,
    key: Array | None = None,
    estimator: Estimator | None = None,
    lipschitz: float | None = None,
    chunk_size: int | None = None,
    solver: Solver = Anderson(),
    return_diagnostics: bool = False,
    return_status: bool = False,
) -> tuple[Any, ...]:
    """Computes y = f(x) of the monotone map of g, and log|det dy/dx| with the given estimator.

        w + g(params, w) = sqrt(2) x,    y = sqrt(2) w - x

    The estimators are those of `residual`, and say the same about bias, randomness and cost at w; `Roulette`, the
    default, is unbiased in the value and in the gradient. `Truncated(n)` takes the odd powers up to n. The solve of w
    comes on top, about log(tolerance) / log(L) evaluations of g with `FixedPoint` and often far fewer with `Anderson`.
    The gradient takes one more such solve, with vjps of g, and one vjp of g.

    With the Neumann gradient, memory depends neither on the length of the series nor on the number of iterations, and
    derivatives are those of `residual`: first-order reverse mode, and forward mode over that. With
    `Roulette(second_order=True)` they are reverse mode of first and second order. With other estimators derivatives
    have any mode and order.

    Args:
      g: as in `residual`: a pure function (params, x) or (params, x, condition), a contraction in x.
      params: any pytree.
      x: floats [B, ...], or a pytree of such arrays with one batch size and dtype.
      condition: as in `residual`.
      key: PRNG key of the estimate; `Exact` needs none.
      estimator: `Exact()`, `Truncated(...)`, `Roulette(...)` (the default), or a `CustomEstimator`, which is called for
        -g and for g at w.
      lipschitz: a bound on Lip(g), in (0, 1), if one is known, as in `residual`.
      chunk_size: as in `residual`, for the log-det estimate. The solve for w always takes the whole batch.
      solver: solver for w.
      return_diagnostics: whether to return `Diagnostics` of the estimate as well.
      return_status: whether to return the `InverseStatus` of w as well. Its residuals are those of w times sqrt(2), so
        that its `error_bound` bounds the error of y. Without it, examples that do not converge are reported as by
        `residual_inverse`.

    Returns:
      (y, log_det), then the diagnostics if asked for, then the status if asked for: y like x, log_det [B] in nats.

    Raises:
      ValueError: as `residual` and `residual_inverse`.
      InverseError: in an eager call, if an example does not converge and `solver.on_failure` is "raise".

    Example:
      >>> g = lambda w, x: w * x
      >>> x = jnp.ones((2, 3))
      >>> y, log_det = rf.monotone(g, -0.8, x, estimator=rf.Exact())   # dy/dx = 1.8 / 0.2 I
      >>> np.allclose(y, 9, atol=1e-3), np.allclose(log_det, 3 * np.log(9))
      (True, True)
    """
    check_flag("return_diagnostics", return_diagnostics)
    check_flag("return_status", return_status)
    estimator = Roulette() if estimator is None else estimator
    check_map(g, condition)
    options = {"condition": condition, "key": key, "estimator": estimator, "lipschitz": lipschitz}
    options |= {"chunk_size": chunk_size, "return_diagnostics": True}
    if is_tree(x):
        events, rows = Events.of("x", x)
        y, *others = monotone(events.wrap(g), params, rows, **options, solver=solver, return_status=True)
        y = events.unpack(y)
    else:
        x = as_float_batch("x", x)
        w, status = half_way(g, params, x, condition, solver, orders=reverse_orders(estimator))
        y, others = ROOT * w - x, [*log_det_at(g, params, w, **options), scaled(status)]
    log_det, diagnostics, status = others
    if not return_status:
        y, log_det = reported((y, log_det), status, "monotone", solver.on_failure)
    return y, log_det, *([diagnostics] if return_diagnostics else []), *([status] if return_status else [])


def monotone_inverse(
    g: Residual,
    params: Any,
    y: Any,
    *,
    condition: Any = None,
    solver: Solver = Anderson(),
    return_status: bool = False,
) -> Any | tuple[Any, InverseStatus]:
    """The x with f(x) = y for the monotone map f of g: `monotone` with -g, without its log-det.

        w - g(params, w) = sqrt(2) y,    x = sqrt(2) w - y

    The result is differentiable in params, y, the floats of the condition and whatever g closes over, in any mode and
    order, by the implicit function theorem. No randomness.

    Cost: a solve, as in `residual_inverse`; for a derivative as many jvps or vjps of g.

    Args:
      g: as in `residual_inverse`.
      params: any pytree.
      y: floats [B, ...], or a pytree of such arrays with one batch size and dtype.
      condition: as in `residual_inverse`.
      solver: solver for w.
      return_status: whether to return the `InverseStatus` of w as well, with residuals times sqrt(2): its `error_bound`
        bounds the error of x.

    Returns:
      x like y, or (x, status).

    Raises:
      ValueError: as `residual_inverse`.
      InverseError: in an eager call, if an example does not converge and `solver.on_failure` is "raise".

    Example:
      >>> g = lambda w, x: 0.5 * jnp.sin(w * x)
      >>> x = jnp.arange(6.0).reshape(3, 2)
      >>> y, _ = rf.monotone(g, 1.0, x, estimator=rf.Exact())
      >>> bool(jnp.allclose(rf.monotone_inverse(g, 1.0, y), x, atol=1e-4))
      True
    """
    check_flag("return_status", return_status)
    check_map(g, condition)
    events = None
    if is_tree(y):
        events, y = Events.of("y", y, least=0)
        g = events.wrap(g)
    y = as_float_batch("y", y, least=0)
    w, status = half_way(g, params, y, condition, solver, inverts=True)
    x, status = ROOT * w - y, scaled(status)
    x = x if events is None else events.unpack(x)
    return (x, status) if return_status else reported(x, status, "monotone_inverse", solver.on_failure)


def half_way(
    g: Residual,
    params: Any,
    x: Array,
    condition: Any,
    solver: Solver,
    *,
    inverts: bool = False,
    orders: int = 0,
) -> tuple[Array, InverseStatus]:
    """The solution w of w + g(w) = sqrt(2) x and its status; of w - g(w) = sqrt(2) x for x instead of y, to invert.

    Args:
      g: as in `monotone`.
      params: any pytree.
      x: floats [B, ...].
      condition: as in `monotone`.
      solver: solver for w.
      inverts: whether x is a y.
      orders: orders of the reverse mode that keeps only w, see `solution`.
    """
    of_sign = (lambda *args: -g(*args)) if inverts else g
    return solution(of_sign, params, ROOT * x, condition, solver, orders=orders, name="y" if inverts else "x")


def log_det_at(
    g: Callable[..., Array], params: Any, w: Array, *, prepare: Callable[[Any], Any] | None = None, **options: Any
) -> tuple[Array, ...]:
    """log|det dy/dx| [B] at w, and the diagnostics if asked for; options as in `residual`."""
    return log_det_of_form("cayley", g, params, w, prepare=prepare, **options)[1:]


def scaled(status: InverseStatus) -> InverseStatus:
    """The status of w for sqrt(2) w - x: the error of w counts times sqrt(2)."""
    return status._replace(residual=ROOT * status.residual, residual_norm=ROOT * status.residual_norm)
