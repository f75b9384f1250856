"""Computes y = x + g(x) and log|det dy/dx| for any contraction g: exact, truncated, or by Russian roulette.

    log|det(I + J)| = tr log(I + J),                          J = dg/dx
    its gradient    = tr((I + J)^-1 dJ/dtheta)

A trace is estimated by tr(A) = E[v^T A v] with E[v v^T] = I (Hutchinson 1990). A function of J is a series, each term
of which takes one vector-Jacobian product of the same linearisation (`functional.series`). An infinite sum is estimated
by Russian roulette (`functional.roulette`). Sources: Chen et al. (2019, arXiv 1906.02735), equation 6 for the value and
equations 8 and 9 for the gradient (`functional.neumann`); Behrmann et al. (2019, arXiv 1811.00995), section 3.2, for
the truncated series. Estimates without a custom gradient are in `functional.direct_estimates`.

Shapes: x [B, ...] with any event shape, y like x, log_det [B] in nats. A batch that is a pytree is converted to one
array [B, D] first. g must treat the examples of a batch independently and have a Lipschitz constant below one in x.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from resflow_jax.functional.batch_axes import check_automatic, vary_over, varying_axes
from resflow_jax.functional.checks import (
    as_float_batch,
    check_callable,
    check_count,
    check_flag,
    check_key,
    check_open_interval,
)
from resflow_jax.functional.chunks import join_chunks, size_of_chunk, split_chunks
from resflow_jax.functional.conditions import arguments, as_condition, check_map
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.direct_estimates import custom_estimate, exact_estimate, series_estimate
from resflow_jax.functional.estimators import Estimator, Exact, Roulette, check_estimator, is_series, needs_key
from resflow_jax.functional.events import Events, is_tree
from resflow_jax.functional.length_laws import law_within
from resflow_jax.functional.neumann import neumann_estimate
from resflow_jax.functional.opaque import as_tree, original
from resflow_jax.functional.primitives.tracing import Traced, TracedForSizes, run, trace, trace_residual
from resflow_jax.functional.second_order import second_order_estimate
from resflow_jax.functional.term_sums import Form, longest_series, part_size, repeat

Array = jax.Array
Residual = Callable[..., Array]


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

    The estimator determines randomness and bias: `Roulette`, the default, is unbiased, `Exact` is exact, `Truncated` is
    biased. It also determines the cost: besides one evaluation of g, `Roulette` takes 4.5 vjps of g on average, 4.3
    with `lipschitz=0.94` (6.0 and 5.6 for a batch of odd size), and `Exact` takes D for D dimensions. The gradient of a
    series takes one more vjp of (g, J v).

    Args:
      g: pure function (params, x) -> array of x's shape and dtype. It must be a contraction in x and treat the
        examples of a batch independently. It may close over traced arrays; gradients reach them.
      params: any pytree.
      x: floats [B, ...], or a pytree of such arrays with one batch size and dtype; g then takes and returns such trees.
      condition: None, or any pytree of arrays [B, ...] of any dtype, one row for each example. g is then called as
        g(params, x, condition), and must be a contraction in x for every condition. If x is split into chunks or
        repeated for several probes, the condition is too.
      key: PRNG key of the estimate: it draws probes for each example, the length of the series, which the batch
        shares, and with `subsample` the examples whose series continues after the exact terms. `Exact` needs none.
      estimator: `Exact()`, `Truncated(...)`, `Roulette(...)` (the default), or a `CustomEstimator`.
      lipschitz: a bound on Lip(g), in (0, 1), if one is known. The distribution of the series length adapts to it. A
        RuntimeWarning is emitted if that distribution does not guarantee finite variance under this bound.
      prepare: pure function of params. g then takes its result instead of params. It is computed once for each call,
        and once more in the backward pass, however often g is evaluated; its result is not stored between the two.
      chunk_size: for gradient="neumann", the intended number of examples in a chunk. Chunks have equal size: the
        largest divisor of B that is at most chunk_size or, if that is less than chunk_size / 4 (for example for a prime
        B), the smallest divisor above chunk_size. CPUs and TPUs compute the chunks one after the other, so that
        activations stay in the cache or VMEM. Other platforms, and TPU programs that the compiler divides among several
        chips, compute them all at once. The result is the same. None means one chunk, or on a CPU one for each of the
        parts of `subsample`.
      return_diagnostics: whether to return `Diagnostics` as well.

    Inside `jax.shard_map` (with check_vma, its default) x is a device's part of the batch. With the same key on every
    device, the result is the same as without the division, with `subsample` if it divides the examples of a device: all
    devices draw the same length, and each example has its own probe. Inside `jax.pmap`, `jax.vmap` and a shard_map
    without check_vma this holds in the context `batch_axes`. Without that context every lane is a batch of its own, and
    lanes with the same key draw the same noise.

    Returns:
      (y, log_det) or (y, log_det, diagnostics): y like x, log_det [B] in nats. y and log_det are differentiable in
      params, x, the floats of the condition, and what g closes over; the diagnostics have no derivative.

    Raises:
      ValueError: if x is not a float array with a batch axis, if g changes x's shape or dtype, if the key is missing,
        if the estimator is unknown, for more orthogonal probes than dimensions, if an array of the condition has
        another batch size than x, or if g does not take a condition.

    Example:
      >>> g = lambda w, x: jnp.sin(x @ w)   # Lip(g) <= |w|_2 = 0.5
      >>> w, x = 0.5 * jnp.eye(3), jnp.zeros((2, 3))
      >>> y, log_det = rf.residual(g, w, x, estimator=rf.Exact())
      >>> bool(jnp.allclose(log_det, 3 * jnp.log(1.5)))
      True
      >>> y, log_det = rf.residual(g, w, x, key=jax.random.key(0), lipschitz=0.5)   # unbiased, by rf.Roulette()
      >>> y.shape, log_det.shape
      ((2, 3), (2,))
    """
    options = {"condition": condition, "key": key, "estimator": estimator, "lipschitz": lipschitz, "prepare": prepare}
    options |= {"chunk_size": chunk_size, "return_diagnostics": return_diagnostics}
    return log_det_of_form("residual", g, params, x, **options)


