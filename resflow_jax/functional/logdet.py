"""y = x + g(x) and log|det dy/dx| for any contraction g: exact, truncated or by Russian roulette.

    log|det(I + J)| = sum_{k>=1} (-1)^(k+1) / k * tr(J^k),           J = dg/dx
    d/dtheta of it  = tr((I + J)^-1 dJ/dtheta) = sum_{k>=0} (-1)^k tr(J^k dJ/dtheta)

Traces are estimated by tr(A) = E[v^T A v] with E[v v^T] = I (Hutchinson 1990), powers by
repeated vector-Jacobian products of one linearisation, infinite sums by Russian roulette.
Chen et al. (2019, arXiv 1906.02735): equation 6 for the value; equations 8 and 9 with
appendix C ("Neumann gradient series") for the gradient; Behrmann et al. (2019, arXiv
1811.00995), section 3.2, for the truncated series.

The Neumann gradient differentiates first and estimates after: with

    w^T = v^T sum_{k=0}^{n} (-1)^k c_k J^k,   c_0 = 1, c_k the roulette weights,

w_b^T (dJ_b/dtheta) v_b is an unbiased gradient of example b's log-det. The backward pass is
thus one vjp of x -> (g(x), J v) with cotangents (y_bar, ld_bar_b * w_b), one weight an
example. Only x, w and the key of v are kept: memory grows neither with n nor with g's width.
The same loop that builds w adds up the series of the value at the price of a dot product, so
the value is a true unbiased log-det.

Shapes: x [B, ...], any event shape; y like x; log_det [B], in nats. g must treat the
examples of a batch independently and have Lipschitz constant below one in x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.checks import check_choice, check_count, check_residual
from resflow_jax.functional.roulette import Geometric, Law, Poisson, length_cap, term_weight

Array = jax.Array
Residual = Callable[[Any, Array], Array]

_PROBES = ("rademacher", "gaussian")
_GRADIENTS = ("neumann", "autodiff")


@dataclass(frozen=True)
class Exact:
    """slogdet of the dense Jacobian of every example. Deterministic; takes no key.

    Cost: D vjps of g (D = number of elements of one example), an LU of [B, D, D]. Derivatives of
    any order and mode; the Jacobian is recomputed in the backward pass.

    Attributes:
      chunk_size: rows of the Jacobian computed at once; bounds the memory to chunk_size * B
        evaluations of g.
    """

    chunk_size: int = 64

    def __post_init__(self):
        check_count("chunk_size", self.chunk_size, 1)


@dataclass(frozen=True)
class Truncated:
    """The first `terms` terms of the series with one Hutchinson probe. Biased (Behrmann et al. 2019).

    The bias of the value is at most D * L^(terms + 1) / ((terms + 1) * (1 - L)). Cost: `terms`
    vjps of g and, for the gradient, one vjp of (g, J v). The gradient is that of the truncated
    value, in expectation over the probe.

    Attributes:
      terms: number of terms of the series.
      probe: law of v, "rademacher" (entries +-1, smaller variance) or "gaussian".
      gradient: "neumann" (constant memory, first-order reverse mode) or "autodiff" (differentiates
        the estimate itself: memory grows with `terms`, any order and mode).
    """

    terms: int = 10
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    gradient: Literal["neumann", "autodiff"] = "neumann"

    def __post_init__(self):
        check_count("terms", self.terms, 1)
        check_choice("probe", self.probe, _PROBES)
        check_choice("gradient", self.gradient, _GRADIENTS)


@dataclass(frozen=True)
class Roulette:
    """The unbiased Russian-roulette estimate with one Hutchinson probe an example.

    Unbiased in value and gradient over the key. One length for the whole batch, one probe an
    example. Cost: exact_terms + max_i N_i vjps of g (4 on average by default) and, for the
    gradient, one vjp of (g, J v).

    Attributes:
      length: law of the random number N of further terms, `Geometric(p)` or `Poisson(rate)`.
      exact_terms: terms that are always taken, m >= 0.
      samples: number of lengths averaged; the series is as long as the longest.
      probe: law of v, "rademacher" (entries +-1, smaller variance) or "gaussian".
      gradient: "neumann" (constant memory, first-order reverse mode) or "autodiff" (differentiates
        the estimate itself: memory grows with the longest possible series, any order and mode; it
        leaves out lengths of probability below 2^-24).
    """

    length: Law = Geometric(0.5)
    exact_terms: int = 2
    samples: int = 1
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    gradient: Literal["neumann", "autodiff"] = "neumann"

    def __post_init__(self):
        if not isinstance(self.length, Geometric | Poisson):
            raise ValueError(f"length: expected Geometric(p) or Poisson(rate), got {self.length!r}")
        check_count("exact_terms", self.exact_terms, 0)
        check_count("samples", self.samples, 1)
        check_choice("probe", self.probe, _PROBES)
        check_choice("gradient", self.gradient, _GRADIENTS)


Estimator = Exact | Truncated | Roulette


def residual(
    g: Residual, params: Any, x: Array, *, key: Array | None = None, estimator: Estimator | None = None
) -> tuple[Array, Array]:
    """Computes y = x + g(params, x) and log|det dy/dx| with the given estimator.

    Args:
      g: pure function (params, x) -> array of x's shape and dtype, a contraction in x, each
        example of the batch by itself. It may close over traced arrays; gradients reach them.
      params: any pytree.
      x: floats [B, ...].
      key: PRNG key of the estimate; not needed by `Exact`.
      estimator: `Exact()`, `Truncated(...)` or `Roulette(...)` (the default).

    Returns:
      (y, log_det): y like x; log_det [B] in nats. Differentiable in params and x.

    Raises:
      ValueError: if x is not a float array with a batch axis, if g changes x's shape or dtype, if
        the key is missing, or if the estimator is unknown.
    """
    estimator = Roulette() if estimator is None else estimator
    check_residual("x", g, params, x)
    if x.shape[0] == 0:
        raise ValueError(f"x: expected at least one example, got shape {x.shape}")
    if isinstance(estimator, Exact):
        # The Jacobian is not worth keeping: a chain of blocks would hold them all.
        return jax.checkpoint(partial(_exact, g, estimator.chunk_size))(params, x)
    if not isinstance(estimator, Truncated | Roulette):
        raise ValueError(f"estimator: expected Exact, Truncated or Roulette, got {estimator!r}")
    if key is None:
        raise ValueError(f"key: {type(estimator).__name__} expected a PRNG key, got None")
    if estimator.gradient == "autodiff":
        return _autodiff(g, estimator, params, x, key)
    # custom_vjp must see every array that g depends on, also those it closes over.
    g_closed, closed_over = jax.closure_convert(g, params, x)
    return _neumann(g_closed, estimator, (params, closed_over), x, key)


class _Series(NamedTuple):
    """The terms of one draw: their number, and the weights of term k in value and in w."""

    length: Array | int
    value_weight: Callable[[Array], Array | float]
    neumann_weight: Callable[[Array], Array | float]


def _draw_series(estimator: Truncated | Roulette, key: Array) -> _Series:
    if isinstance(estimator, Truncated):
        # tr(J^k) has the derivative k * tr(J^(k-1) dJ): n terms of the value have powers below n.
        return _Series(estimator.terms, lambda k: 1.0, lambda k: jnp.where(k < estimator.terms, 1.0, 0.0))
    lengths = estimator.length.sample(key, (estimator.samples,))
    weight = partial(term_weight, estimator.length, lengths, estimator.exact_terms)
    return _Series(estimator.exact_terms + jnp.max(lengths), weight, weight)


def _draw_probe(estimator: Truncated | Roulette, key: Array, x: Array) -> Array:
    sampler = jax.random.rademacher if estimator.probe == "rademacher" else jax.random.normal
    return sampler(key, x.shape, x.dtype)


def _sign(k: Array) -> Array:
    """(-1)^k."""
    return 1 - 2 * (k % 2)


def _example_dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _neumann(g, estimator, args, x, key):
    return _neumann_forward(g, estimator, args, x, key)[0]


def _neumann_forward(g, estimator, args, x, key):
    length_key, probe_key = jax.random.split(key)
    series = _draw_series(estimator, length_key)
    v = _draw_probe(estimator, probe_key, x)
    params, closed_over = args
    g_x, pullback = jax.vjp(lambda x: g(params, x, *closed_over), x)

    def add_term(state):
        k, u, log_det, w = state
        (u,) = pullback(u)  # u^T = v^T J^k
        log_det = log_det - (_sign(k) * series.value_weight(k) / k).astype(x.dtype) * _example_dot(u, v)
        w = w + (_sign(k) * series.neumann_weight(k)).astype(x.dtype) * u
        return k + 1, u, log_det, w

    start = jnp.asarray(1), v, jnp.zeros(x.shape[0], x.dtype), v
    _, _, log_det, w = lax.while_loop(lambda state: state[0] <= series.length, add_term, start)
    return (x + g_x, log_det), (args, x, probe_key, w)


def _neumann_backward(g, estimator, kept, cotangents):
    args, x, probe_key, w = kept
    y_bar, log_det_bar = cotangents
    v = _draw_probe(estimator, probe_key, x)

    def value_and_product(args, x):
        params, closed_over = args
        return jax.jvp(lambda x: g(params, x, *closed_over), (x,), (v,))

    _, pullback = jax.vjp(value_and_product, args, x)
    per_example = log_det_bar.reshape(-1, *[1] * (x.ndim - 1))
    args_bar, x_bar = pullback((y_bar, per_example * w))
    return args_bar, x_bar + y_bar, None


_neumann.defvjp(_neumann_forward, _neumann_backward)


def _autodiff(g, estimator, params, x, key):
    """The same estimate of the value, left to JAX's own differentiation."""
    length_key, probe_key = jax.random.split(key)
    series = _draw_series(estimator, length_key)
    v = _draw_probe(estimator, probe_key, x)
    g_x, pullback = jax.vjp(partial(g, params), x)

    def add_term(state, k):
        u, log_det = state
        (u,) = pullback(u)
        log_det = log_det - (_sign(k) * series.value_weight(k) / k).astype(x.dtype) * _example_dot(u, v)
        return u, log_det

    def step(state, k):  # reverse mode needs a static length: later steps are skipped
        return lax.cond(k <= series.length, add_term, lambda state, k: state, state, k), None

    if isinstance(estimator, Truncated):
        longest = estimator.terms
    else:
        longest = estimator.exact_terms + length_cap(estimator.length)
    start = v, jnp.zeros(x.shape[0], x.dtype)
    (_, log_det), _ = lax.scan(step, start, jnp.arange(1, longest + 1))
    return x + g_x, log_det


def _exact(g, chunk_size, params, x):
    batch, event = x.shape[0], x.shape[1:]
    g_x, pullback = jax.vjp(partial(g, params), x)
    size = math.prod(event)
    basis = jnp.eye(size, dtype=x.dtype).reshape(size, *event)

    def row(e):  # e_i^T J of every example at once
        return pullback(jnp.broadcast_to(e, x.shape))[0].reshape(batch, size)

    rows = lax.map(row, basis, batch_size=min(chunk_size, size))
    jacobian = rows.swapaxes(0, 1)
    # det(I + J) > 0: I + tJ is invertible for every t in [0, 1], since |tJ| < 1.
    log_det = jnp.linalg.slogdet(jnp.eye(size, dtype=x.dtype) + jacobian)[1]
    return x + g_x, log_det
