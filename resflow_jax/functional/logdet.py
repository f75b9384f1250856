"""y = x + g(x) and log|det dy/dx| for any contraction g: exact, truncated or by Russian roulette.

    log|det(I + J)| = tr log(I + J),                          J = dg/dx
    d/dtheta of it  = tr((I + J)^-1 dJ/dtheta)

Traces are estimated by tr(A) = E[v^T A v] with E[v v^T] = I (Hutchinson 1990), functions of
J by a series that takes one vector-Jacobian product of one linearisation a term
(`functional.series`), infinite sums by Russian roulette (`functional.roulette`).
Chen et al. (2019, arXiv 1906.02735): equation 6 for the value; equations 8 and 9 with
appendix C ("Neumann gradient series") for the gradient; Behrmann et al. (2019, arXiv
1811.00995), section 3.2, for the truncated series.

The Neumann gradient differentiates first and estimates after: with w an unbiased estimate of
(I + J)^-T v, w_b^T (dJ_b/dtheta) v_b is an unbiased gradient of example b's log-det. The backward
pass is thus one vjp of x -> (g(x), J v) with cotangents (y_bar, ld_bar_b * w_b), one weight an
example. Only x, w and what v is made of (a bit or a key) are kept: memory grows neither with the series nor with
g's width. The loop that builds w adds up the value too, which is a true unbiased log-det.

Shapes: x [B, ...], any event shape; y like x; log_det [B], in nats. A tree of such arrays becomes one array [B, D] at
the door. g must treat the examples of a batch independently and have Lipschitz constant below one in x.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.checks import as_float_batch, check_callable, check_count, check_key, check_open_interval
from resflow_jax.functional.chunks import join_chunks, map_chunks, pullback_chunks, split_chunks
from resflow_jax.functional.conditions import arguments, as_condition, check_map
from resflow_jax.functional.derivatives import forward_only, reverse_only
from resflow_jax.functional.estimators import (
    Estimator,
    Exact,
    Roulette,
    Truncated,
    check_estimator,
    is_series,
    needs_key,
)
from resflow_jax.functional.events import Events, is_tree
from resflow_jax.functional.iteration import wide_dtype
from resflow_jax.functional.laws import law_within
from resflow_jax.functional.manual_axes import shared_and_example_keys, sum_alike, vary_alike, vary_over, varying_axes
from resflow_jax.functional.opaque import as_tree, original
from resflow_jax.functional.probes import draw_seeds, make_probes
from resflow_jax.functional.roulette import draw_lengths, length_cap, term_weight
from resflow_jax.functional.series import MinimalResidual, PowerSeries, Term
from resflow_jax.functional.texts import fields_text, number, span, values_of
from resflow_jax.functional.tracing import Traced, run, trace, trace_residual

Array = jax.Array
Residual = Callable[..., Array]

DIAGNOSED_TERMS = 16


class Diagnostics(NamedTuple):
    """What an estimate of the log-det tells about itself, at no further evaluation of g.

    Means over keys (training steps) estimate what the names say. Scalars but for `term_norms`; with a
    leading axis of residual blocks where a flow returns them.

    Attributes:
      length: vjps of g that the series took, a probe; for `Exact`, the dimension.
      term_norms: [16] mean over batch and probes of |term k of w|^2 / D, k = 1..16, times the roulette
        weight of the term, so that its expectation does not depend on the law. Zeros for `Exact`.
      mean: of log_det over the batch, in nats.
      second_moment: mean of log_det^2 over the batch.
    """

    length: Array
    term_norms: Array
    mean: Array
    second_moment: Array

    def __repr__(self) -> str:
        length, _, mean, second_moment = (values_of(field) for field in self)
        is_known = length is not None and mean is not None and second_moment is not None
        if not is_known or not length.shape == mean.shape == second_moment.shape or not mean.size:
            return fields_text(self)
        if mean.size > 1:
            return (
                f"Diagnostics of {' x '.join(map(str, mean.shape))} blocks: products with the Jacobian a probe "
                f"{number(length.sum())} ({span(length)} a block), mean log-det {number(mean.sum())} nats "
                f"({span(mean)} a block)"
            )
        deviation = math.sqrt(max(0.0, second_moment.item() - mean.item() ** 2))
        return (
            f"Diagnostics: products with the Jacobian a probe {number(length.item())}, log-det {number(mean.item())} "
            f"nats in the mean, deviation {number(deviation)} over the batch"
        )


def residual(
    g: Residual,
    params: Any,
    x: Any,
    *,
    condition: Any = None,
    key: Array | None = None,
    estimator: Estimator | None = None,
    lipschitz: float | None = None,
    prepare: Callable[[Any], Any] | None = None,
    chunk_size: int | None = None,
    return_diagnostics: bool = False,
) -> tuple[Any, Array] | tuple[Any, Array, Diagnostics]:
    """Computes y = x + g(params, x), or x + g(params, x, condition), and log|det dy/dx| with the given estimator.

    Args:
      g: pure function (params, x) -> array of x's shape and dtype, a contraction in x, each
        example of the batch by itself. It may close over traced arrays; gradients reach them.
      params: any pytree.
      x: floats [B, ...], or a pytree of such of one batch size and dtype; g then returns a tree like x.
      condition: what else g depends on, example by example: None, or any pytree of arrays [B, ...] of any dtype. g is
        then called as g(params, x, condition), and has to contract in x alone. It is divided into chunks and repeated
        for several probes together with x.
      key: PRNG key of the estimate; not needed by `Exact`.
      estimator: `Exact()`, `Truncated(...)`, `Roulette(...)` (the default), or an object as of `CustomEstimator`.
      lipschitz: a bound on Lip(g), if one is known: a law of lengths adapts to it, and a
        RuntimeWarning says so if the law does not guarantee finite variance under it.
      prepare: pure function of params whose result g takes in their place. It is computed once a call, however
        often g is evaluated, and again in the backward pass: nothing that it makes is kept.
      chunk_size: on a CPU the examples are taken in equal chunks of at most so many, one after the other, so
        that what g computes inside stays in the processor's cache; elsewhere all at once. None for one chunk.
        The result is the same. For gradient="neumann" alone.
      return_diagnostics: whether to return `Diagnostics` as well.

    Inside `jax.shard_map` (with check_vma, its default) x is a device's share of the batch: with the same key on
    every device, all take series of the same length, and each example gets its own probe, as if the batch were whole.
    Inside `jax.pmap`, `jax.vmap` and an unchecked shard_map this holds under `batch_axes`; without it every lane is a
    batch of its own, and lanes with the same key draw the same noise.

    Returns:
      (y, log_det) or (y, log_det, diagnostics): y like x; log_det [B] in nats. Differentiable in
      params, x and the floats of the condition; the diagnostics are not.

    Raises:
      ValueError: if x is not a float array with a batch axis, if g changes x's shape or dtype, if
        the key is missing, if the estimator is unknown, for more orthogonal probes than dimensions, if an array of the
        condition has not the batch axis of x, or if g does not take a condition.
    """
    estimator = Roulette() if estimator is None else estimator
    check_map(g, condition)
    if prepare is not None:
        check_callable("prepare", prepare)
    check_key("key", key, optional=True)
    check_estimator(estimator)
    if is_tree(x):
        events, rows = Events.of("x", x)
        options = {"key": key, "estimator": estimator, "lipschitz": lipschitz, "prepare": prepare}
        options |= {"chunk_size": chunk_size, "return_diagnostics": return_diagnostics}
        y, *rest = residual(events.wrap(g), params, rows, condition=condition, **options)
        return events.unpack(y), *rest
    x = as_float_batch("x", x)
    condition = as_condition(condition, "x", x)
    if lipschitz is not None:
        check_open_interval("lipschitz", lipschitz, 0, 1)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, 1)
    if needs_key(estimator) and key is None:
        raise ValueError(f"key: {type(original(estimator)).__name__} expected a PRNG key, got None")
    estimator = as_tree(estimator)
    if isinstance(estimator, Roulette):
        estimator = replace(estimator, length=law_within(estimator.length, lipschitz))
    batch = arguments(x, condition)
    batch = vary_over(batch, varying_axes((batch, params, key, estimator)))
    has_rule = is_series(estimator) and estimator.gradient == "neumann"
    chunks = split_chunks(batch, chunk_size if has_rule else None)
    probes = estimator.probes if is_series(estimator) else 1
    if has_rule:
        params = vary_over(params, varying_axes(batch))
    prepare, prepared_over = trace(_identity if prepare is None else prepare, params)
    traced, closed_over = _trace_g(g, prepare.out, batch, chunks, probes)
    if missing := set(varying_axes(traced.out)) - set(varying_axes(batch)):  # g closes over what differs over more axes
        chunks = vary_over(chunks, tuple(sorted(missing)))
        traced, closed_over = _trace_g(g, prepare.out, batch, chunks, probes)
    g = traced
    args = params, prepared_over, closed_over
    longest = _longest(estimator) if is_series(estimator) and not has_rule else None
    y, log_det, diagnostics = run(_estimate, (g, prepare, longest), estimator, args, chunks, key)
    y, log_det = join_chunks(y), join_chunks(log_det)
    return (y, log_det, diagnostics) if return_diagnostics else (y, log_det)


def _identity(params: Any) -> Any:
    return params


def _trace_g(
    g: Residual, weights: Any, batch: tuple[Any, ...], chunks: tuple[Any, ...], probes: int
) -> tuple[Traced, list[Any]]:
    """g traced on the examples that it will take at once: a chunk of the batch, once for every probe."""
    x, chunk = batch[0], jax.tree.map(lambda leaf: leaf[0], chunks)
    part = _repeat(chunk, probes)
    try:
        if chunk[0].shape != x.shape:
            trace_residual(g, weights, "x", *chunk)  # the part may have as many rows as x by chance
        return trace_residual(g, weights, "x", *part)
    except (TypeError, ValueError) as error:
        if chunk[0].shape == part[0].shape == x.shape:
            raise
        # Where g fails on the whole batch too, chunks and probes are not the reason.
        trace_residual(g, weights, "x", *batch)
        raise ValueError(
            f"chunk_size, probes: expected a g that takes {part[0].shape[0]} examples at once in place of {x.shape[0]} "
            "(a chunk of the batch, repeated for every probe); it fails, probably since it closes over an array with "
            "one row an example, which belongs into the condition. Else use chunk_size=None and probes=1. "
            f"{type(error).__name__}: {error}"
        ) from error


def _estimate(
    g: Traced,
    prepare: Traced,
    longest: int | None,
    estimator: Estimator,
    args: Any,
    chunks: tuple[Any, ...],
    key: Array | None,
) -> Any:
    """y, log_det, diagnostics; chunks of x, or of x and the condition, y and log_det are [chunks, b, ...].

    longest: the length of the longest series, where JAX differentiates it.
    """
    if is_series(estimator) and longest is None:
        # A rule of gradients adds up what reaches a result over all lanes of a vmap that it does not depend on: y must
        # be mapped wherever log_det is, here, and log_det wherever y is, in `_neumann_forward`.
        chunks = _mapped_with(chunks[0], (key, estimator)), *chunks[1:]
        return _neumann(g, prepare, estimator, args, chunks, key, reverse_only((args, chunks)))
    params, prepared_over, closed_over = args
    x, *condition = jax.tree.map(lambda leaf: leaf[0], chunks)

    def g_of(args, x):
        (params, prepared_over, closed_over), condition = args
        return g(closed_over, prepare(prepared_over, params), x, *condition)

    if isinstance(estimator, Exact):
        # The Jacobian is not worth keeping: a chain of blocks would hold them all.
        y, log_det = jax.checkpoint(partial(_exact, g_of, estimator.chunk_size))((args, condition), x)
        diagnostics = _diagnostics(math.prod(x.shape[1:]), jnp.zeros(DIAGNOSED_TERMS, x.dtype), log_det)
    elif is_series(estimator):
        weights, repeated = prepare(prepared_over, params), _repeat(condition, estimator.probes)
        of_x = lambda x: g(closed_over, weights, x, *repeated)  # noqa: E731
        y, log_det, diagnostics = _autodiff(of_x, longest, estimator, x, key)
    else:
        weights = prepare(prepared_over, params)
        y, log_det = _custom(lambda x: g(closed_over, weights, x, *condition), original(estimator), x, key)
        diagnostics = _diagnostics(0, jnp.zeros(DIAGNOSED_TERMS, x.dtype), log_det)
    return y[None], log_det[None], diagnostics


def _mapped_with(x: Array, tree: Any) -> Array:
    """x, mapped by every `jax.vmap` that maps an array of the tree; costs nothing where x is mapped already."""
    for leaf in jax.tree.leaves(tree):
        leaf = leaf if isinstance(leaf, Array) else jnp.asarray(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        number = (jax.random.key_data(leaf) if is_key else leaf).reshape(-1)[0]
        always = (number == number) | True
        x = lax.select_n(always, lax.stop_gradient(x), x)  # which XLA removes
    return x


def _longest(estimator: Truncated | Roulette) -> int:
    """The number of terms of the longest series."""
    if isinstance(estimator, Truncated):
        return estimator.terms
    return estimator.exact_terms + length_cap(estimator.length)


class _Plan(NamedTuple):
    """The terms of one draw: of which series, how many, and the weights of term k in value and in w.

    Attributes:
      series: what is summed.
      length: the number of terms.
      value_weight, neumann_weight: from the number k of a term to its weight, a scalar.
    """

    series: PowerSeries | MinimalResidual
    length: Array | int
    value_weight: Callable[[Array], Array]
    neumann_weight: Callable[[Array], Array]


def _draw_plan(estimator: Truncated | Roulette, key: Array) -> _Plan:
    if isinstance(estimator, Truncated):
        # tr(J^k) has the derivative k * tr(J^(k-1) dJ): n terms of the value have powers below n.
        below = lambda k: jnp.where(k < estimator.terms, 1.0, 0.0)  # noqa: E731
        return _Plan(PowerSeries(), estimator.terms, lambda k: jnp.ones(()), below)
    series = PowerSeries() if estimator.krylov == 0 else MinimalResidual(estimator.krylov)
    lengths = draw_lengths(estimator.length, key, estimator.samples)
    weight = partial(term_weight, estimator.length, lengths, estimator.exact_terms)
    return _Plan(series, estimator.exact_terms + jnp.max(lengths), weight, weight)


def _repeat(batch: Any, times: int) -> Any:
    """[times * B, ...]: every array of the batch once for every probe."""
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (times, *[1] * (leaf.ndim - 1))), batch)


class _Sums(NamedTuple):
    """What a series adds up: w - v, the value, and the squared norms of the first terms."""

    w: Array
    value: Array
    norms: Array

    @classmethod
    def zero(cls, v: Array) -> "_Sums":
        return cls(jnp.zeros_like(v), jnp.zeros(v.shape[0], v.dtype), jnp.zeros(DIAGNOSED_TERMS, v.dtype))

    def add(self, plan: _Plan, k: Array, term: Term) -> "_Sums":
        dtype = term.w.dtype
        value_weight, neumann_weight = plan.value_weight(k).astype(dtype), plan.neumann_weight(k).astype(dtype)
        norm = value_weight * jnp.mean(jnp.square(term.w))
        return _Sums(
            self.w + neumann_weight * term.w,
            self.value + value_weight * term.value,
            self.norms + jnp.where(jnp.arange(1, DIAGNOSED_TERMS + 1, dtype=jnp.int32) == k, norm, 0),
        )


def _result(x: Array, g_x: Array, sums: _Sums) -> tuple[Array, Array]:
    """y and log_det, from g and sums over the probes' batches."""
    batch = x.shape[0]
    return x + g_x[:batch], jnp.mean(sums.value.reshape(-1, batch), axis=0)


