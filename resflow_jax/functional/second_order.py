"""The Neumann gradient with a reverse-mode derivative of its own: unbiased Hessian-vector products.

With A = (I + J)^-1, the gradient along a direction a of parameters and x, and its derivative along a direction c, are

    D_a log|det(I + J)|     = tr(A D_a J)                               = E[w^T (D_a J) v]
    D_c D_a log|det(I + J)| = tr(A D_c D_a J) - tr(A (D_a J) A (D_c J)) = E[w^T (D_c D_a J) v] - E[w^T (D_a J) u]

with E[v v^T] = I, E[w] = A^T v, and E[u] = A (D_c J) v for u of a series of its own length, which is independent of w.
So this derivative is differentiated first and estimated then, as the gradient itself is (Chen et al. 2019, arXiv
1906.02735, appendix C). It needs v, w and x again; nothing of either series is stored. As a function of a it is a sum
of two vjps of (g, J v), the first of which is differentiated along c.

For a Cayley transform let B = (I - J^2)^-1, which commutes with J. Since (I - J)^-1 = B + J B and (I + J)^-1 = B - J B,

    D_a log|det|     = -2 tr(B D_a J)
    D_c D_a log|det| = -2 tr(B D_c D_a J) - 2 tr(B (D_a J) J B (D_c J)) - 2 tr(J B (D_a J) B (D_c J))
                     = E[w^T (D_c D_a J) v] + E[w^T (D_a J) J u] + E[(J^T w)^T (D_a J) u]

with E[w] = -2 B^T v and E[u] = B (D_c J) v: the second vjp has twice as many pairs of vectors.
"""

from functools import partial

import jax
import jax.numpy as jnp

from resflow_jax.functional.chunks import map_chunks
from resflow_jax.functional.neumann import estimate_with_w, probes_from_keys, pull_back, seed_keys_of, weighted
from resflow_jax.functional.primitives.derivatives import forward_only
from resflow_jax.functional.term_sums import draw_plan, plan_of, repeat, sum_terms
from resflow_jax.functional.trees import combine, float0, kept, mapped_with, partition, zero_cotangents


def second_order_estimate(g, prepare, form, estimator, args, chunks, key):
    """y, log_det and diagnostics as in `neumann.neumann_estimate`, with reverse mode of first and second order.

    Forward mode raises, and so does reverse mode of third order.
    """
    chunks = mapped_with(chunks[0], (key, estimator)), *chunks[1:]
    return _estimate(g, prepare, form, estimator, args, chunks, key)[:3]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _estimate(g, prepare, form, estimator, args, chunks, key):
    y, log_det, diagnostics, w, _ = estimate_with_w(g, prepare, form, estimator, args, chunks, key)
    return y, mapped_with(log_det, y), diagnostics, w


def _forward(g, prepare, form, estimator, args, chunks, key):
    found = _estimate(g, prepare, form, estimator, args, chunks, key)  # its outputs have this rule again
    return found, kept((estimator, args, chunks, key, found[3]))


def _backward(g, prepare, form, known, cotangents):
    estimator, args, chunks, key, w = known
    y_bar, log_det_bar, *_ = cotangents
    args_bar, chunks_bar = _gradient(g, prepare, form, estimator, args, chunks, key, w, y_bar, log_det_bar)
    args_bar, chunks_bar = (combine(part, float0(partition(whole)[1])) for part, whole in
                            ((args_bar, args), (chunks_bar, chunks)))  # fmt: skip
    return zero_cotangents(estimator), args_bar, chunks_bar, None


_estimate.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gradient(g, prepare, form, estimator, args, chunks, key, w, y_bar, log_det_bar):
    """The floats of the cotangents of args and chunks. Its derivative along w is not its own, but that of E[w]."""
    w_bar = weighted(w, log_det_bar, estimator.probes)
    _, keys = seed_keys_of(estimator, key, chunks)
    probes_from = probes_from_keys(estimator)
    cotangents = pull_back(g, prepare, estimator.probes, args, chunks, probes_from, keys, y_bar, w_bar)
    return tuple(_floats_like(bar, whole) for bar, whole in zip(cotangents, (args, chunks), strict=True))


