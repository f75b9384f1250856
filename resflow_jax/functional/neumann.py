"""The Neumann gradient of a log-det estimate. Its memory depends neither on the series' length nor on g's width.

    d/dtheta log|det(I + J)| = tr((I + J)^-1 dJ/dtheta) = E[w^T (dJ/dtheta) v],    E[w] = (I + J)^-T v,   E[v v^T] = I

(Chen et al. 2019, arXiv 1906.02735, equations 8 and 9 with appendix C, "Neumann gradient series"). The log-det is
differentiated first and then estimated: if w is an unbiased estimate of (I + J)^-T v, then w_b^T (dJ_b/dtheta) v_b is
an unbiased gradient of example b's log-det. So the backward pass is one vjp of x -> (g(x), J v) with the cotangents
(y_bar, log_det_bar_b * w_b), one factor for each example. It needs only x, w, and the bits or keys that v is made from.
The loop that computes w also computes the value, which is itself an unbiased estimate of the log-det.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from resflow_jax.functional.batch_axes import sum_alike
from resflow_jax.functional.chunks import (
    join_chunks,
    join_probes,
    map_chunks,
    pullback_chunks,
    size_of_chunk,
    split_chunks,
    split_probes,
)
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.primitives.derivatives import forward_only, reverse_only
from resflow_jax.functional.primitives.platforms import target_platform
from resflow_jax.functional.probes import draw_seeds, make_probes, seed_keys
from resflow_jax.functional.term_sums import (
    draw_part,
    draw_plan,
    plan_of,
    repeat,
    sum_exact_terms,
    sum_further_terms,
    sum_terms,
    with_log_det,
)
from resflow_jax.functional.trace_probes import draw_trace_probes, number_of_trace_probes, trace_keys
from resflow_jax.functional.trees import combine, float0, mapped_with, partition, zero_cotangents

Array = jax.Array


def neumann_estimate(g, prepare, form, estimator, args, chunks, key):
    """y, log_det and diagnostics by the estimator's series, with the Neumann gradient.

    It has first-order reverse mode, and forward mode over that; other derivatives raise.

    Args:
      g: (closed_over, weights, x, *condition) -> array like x.
      prepare: (prepared_over, params) -> weights.
      form: form of the log-det, see `term_sums.Form`.
      estimator: `Truncated` or `Roulette`.
      args: (params, prepared_over, closed_over).
      chunks: (x,) or (x, condition), with arrays [chunks, b, ...]. y and log_det have the same leading axes.
      key: PRNG key.
    """
    # Under vmap, custom_vjp sums the cotangents of an output over the lanes if that output is not mapped. But log_det
    # may be mapped (by the key) where y is not. So y is mapped wherever log_det is, here, and log_det wherever y is, in
    # `_forward`.
    chunks = mapped_with(chunks[0], (key, estimator)), *chunks[1:]
    return _neumann(g, prepare, form, estimator, args, chunks, key, reverse_only((args, chunks)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _neumann(g, prepare, form, estimator, args, chunks, key, token):
    """`neumann_estimate` with a token of `reverse_only`, which refuses forward mode."""
    return _forward(g, prepare, form, estimator, args, chunks, key, token)[0]


def _forward(g, prepare, form, estimator, args, chunks, key, token):
    y, log_det, diagnostics, w, seeds = estimate_with_w(g, prepare, form, estimator, args, chunks, key)
    log_det, w = forward_only((mapped_with(log_det, y), w))
    return (y, log_det, diagnostics), (estimator, args, chunks, seeds, w)


def _backward(g, prepare, form, kept, cotangents):
    estimator, args, chunks, seeds, w = kept
    y_bar, log_det_bar, _ = cotangents
    w_bar = weighted(w, log_det_bar, estimator.probes)
    args_bar, chunks_bar = pull_back(
        g, prepare, estimator.probes, args, chunks, probes_of(estimator), seeds, y_bar, w_bar
    )
    return zero_cotangents(estimator), args_bar, chunks_bar, None, None


_neumann.defvjp(_forward, _backward)


def estimate_with_w(g, prepare, form, estimator, args, chunks, key):
    """y, log_det, diagnostics, w and the seeds of the probes v; arguments as in `neumann_estimate`."""
    params, prepared_over, closed_over = args
    weights = prepare(prepared_over, params)
    shared_key, keys = seed_keys_of(estimator, key, chunks)
    plan = plan_of(form, draw_plan(estimator, shared_key))
    part = draw_part(estimator, shared_key, math.prod(chunks[0].shape[:2]))
    keys = keys, _in_chunks(trace_keys(estimator, shared_key, join_chunks(chunks[0])), chunks)

    def of_chunk(inputs, plan=plan):
        (x, *condition), (keys, keys_of_trace) = inputs
        seeds = draw_seeds(estimator.probe, estimator.probes, keys, x)
        v = make_probes(estimator.probe, estimator.probes, seeds, x)
        g_x, product = linearized(x, condition)
        u = draw_trace_probes(estimator, keys_of_trace, x)
        state, sums = sum_exact_terms(plan, v, product, u) if at_once else (None, sum_terms(plan, v, product, u))
        return *with_log_det(x, g_x, sums, plan.scale), plan.scale * (v + sums.w), sums.norms, seeds, state

    def of_chunk_of_part(inputs):
        number, *inputs = inputs
        return of_chunk(inputs, part.plan_of(plan, number))

    def further_terms(inputs):
        (x, *condition), seeds, state = inputs
        v = make_probes(estimator.probe, estimator.probes, seeds, x)
        sums = sum_further_terms(plan, v, linearized(x, condition)[1], state)
        return plan.scale * sums.value, plan.scale * sums.w, sums.norms

    def linearized(x, condition):
        x, *condition = repeat((x, *condition), estimator.probes)
        g_x, pullback = jax.vjp(lambda x: g(closed_over, weights, x, *condition), x)
        return g_x, lambda u: pullback(u)[0]

    # On a CPU the parts of a batch run in turn, each with its own length: there is one loop to compile. Other platforms
    # take all examples at once, and then further terms of the part alone.
    at_once = part is not None and target_platform() != "cpu"
    if part is None or at_once:
        y, log_det, w, norms, seeds, state = map_chunks(of_chunk, (chunks, keys))
    else:
        y, log_det, w, norms, seeds = _in_turn(of_chunk_of_part, part, estimator.probes, chunks, keys)
    norms, length = jnp.mean(norms, axis=0), plan.length
    if at_once:
        value, w_more, norms_more = _of_part(further_terms, part, estimator.probes, (chunks, seeds), state)
        log_det, w = log_det + jnp.mean(value, axis=1).reshape(log_det.shape), w + split_probes(w_more, len(w))
        norms = norms + norms_more
    if part is not None:
        length = plan.exact_terms + (length - plan.exact_terms) / part.every
    length = length + number_of_trace_probes(estimator)
    return y, log_det, Diagnostics.of(log_det, length, norms), w, seeds


def _in_turn(function, part, probes, chunks, keys):
    """y, log_det, w, norms and seeds of all chunks, by a function of the number of a part, of a chunk of it, and keys.

    Chunks are made anew, so that each has examples of one part only. The results are in the order of the given chunks.
    """
    number, size = chunks[0].shape[:2]
    of_a_part = number * size // part.every
    other = size_of_chunk(of_a_part, size)
    each = part.each(jax.tree.map(join_chunks, (chunks, keys)))
    rows = jax.tree.map(lambda leaf: leaf.reshape(number * size // other, other, *leaf.shape[2:]), each)
    numbers = jnp.repeat(jnp.arange(part.every, dtype=jnp.int32), of_a_part // other)
    y, log_det, w, norms, seeds, _ = map_chunks(function, (numbers, *rows))
    y, log_det, seeds = (part.in_order(join_chunks(x)).reshape(number, size, *x.shape[2:]) for x in (y, log_det, seeds))
    return y, log_det, split_probes(part.in_order(join_probes(w, probes)), number), norms, seeds


def _of_part(further_terms, part, probes, batch, state):
    """What `further_terms` adds to the value [B, probes], to w [B, probes, ...] and to the norms, for all examples.

    Args:
      further_terms: function of a chunk of (x, condition), of its seeds, and of the state of their series.
      part: the examples that have further terms.
      probes: number of probes of an example.
      batch: (chunks, seeds) of all examples.
      state: that of the series of all examples, arrays [chunks, probes * b, ...].
    """
    size = batch[0][0].shape[1]
    rows = split_chunks(part.of(jax.tree.map(join_chunks, batch)), size)
    state = part.of(jax.tree.map(lambda leaf: join_probes(leaf, probes), state))
    state = jax.tree.map(lambda leaf: split_probes(leaf, len(rows[0][0])), state)
    *sums, norms = map_chunks(further_terms, (*rows, state))
    return *(part.every * part.placed(join_probes(x, probes)) for x in sums), jnp.mean(norms, axis=0)


def seed_keys_of(estimator, key, chunks):
    """A key that all examples share, and what `draw_seeds` takes for the examples of each chunk, [chunks, b, ...]."""
    shared_key, keys = seed_keys(estimator.probe, estimator.probes, key, join_chunks(chunks[0]))
    return shared_key, _in_chunks(keys, chunks)


def _in_chunks(keys, chunks):
    """Keys [B, ...] of examples, or None, as those of the examples of each chunk, [chunks, b, ...]."""
    return jax.tree.map(lambda keys: keys.reshape(*chunks[0].shape[:2], *keys.shape[1:]), keys)  # keys may be words


def probes_of(estimator):
    """The function (x, seeds) -> v that makes the probes of an estimator again."""
    return lambda x, seeds: make_probes(estimator.probe, estimator.probes, seeds, x)


def probes_from_keys(estimator):
    """The function (x, keys) -> v that draws the probes v of a chunk, from the keys of `seed_keys_of`."""

    def probes_from(x, keys):
        settings = estimator.probe, estimator.probes
        return make_probes(*settings, draw_seeds(*settings, keys, x), x)

    return probes_from


def weighted(w, log_det_bar, probes):
    """w [chunks, probes * b, ...] times the cotangent log_det_bar [chunks, b] of its example, over the probes."""
    per_example = log_det_bar.reshape(*log_det_bar.shape, *[1] * (w.ndim - 2)) / probes
    return jax.vmap(lambda scale, w: repeat(scale, probes) * w)(per_example, w)


def pull_back(g, prepare, probes, args, chunks, probes_from, seeds, y_bar, w_bar):
    """The cotangents of args and chunks for y_bar of y = x + g(x) and w_bar of the products J v.

    Args:
      g: as in `neumann_estimate`.
      prepare: the same.
      probes: number of probes of an example.
      args: the same.
      chunks: the same.
      probes_from: function (x, seeds) -> v [probes * b, ...] of one chunk.
      seeds: a tree of arrays with the chunks along the leading axis; they have no cotangents.
      y_bar: [chunks, b, ...].
      w_bar: [chunks, probes * b, ...].
    """
    params, prepared_over, closed_over = args
    weights, pullback = jax.vjp(prepare, prepared_over, params)
    differentiable, static = partition((weights, closed_over))
    floats, others = partition(chunks)

    def value_and_product(differentiable, floats, others):
        weights, closed_over = combine(differentiable, static)
        others, seeds = others
        x, *condition = combine(floats, others)
        v = probes_from(x, seeds)
        x_repeated, *condition = repeat((x, *condition), probes)
        value, product = jax.jvp(lambda x: g(closed_over, weights, x, *condition), (x_repeated,), (v,))
        return value[: x.shape[0]], product

    differentiable_bar, floats_bar = pullback_chunks(
        value_and_product, differentiable, floats, (others, seeds), (y_bar, w_bar)
    )
    weights_bar, closed_over_bar = combine(differentiable_bar, float0(static))
    x_bar, *condition_bar = combine(floats_bar, float0(others))
    prepared_over_bar, params_bar = pullback(weights_bar)
    args_bar = sum_alike((params_bar, prepared_over_bar, closed_over_bar), args)
    return args_bar, (x_bar + y_bar, *condition_bar)