def _diagnostics(length: Array | int, norms: Array, log_det: Array) -> Diagnostics:
    values = jnp.asarray(length, log_det.dtype), norms, jnp.mean(log_det), jnp.mean(jnp.square(log_det))
    return Diagnostics(*map(lax.stop_gradient, values))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _neumann(g, prepare, estimator, args, chunks, key, token):
    return _neumann_forward(g, prepare, estimator, args, chunks, key, token)[0]


def _neumann_forward(g, prepare, estimator, args, chunks, key, token):
    """chunks: (x,) or (x, condition), of arrays [chunks, b, ...]; y and log_det likewise; a token of `reverse_only`."""
    params, prepared_over, closed_over = args
    weights = prepare(prepared_over, params)
    length_key, keys = shared_and_example_keys(key, join_chunks(chunks[0]))
    plan = _draw_plan(estimator, length_key)

    def of_chunk(inputs):
        (x, *condition), keys = inputs
        seeds = draw_seeds(estimator.probe, estimator.probes, keys, x)
        v = make_probes(estimator.probe, estimator.probes, seeds, x)
        x_repeated, *condition = _repeat((x, *condition), estimator.probes)
        g_x, pullback = jax.vjp(lambda x: g(closed_over, weights, x, *condition), x_repeated)

        def add_term(carry):
            k, state, sums = carry
            state, term = plan.series.step(k, v, state, lambda u: pullback(u)[0])
            return k + 1, state, sums.add(plan, k, term)

        start = jnp.int32(1), *vary_alike(plan.series.start(v), _Sums.zero(v))
        _, _, sums = lax.while_loop(lambda carry: carry[0] <= plan.length, add_term, start)
        return *_result(x, g_x, sums), v + sums.w, sums.norms, seeds

    keys = keys.reshape(*chunks[0].shape[:2], *keys.shape[1:])  # old-style keys are arrays of words
    y, log_det, w, norms, seeds = map_chunks(of_chunk, (chunks, keys))
    log_det, w = forward_only((_mapped_with(log_det, y), w))
    diagnostics = _diagnostics(plan.length, jnp.mean(norms, axis=0), log_det)
    return (y, log_det, diagnostics), (estimator, args, chunks, seeds, w)


