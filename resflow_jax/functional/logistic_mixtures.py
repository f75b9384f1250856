"""The distribution function of a mixture of logistics, on the scale of logits, and its inverse.

    h(x) = logit F(x),   F(x) = sum_k pi_k sigmoid(z_k),   z_k = (x - mu_k) exp(-s_k)
    log h'(x) = log F'(x) - log F(x) - log(1 - F(x)),   F'(x) = sum_k pi_k sigmoid(z_k) sigmoid(-z_k) exp(-s_k)

All sums are of exponentials (logsumexp), so that both tails keep their relative precision.

F lies between the least and the largest sigmoid(z_k), so h(x) lies between the least and the largest z_k. The root of
h(x) = w therefore lies between the least and the largest mu_k + exp(s_k) w. From that bracket Newton's method runs,
with a bisection wherever its step leaves the bracket. The derivative of the root is that of the implicit function, in
any mode and order.

Ho et al. (2019, arXiv 1902.00275), section 3.2 and equations 9 and 10.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.batch_axes import vary_alike, vary_over, varying_axes
from resflow_jax.functional.iteration import InverseStatus, example_max, example_norm
from resflow_jax.functional.primitives.precision import wide_dtype

Array = jax.Array
Mixture = tuple[Array, Array, Array]  # log pi, mu and s, [B, ..., K, C]


def mixture_of(theta: Array) -> Mixture:
    """The mixture for any theta [B, ..., 3 K, C]: logits of the weights, means, logarithms of the scales.

    Fixed offsets from -1 to 1 are added to the means: equal components would have equal gradients, and stay equal. The
    logarithms of the scales are kept within a third of the exponents of the dtype, +-29 in float32, where h, its slope
    and the bracket of the root cannot overflow.
    """
    logits, means, log_scales = jnp.split(theta, 3, axis=-2)
    components = means.shape[-2]
    offsets = jnp.asarray([2 * (k + 0.5) / components - 1 for k in range(components)], theta.dtype)
    means = means + offsets.reshape(*[1] * (theta.ndim - 2), components, 1)
    limit = math.log(float(jnp.finfo(theta.dtype).max)) / 3
    return jax.nn.log_softmax(logits, axis=-2), means, jnp.clip(log_scales, -limit, limit)


def mixture_logit(x: Array, mixture: Mixture) -> tuple[Array, Array]:
    """h(x) and log h'(x) of every element of x [B, ..., C]."""
    log_weights, means, log_scales = mixture
    z = (x[..., None, :] - means) * jnp.exp(-log_scales)
    below, above = log_weights + jax.nn.log_sigmoid(z), log_weights + jax.nn.log_sigmoid(-z)
    log_cdf, log_tail = (jax.nn.logsumexp(part, axis=-2) for part in (below, above))
    log_density = jax.nn.logsumexp(below + jax.nn.log_sigmoid(-z) - log_scales, axis=-2)
    return log_cdf - log_tail, log_density - log_cdf - log_tail


def inverse_mixture_logit(
    w: Array, mixture: Mixture, tolerance: float | Array, max_iterations: int | Array
) -> tuple[Array, InverseStatus]:
    """x with h(x) = w of every element of w [B, ..., C], and how the solves ended.

    An element has converged when |h(x) - w| <= tolerance * max(1, |w|) and Newton's step is at most tolerance *
    max(1, |x|), or when rounding allows no smaller residual or bracket. An example has when all its elements have.

    Args:
      w: floats.
      mixture: the mixture of each element.
      tolerance: tolerance on the residual and on the step.
      max_iterations: cap on the evaluations of h.
    """
    counts = wide_dtype(w.dtype)  # bfloat16 cannot count beyond 256
    limits = jnp.asarray(tolerance, w.dtype), jnp.asarray(max_iterations, counts)
    x, *report = _root(w, mixture, limits)
    iterations, residual, is_done = (lax.stop_gradient(part).reshape(w.shape[0], -1) for part in report)
    status = InverseStatus(
        jnp.max(iterations, axis=1).astype(jnp.int32),
        example_max(residual),
        example_norm(residual),
        jnp.min(is_done, axis=1) > 0,
    )
    return x, status


class _State(NamedTuple):
    """The search for each element: its bracket, the next point, and the last residual; all in the shape of w."""

    low: Array
    high: Array
    x: Array
    residual: Array
    iterations: Array
    is_done: Array  # 1 or 0


@jax.custom_jvp
def _root(w: Array, mixture: Mixture, limits: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
    """The root x, and floats of its shape: evaluations of h, the residual, whether it has converged (1 or 0)."""
    w, mixture, limits = vary_alike(w, mixture, limits)
    tolerance, cap = limits
    _, means, log_scales = mixture
    ends = means + jnp.exp(log_scales) * w[..., None, :]
    low, high = jnp.min(ends, axis=-2), jnp.max(ends, axis=-2)
    # The ends are rounded; the margin keeps the root inside.
    eps = float(jnp.finfo(w.dtype).eps)
    margin = 16 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high)) + float(jnp.finfo(w.dtype).tiny)
    low, high = low - margin, high + margin
    zeros = vary_over(jnp.zeros(w.shape, w.dtype), varying_axes((w, mixture, limits)))
    start = _State(low, high, 0.5 * low + 0.5 * high, zeros + jnp.inf, zeros.astype(cap.dtype), zeros)

    def is_open(state):
        is_stuck = jnp.isnan(state.residual) & (state.x == 0.5 * state.low + 0.5 * state.high)
        is_possible = jnp.isfinite(state.x) & ~is_stuck
        return jnp.any((state.is_done == 0) & (state.iterations < cap) & is_possible)

    def turn(state):
        h, log_slope = mixture_logit(state.x, mixture)
        residual = h - w
        low = jnp.where(residual < 0, state.x, state.low)
        high = jnp.where(residual > 0, state.x, state.high)
        is_short = high - low <= 4 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
        change = residual * jnp.exp(-log_slope)
        step = state.x - change
        size = jnp.abs(residual) / jnp.maximum(1, jnp.abs(w))
        # On a plateau of F a small residual does not make a small error in x.
        is_close = (size <= tolerance) & (jnp.abs(change) <= tolerance * jnp.maximum(1, jnp.abs(state.x)))
        is_done = (is_close | (size <= eps) | is_short) & jnp.isfinite(state.x)
        # Newton from the side where h is concave may crawl along a plateau: every third step halves the bracket.
        newton = (step > low) & (step < high) & (state.iterations % 3 != 2)
        x = jnp.where(is_done, state.x, jnp.where(newton, step, 0.5 * low + 0.5 * high))
        new = _State(low, high, x, residual, state.iterations + 1, is_done.astype(w.dtype))
        return jax.tree.map(lambda old, new: jnp.where(state.is_done > 0, old, new), state, new)

    found = lax.while_loop(is_open, turn, start)
    return found.x, found.iterations, found.residual, found.is_done


@_root.defjvp
def _root_jvp(primals, tangents):
    w, mixture, limits = primals
    w_dot, mixture_dot, _ = tangents
    found = _root(w, mixture, limits)
    x = found[0]
    (_, log_slope), (h_dot, _) = jax.jvp(partial(mixture_logit, x), (mixture,), (mixture_dot,))
    zeros = tuple(map(jnp.zeros_like, found[1:]))
    return found, ((w_dot - h_dot) * jnp.exp(-log_slope), *zeros)