def log_det_of_form(
    form: Form,
    g: Residual,
    params: Any,
    x: Any,
    *,
    condition: Any,
    key: Array | None,
    estimator: Estimator | None,
    lipschitz: float | None,
    prepare: Callable[[Any], Any] | None,
    chunk_size: int | None,
    return_diagnostics: bool,
) -> tuple[Any, Array] | tuple[Any, Array, Diagnostics]:
    """`residual`, with the log-det of the given form of the Jacobian J of g at x instead of log|det(I + J)|."""
    check_flag("return_diagnostics", return_diagnostics)
    estimator = Roulette() if estimator is None else estimator
    check_map(g, condition)
    if prepare is not None:
        check_callable("prepare", prepare)
    check_key("key", key, optional=True)
    check_estimator(estimator)
    if is_tree(x):
        events, rows = Events.of("x", x)
        options = {"condition": condition, "key": key, "estimator": estimator, "lipschitz": lipschitz}
        options |= {"prepare": prepare, "chunk_size": chunk_size, "return_diagnostics": return_diagnostics}
        y, *others = log_det_of_form(form, events.wrap(g), params, rows, **options)
        return events.unpack(y), *others
    x = as_float_batch("x", x)
    check_automatic("x", x)
    condition = as_condition(condition, "x", x)
    if lipschitz is not None:
        check_open_interval("lipschitz", lipschitz, 0, 1)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, 1)
    if needs_key(estimator) and key is None:
        raise ValueError(
            f"key: {type(original(estimator)).__name__} expected a PRNG key, got None; estimator=Exact() needs none"
        )
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
    parts = part_size(estimator, x.shape[0]) if has_rule else 1
    other = None if parts == 1 else size_of_chunk(x.shape[0] // parts, chunks[0].shape[1])
    is_optional = parts > 1 and estimator.subsample is None
    traced, closed_over, takes_parts = _trace_g(g, prepare.out, batch, chunks, probes, other, is_optional)
    if missing := set(varying_axes(traced.out)) - set(varying_axes(batch)):  # arrays that g closes over
        batch, chunks = vary_over((batch, chunks), tuple(sorted(missing)))
        traced, closed_over, takes_parts = _trace_g(g, prepare.out, batch, chunks, probes, other, is_optional)
    if not takes_parts:
        estimator = replace(estimator, subsample=1)
    g = traced
    args = params, prepared_over, closed_over
    longest = longest_series(estimator) if is_series(estimator) and not has_rule else None
    y, log_det, diagnostics = run(_estimate, (g, prepare, longest, form), estimator, args, chunks, key)
    y, log_det = join_chunks(y), join_chunks(log_det)
    return (y, log_det, diagnostics) if return_diagnostics else (y, log_det)


def _identity(params: Any) -> Any:
    return params


def _trace_g(
    g: Residual,
    weights: Any,
    batch: tuple[Any, ...],
    chunks: tuple[Any, ...],
    probes: int,
    other: int | None,
    is_optional: bool,
) -> tuple[Traced | TracedForSizes, Any, bool]:
    """Traces g on the batches that it will be called with: a chunk, and one of the size `other`, for every probe.

    With `is_optional` g is not called with the other size, and the last result is False, unless it certainly is the
    same function of each row there.
    """
    x, chunk = batch[0], jax.tree.map(lambda leaf: leaf[0], chunks)
    part = repeat(chunk, probes)
    try:
        if chunk[0].shape != x.shape:
            trace_residual(g, weights, "x", *chunk)  # after repetition, the part may have as many rows as x
        whole = trace_residual(g, weights, "x", *part)
    except (TypeError, ValueError) as error:
        if chunk[0].shape == part[0].shape == x.shape:
            raise
        # If g fails on the whole batch too, this raises: chunks and probes are not the reason.
        trace_residual(g, weights, "x", *batch)
        raise _not_in_parts(part[0], x, error) from error
    if other is None or other == chunk[0].shape[0]:
        return *whole, True
    part = repeat(jax.tree.map(lambda leaf: leaf[:other], batch), probes)
    try:
        of_part = trace_residual(g, weights, "x", *part)
    except Exception as error:
        if is_optional:
            return *whole, False
        raise _not_in_parts(part[0], x, error) from error
    if is_optional and not TracedForSizes.are_of_rows(whole, of_part):
        return *whole, False
    return *TracedForSizes.of(whole, of_part), True


def _not_in_parts(part: Array, x: Array, error: Exception) -> ValueError:
    """The error for a g that takes the batch x, but not `part`."""
    return ValueError(
        f"chunk_size, probes, subsample: expected a g that takes {part.shape[0]} examples at once, not {x.shape[0]} (a "
        "chunk or a part of the batch, repeated for every probe), got an error. If g closes over an array with one row "
        "for each example, pass it as the condition. Otherwise use chunk_size=None, probes=1, subsample=1. "
        f"{type(error).__name__}: {error}"
    )


def _estimate(
    g: Traced | TracedForSizes,
    prepare: Traced,
    longest: int | None,
    form: Form,
    estimator: Estimator,
    args: Any,
    chunks: tuple[Any, ...],
    key: Array | None,
) -> Any:
    """y, log_det and diagnostics by any estimator.

    Args:
      g: (closed_over, weights, x, *condition) -> array like x.
      prepare: (prepared_over, params) -> weights.
      longest: length of the longest series if JAX differentiates the series itself, else None.
      form: form of the log-det.
      estimator: any estimator.
      args: (params, prepared_over, closed_over).
      chunks: (x,) or (x, condition), with arrays [chunks, b, ...]. y and log_det have the same leading axes.
      key: PRNG key, or None.
    """
    if is_series(estimator) and longest is None:
        if getattr(estimator, "second_order", False):
            return second_order_estimate(g, prepare, form, estimator, args, chunks, key)
        return neumann_estimate(g, prepare, form, estimator, args, chunks, key)
    params, prepared_over, closed_over = args
    x, *condition = jax.tree.map(lambda leaf: leaf[0], chunks)

    def g_of(args, x):
        (params, prepared_over, closed_over), condition = args
        return g(closed_over, prepare(prepared_over, params), x, *condition)

    if isinstance(estimator, Exact):
        # The Jacobian is recomputed in the backward pass: a chain of blocks would store all Jacobians.
        y, log_det = jax.checkpoint(partial(exact_estimate, g_of, estimator.chunk_size, form))((args, condition), x)
        diagnostics = Diagnostics.of(log_det, math.prod(x.shape[1:]))
    elif is_series(estimator):
        weights, repeated = prepare(prepared_over, params), repeat(condition, estimator.probes)
        of_x = lambda x: g(closed_over, weights, x, *repeated)  # noqa: E731
        y, log_det, diagnostics = series_estimate(of_x, longest, form, estimator, x, key)
    else:
        weights = prepare(prepared_over, params)
        of_x = lambda x: g(closed_over, weights, x, *condition)  # noqa: E731
        y, log_det = custom_estimate(of_x, form, original(estimator), x, key)
        diagnostics = Diagnostics.of(log_det, 0)
    return y[None], log_det[None], diagnostics
