"""Estimates of the log-det that JAX differentiates without a custom rule: exact, bounded series, custom estimators."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.probes import draw_seeds, make_probes, seed_keys
from resflow_jax.functional.term_sums import draw_plan, plan_of, repeat, sum_terms_differentiably, with_log_det
from resflow_jax.functional.trace_probes import draw_trace_probes, number_of_trace_probes, trace_keys


def exact_estimate(g, chunk_size, form, args, x):
    """y and log_det [B] for x [B, ...] and g(args, x), by LU decompositions of each example's Jacobian."""
    batch, event = x.shape[0], x.shape[1:]
    g_x, pullback = jax.vjp(partial(g, args), x)
    size = math.prod(event)
    basis = vary_over(jnp.eye(size, dtype=x.dtype).reshape(size, *event), varying_axes(x))

    def row(e):  # e_i^T J of every example at once
        return pullback(jnp.broadcast_to(e[None], x.shape))[0].reshape(batch, size)

    rows = lax.map(row, basis, batch_size=min(chunk_size, size))
    jacobian = rows.swapaxes(0, 1)
    # det(I + J) > 0: |tJ| < 1, so I + tJ is invertible for every t in [0, 1], and det(I + tJ) is 1 at t = 0.
    log_det = _of_one_plus(jacobian)
    if form == "cayley":
        log_det = _of_one_plus(-jacobian) - log_det
    return x + g_x, log_det.astype(x.dtype)


def _of_one_plus(jacobian):
    """log|det(I + J)| [B] of [B, D, D]."""
    dtype = wide_dtype(jacobian.dtype)  # LAPACK has no 16-bit floats, and the sum would be rounded to them
    matrices = jnp.eye(jacobian.shape[-1], dtype=dtype)[None] + jacobian.astype(dtype)
    return lax.platform_dependent(matrices, cpu=partial(lax.map, _log_abs_det), default=_log_abs_det)


def _log_abs_det(matrices):
    """log|det| of a batch. On a CPU, map it over single matrices: batched LAPACK calls of two devices can deadlock."""
    return jnp.linalg.slogdet(matrices)[1]


def series_estimate(g, longest, form, estimator, x, key):
    """y, log_det and diagnostics for x [B, ...], by the estimator's series, cut after `longest` terms.

    g takes the batch repeated for each probe, [probes * B, ...].
    """
    settings = estimator.probe, estimator.probes
    shared_key, keys = seed_keys(*settings, key, x)
    plan = plan_of(form, draw_plan(estimator, shared_key))
    v = make_probes(*settings, draw_seeds(*settings, keys, x), x)
    g_x, pullback = jax.vjp(g, repeat(x, estimator.probes))
    u = draw_trace_probes(estimator, trace_keys(estimator, shared_key, x), x)
    sums = sum_terms_differentiably(plan, v, lambda u: pullback(u)[0], longest, u)
    y, log_det = with_log_det(x, g_x, sums, plan.scale)
    return y, log_det, Diagnostics.of(log_det, plan.length + number_of_trace_probes(estimator), sums.norms)


def custom_estimate(g, form, estimator, x, key):
    """y and log_det for x [B, ...] and g(x) from a user's estimator; shapes and dtypes are checked."""
    if form == "cayley":
        keys = (None, None) if key is None else jax.random.split(key)
        _, of_minus = custom_estimate(lambda at: -g(at), "residual", estimator, x, keys[0])
        y, log_det = custom_estimate(g, "residual", estimator, x, keys[1])
        return y, of_minus - log_det

    def checked_g(at):
        if at.shape != x.shape or at.dtype != x.dtype:
            raise ValueError(
                f"estimator: expected {type(estimator).__name__}.estimate to call g with {x.dtype} {x.shape}, got "
                f"{at.dtype} {at.shape}; jax.vmap of g takes several"
            )
        return g(at)

    out = estimator.estimate(checked_g, x, key)
    found = [(getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf))) for leaf in jax.tree.leaves(out)]
    if not isinstance(out, tuple) or found != [(x.shape, x.dtype), (x.shape[:1], x.dtype)]:
        raise ValueError(
            f"estimator: expected {type(estimator).__name__}.estimate to return y {x.dtype} {x.shape} and log_det "
            f"{x.dtype} {x.shape[:1]}, got {jax.tree.map(jnp.shape, out)}"
        )
    return out