def _neumann_backward(g, prepare, kept, cotangents):
    estimator, args, chunks, seeds, w = kept
    params, prepared_over, closed_over = args
    y_bar, log_det_bar, _ = cotangents
    weights, pullback = jax.vjp(prepare, prepared_over, params)
    differentiable, static = _partition((weights, closed_over))
    floats, others = _partition(chunks)

    def value_and_product(differentiable, floats, others):
        weights, closed_over = _combine(differentiable, static)
        others, seeds = others
        x, *condition = _combine(floats, others)
        v = make_probes(estimator.probe, estimator.probes, seeds, x)
        x_repeated, *condition = _repeat((x, *condition), estimator.probes)
        value, product = jax.jvp(lambda x: g(closed_over, weights, x, *condition), (x_repeated,), (v,))
        return value[: x.shape[0]], product

    per_example = log_det_bar.reshape(*log_det_bar.shape, *[1] * (y_bar.ndim - 2)) / estimator.probes
    w_bar = jax.vmap(lambda scale, w: _repeat(scale, estimator.probes) * w)(per_example, w)
    differentiable_bar, floats_bar = pullback_chunks(
        value_and_product, differentiable, floats, (others, seeds), (y_bar, w_bar)
    )
    weights_bar, closed_over_bar = _combine(differentiable_bar, _float0(static))
    x_bar, *condition_bar = _combine(floats_bar, _float0(others))
    prepared_over_bar, params_bar = pullback(weights_bar)
    args_bar = sum_alike((params_bar, prepared_over_bar, closed_over_bar), args)
    return _zero_cotangents(estimator), args_bar, (x_bar + y_bar, *condition_bar), None, None