def _floats_like(cotangents, primals):
    floats, _ = partition(primals)
    return jax.tree.map(
        lambda float_, bar: None if float_ is None else bar, floats, cotangents, is_leaf=lambda leaf: leaf is None
    )


def _gradient_forward(g, prepare, form, estimator, args, chunks, key, w, y_bar, log_det_bar):
    inputs = estimator, args, chunks, key, w, y_bar, log_det_bar
    return _gradient(g, prepare, form, *inputs), kept(inputs)


def _gradient_backward(g, prepare, form, known, directions):
    estimator, args, chunks, key, w, y_bar, log_det_bar = known
    (args_floats, args_others), (floats, others) = partition(args), partition(chunks)

    def gradient(args_floats, floats, y_bar, log_det_bar):
        args, chunks = combine(args_floats, args_others), combine(floats, others)
        return _gradient.__wrapped__(g, prepare, form, estimator, args, chunks, key, w, y_bar, log_det_bar)

    _, pullback = jax.vjp(gradient, args_floats, floats, y_bar, log_det_bar)
    args_bar, chunks_bar, y_bar_bar, log_det_bar_bar = pullback(directions)

    w_bar = weighted(w, log_det_bar, estimator.probes)
    total = args_bar, chunks_bar
    for vector, cotangent in _through_w(g, prepare, form, estimator, args, chunks, key, directions, w_bar):
        more = pull_back(
            g, prepare, estimator.probes, args, chunks, lambda x, u: u, vector, jnp.zeros_like(y_bar), cotangent
        )
        more = tuple(_floats_like(bar, whole) for bar, whole in zip(more, (args, chunks), strict=True))
        total = jax.tree.map(jnp.add, total, more)
    args_bar, chunks_bar = total
    return (
        zero_cotangents(estimator),
        combine(args_bar, float0(args_others)),
        combine(chunks_bar, float0(others)),
        None,
        jnp.zeros_like(w),
        y_bar_bar,
        log_det_bar_bar,
    )


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _through_w(g, prepare, form, estimator, args, chunks, key, directions, w_bar):
    """Pairs (u, w) of the terms w^T (D_a J) u that come from the derivative of E[w], [chunks, probes * b, ...] each.

    Args:
      g: as in `neumann.neumann_estimate`; likewise the next six arguments.
      prepare: the same.
      form: the same.
      estimator: the same.
      args: the same.
      chunks: the same.
      key: the same.
      directions: c, the floats of args and chunks.
      w_bar: the cotangents w of J v in the gradient, [chunks, probes * b, ...].
    """
    args_floats, args_others = partition(args)
    floats, others = partition(chunks)
    shared_key, keys = seed_keys_of(estimator, key, chunks)
    probes_from = probes_from_keys(estimator)
    plan = plan_of(form, draw_plan(estimator, jax.random.fold_in(shared_key, 1)))
    weights_and_over, along = jax.jvp(partial(_prepared, prepare, args_others), (args_floats,), (directions[0],))
    (weights_floats, weights_others), (along_floats, _) = partition(weights_and_over), partition(along)

    def of_chunk(inputs):
        floats, others, keys, direction, w_bar = inputs
        v = probes_from(combine(floats, others)[0], keys)

        def map_of(weights_floats, floats):
            weights, closed_over = combine(weights_floats, weights_others)
            x, *condition = repeat(combine(floats, others), estimator.probes)
            return (lambda x: g(closed_over, weights, x, *condition)), x

        def product(weights_floats, floats):
            function, x = map_of(weights_floats, floats)
            return jax.jvp(function, (x,), (v,))[1]

        _, r = jax.jvp(product, (weights_floats, floats), (along_floats, direction))
        _, times = jax.linearize(*map_of(weights_floats, floats))
        u = r + sum_terms(plan, r, times).w  # E[u] is A (D_c J) v, or B (D_c J) v
        if form == "residual":
            return [(u, -w_bar)]
        (transposed_w,) = jax.linear_transpose(times, w_bar)(w_bar)
        return [(times(u), w_bar), (u, transposed_w)]

    return forward_only(map_chunks(of_chunk, (floats, others, keys, directions[1], w_bar)))


def _prepared(prepare, args_others, args_floats):
    """(weights, closed_over) of args."""
    params, prepared_over, closed_over = combine(args_floats, args_others)
    return prepare(prepared_over, params), closed_over