def _float0(tree):
    """The cotangents of arrays that are not of floats."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


def _zero_cotangents(tree):
    differentiable, static = _partition(jax.tree.map(jnp.asarray, tree))
    return _combine(jax.tree.map(jnp.zeros_like, differentiable), _float0(static))


def _partition(tree):
    """The floats of a tree, and its other leaves, each in a tree with None for the rest."""
    floats = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), tree)
    differentiable = jax.tree.map(lambda leaf, is_float: leaf if is_float else None, tree, floats)
    return differentiable, jax.tree.map(lambda leaf, is_float: None if is_float else leaf, tree, floats)


def _combine(first, second):
    """The tree that `_partition` has taken apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


_neumann.defvjp(_neumann_forward, _neumann_backward)


def _autodiff(g, longest, estimator, x, key):
    """The same estimate of the value, left to JAX's own differentiation."""
    length_key, keys = shared_and_example_keys(key, x)
    plan = _draw_plan(estimator, length_key)
    v = make_probes(estimator.probe, estimator.probes, draw_seeds(estimator.probe, estimator.probes, keys, x), x)
    g_x, pullback = jax.vjp(g, _repeat(x, estimator.probes))

    @jax.checkpoint
    def add_term(carry, k):
        state, sums = carry
        state, term = plan.series.step(k, v, state, lambda u: pullback(u)[0])
        return state, sums.add(plan, k, term)

    def step(carry, k):  # reverse mode needs a static length: later steps are skipped
        return lax.cond(k <= plan.length, add_term, lambda carry, k: carry, carry, k), None

    start = vary_alike(plan.series.start(v), _Sums.zero(v))
    (_, sums), _ = lax.scan(step, start, jnp.arange(1, longest + 1, dtype=jnp.int32))
    y, log_det = _result(x, g_x, sums)
    return y, log_det, _diagnostics(plan.length, sums.norms, log_det)


def _custom(g, estimator, x, key):
    """What an estimator of the user's own returns, checked."""

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


def _exact(g, chunk_size, args, x):
    batch, event = x.shape[0], x.shape[1:]
    g_x, pullback = jax.vjp(partial(g, args), x)
    size = math.prod(event)
    basis = vary_over(jnp.eye(size, dtype=x.dtype).reshape(size, *event), varying_axes(x))

    def row(e):  # e_i^T J of every example at once
        return pullback(jnp.broadcast_to(e[None], x.shape))[0].reshape(batch, size)

    rows = lax.map(row, basis, batch_size=min(chunk_size, size))
    jacobian = rows.swapaxes(0, 1)
    # det(I + J) > 0: I + tJ is invertible for every t in [0, 1], since |tJ| < 1.
    matrices = jnp.eye(size, dtype=x.dtype)[None] + jacobian
    matrices = matrices.astype(wide_dtype(x.dtype))  # LAPACK has no 16-bit floats
    log_det = lax.platform_dependent(matrices, cpu=partial(lax.map, _log_abs_det), default=_log_abs_det)
    return x + g_x, log_det.astype(x.dtype)


def _log_abs_det(matrices):
    """On a CPU to be taken of one matrix at a time: batches in two devices at once wait for each other for ever."""
    return jnp.linalg.slogdet(matrices)[1]
