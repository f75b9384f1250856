"""The sums over the terms of a series that estimate log|det(I + J)| and w = (I + J)^-T v.

    value = sum_{k<=n} value_weight(k) * value of term k,     w = v + sum_{k<=n} w_weight(k) * w of term k

A `Plan` is one draw of an estimator: the series, its number of terms n, and their weights. Probes v are arrays
[probes * B, ...]: the batch is repeated for each probe.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.batch_axes import vary_alike
from resflow_jax.functional.cayley_series import ParityPowerSeries, TwoSidedKrylov
from resflow_jax.functional.diagnostics import DIAGNOSED_TERMS
from resflow_jax.functional.estimators import Roulette, Truncated, subsampling
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.primitives.random_words import random_words
from resflow_jax.functional.roulette import draw_lengths, length_cap, term_weight
from resflow_jax.functional.series import MinimalResidual, PowerSeries, Product, Term, dot
from resflow_jax.functional.trace_probes import mean_trace, number_of_trace_probes

Array = jax.Array
Form = Literal["residual", "cayley"]  # log|det(I + J)|, or log|det((I - J)(I + J)^-1)|


class TermWeights(NamedTuple):
    """The weights of one term, scalars.

    Attributes:
      value: weight in the sum for the log-det.
      w: weight in the sum for w, which the gradient uses.
    """

    value: Array
    w: Array


class Plan(NamedTuple):
    """One draw of an estimator.

    Attributes:
      series: the series whose terms are summed.
      length: the number of terms, int32 [].
      weights: function from the number k >= 1 of a term to its weights.
      scale: factor on the value and on w.
      exact_terms: the number of terms that are always taken.
      has_trace_probes: whether other probes estimate the trace, as in `functional.trace_probes`.
    """

    series: Any
    length: Array | int
    weights: Callable[[Array], TermWeights]
    scale: float = 1.0
    exact_terms: int = 0
    has_trace_probes: bool = False


class Part(NamedTuple):
    """One example of every `every`, from number `first` on, of a batch that is divisible by `every`.

    Attributes:
      every: r.
      first: int32 [] below r.
    """

    every: int
    first: Array

    def of(self, tree: Any) -> Any:
        """The part [B / r, ...] of every array [B, ...]."""

        def part(leaf: Array) -> Array:
            return lax.dynamic_index_in_dim(self._rows(leaf), self.first, 1, keepdims=False)

        return jax.tree.map(part, tree)

    def each(self, tree: Any) -> Any:
        """All parts [r, B / r, ...] of every array [B, ...], in the order of their first examples."""
        return jax.tree.map(lambda leaf: self._rows(leaf).swapaxes(0, 1), tree)

    def in_order(self, x: Array) -> Array:
        """The array [B, ...] in the order of the batch; `x` has one part of it after the other."""
        return x.reshape(self.every, x.shape[0] // self.every, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    def _rows(self, x: Array) -> Array:
        """[B / r, r, ...]; sizes are explicit, since an array may have an axis of length zero."""
        return x.reshape(x.shape[0] // self.every, self.every, *x.shape[1:])

    def plan_of(self, plan: Plan, number: Array) -> Plan:
        """The plan of the part that begins with example `number`: of exact terms alone, but for this part."""

        def weights(k: Array) -> TermWeights:
            factor = jnp.where(k > plan.exact_terms, self.every, 1)
            return TermWeights(*(factor.astype(weight.dtype) * weight for weight in plan.weights(k)))

        length = jnp.where(number == self.first, plan.length, plan.exact_terms)
        return plan._replace(length=length, weights=weights)

    def placed(self, part: Array) -> Array:
        """[B, ...]: the array `part` [B / r, ...] in its place, and zeros elsewhere."""
        is_here = jnp.arange(self.every, dtype=jnp.int32) == self.first
        is_here = is_here.reshape(1, -1, *[1] * (part.ndim - 1))
        return jnp.where(is_here, part[:, None], 0).reshape(-1, *part.shape[1:])


class Sums(NamedTuple):
    """The sums over terms: w - v [probes * B, ...], the value [probes * B], and the squared norms of the first terms.

    The norms are means over examples and probes, [16], as in `Diagnostics.term_norms`.
    """

    w: Array
    value: Array
    norms: Array

    @classmethod
    def zero(cls, v: Array) -> "Sums":
        return cls(jnp.zeros_like(v), jnp.zeros(v.shape[0], v.dtype), jnp.zeros(DIAGNOSED_TERMS, v.dtype))

    def astype(self, dtype: Any) -> "Sums":
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)

    def add(self, k: Array, term: Term, weights: TermWeights) -> "Sums":
        """The sums after adding term k with its weights."""
        value_weight, w_weight = (weight.astype(term.w.dtype) for weight in weights)
        norm = value_weight * term.mean_square()
        is_kth = jnp.arange(1, DIAGNOSED_TERMS + 1, dtype=jnp.int32) == k
        return Sums(
            w=self.w + w_weight * term.w,
            value=self.value + value_weight * term.value,
            norms=self.norms + jnp.where(is_kth, norm, 0),
        )


def draw_plan(estimator: Truncated | Roulette, key: Array) -> Plan:
    """Draws the length of the series with the key. `Truncated` draws nothing."""
    if isinstance(estimator, Truncated):
        return Plan(PowerSeries(), estimator.terms, partial(_truncated_weights, estimator.terms))
    series = PowerSeries() if estimator.minres_steps == 0 else MinimalResidual(estimator.minres_steps)
    lengths = draw_lengths(estimator.length, key, estimator.samples)

    def weights(k: Array) -> TermWeights:
        weight = term_weight(estimator.length, lengths, estimator.exact_terms, k)
        return TermWeights(value=weight, w=weight)

    return Plan(
        series,
        estimator.exact_terms + jnp.max(lengths),
        weights,
        exact_terms=estimator.exact_terms,
        has_trace_probes=number_of_trace_probes(estimator) > 0,
    )


def part_size(estimator: Truncated | Roulette, batch: Any) -> int:
    """The r of `Roulette.subsample` for a batch of this size: its largest divisor that is at most `subsampling`."""
    wanted = subsampling(estimator)
    return max(r for r in range(1, wanted + 1) if batch % r == 0) if isinstance(batch, int) else 1


def draw_part(estimator: Truncated | Roulette, key: Array, batch: Any) -> Part | None:
    """The examples whose series continue after the exact terms; None for all.

    Each part has the same probability if there are 2^k of them, and otherwise within a factor of 1 + r 2^-32.
    """
    every = part_size(estimator, batch)
    if every == 1:
        return None
    (word,) = random_words(jax.random.fold_in(key, 2), 1)
    return Part(every, (word % every).astype(jnp.int32))


def _truncated_weights(terms: int, k: Array) -> TermWeights:
    # The derivative of tr(J^k) is k * tr(J^(k-1) dJ), so n terms of the value give powers 0 ... n - 1 in w.
    return TermWeights(value=jnp.ones(()), w=jnp.where(k < terms, 1.0, 0.0))


def plan_of(form: Form, plan: Plan) -> Plan:
    """The plan for a log-det of this form, with the length and the weights of a plan for log|det(I + J)|."""
    if form == "residual":
        return plan
    is_power = isinstance(plan.series, PowerSeries)
    return plan._replace(series=ParityPowerSeries() if is_power else TwoSidedKrylov(plan.series.steps), scale=-2.0)


def longest_series(estimator: Truncated | Roulette) -> int:
    """The number of terms of the longest series that the estimator can draw; see `length_cap`."""
    if isinstance(estimator, Truncated):
        return estimator.terms
    return estimator.exact_terms + length_cap(estimator.length)


def sum_terms(plan: Plan, v: Array, product: Product, u: Array | None = None) -> Sums:
    """The sums over the terms of a plan, in a loop of exactly `plan.length` steps, which has no reverse mode.

    Args:
      plan: a plan from `draw_plan`.
      v: probes [probes * B, ...].
      product: u -> J^T u, for all probes at once.
      u: probes of the trace [trace_probes, probes * B, ...], if the plan has them and the value is needed.
    """
    wide, product = _widened(v, product)
    return _continued(plan, wide, product, 0, *_start(plan, wide, product, u), plan.length)[1].astype(v.dtype)


def sum_exact_terms(plan: Plan, v: Array, product: Product, u: Array | None) -> tuple[Any, Sums]:
    """The state of the series after its exact terms, arrays [probes * B, ...], and the sums over them."""
    wide, product = _widened(v, product)
    start = _start(plan, wide, product, u)
    if plan.exact_terms == 1:  # compiles faster than a loop
        state, sums = _add_term(plan, wide, product, jnp.int32(1), *start)
    else:
        state, sums = _continued(plan, wide, product, 0, *start, plan.exact_terms)
    return state, sums.astype(v.dtype)


def sum_further_terms(plan: Plan, v: Array, product: Product, state: Any) -> Sums:
    """The sums over the terms after the exact ones, from the state of `sum_exact_terms`."""
    wide, product = _widened(v, product)
    start = vary_alike(state, Sums.zero(wide))
    return _continued(plan, wide, product, plan.exact_terms, *start, plan.length)[1].astype(v.dtype)


def _continued(
    plan: Plan, v: Array, product: Product, done: int, state: Any, sums: Sums, last: Array | int
) -> tuple[Any, Sums]:
    """State and sums after the terms `done` + 1 to `last`."""

    def advance(carry):
        k, state, sums = carry
        return k + 1, *_add_term(plan, v, product, k, state, sums)

    _, state, sums = lax.while_loop(lambda carry: carry[0] <= last, advance, (jnp.int32(done + 1), state, sums))
    return state, sums


def sum_terms_differentiably(plan: Plan, v: Array, product: Product, longest: int, u: Array | None) -> Sums:
    """The same sums, differentiable in any mode. `longest` bounds the length; memory grows with it."""
    wide, product = _widened(v, product)

    @jax.checkpoint
    def advance(carry, k):
        return _add_term(plan, wide, product, k, *carry)

    def step(carry, k):  # reverse mode needs a static length: later steps are skipped
        return lax.cond(k <= plan.length, advance, lambda carry, k: carry, carry, k), None

    start = _start(plan, wide, jax.checkpoint(product), u)
    (_, sums), _ = lax.scan(step, start, jnp.arange(1, longest + 1, dtype=jnp.int32))
    return sums.astype(v.dtype)


def _widened(v: Array, product: Product) -> tuple[Array, Product]:
    """Probes and products in float32 for 16-bit floats: the series subtracts numbers that are nearly equal."""
    dtype = wide_dtype(v.dtype)
    if dtype == v.dtype:
        return v, product
    return v.astype(dtype), lambda u: product(u.astype(v.dtype)).astype(dtype)


def _start(plan: Plan, v: Array, product: Product, u: Array | None) -> tuple[Any, Sums]:
    sums = Sums.zero(v)
    if u is not None:
        sums = sums._replace(value=mean_trace(u.astype(v.dtype), product))
    return vary_alike(plan.series.start(v), sums)


def _add_term(plan: Plan, v: Array, product: Product, k: Array, state: Any, sums: Sums) -> tuple[Any, Sums]:
    state, term = plan.series.step(k, v, state, product)
    if plan.has_trace_probes:
        term = term._replace(value=term.value - jnp.where(k == 1, dot(v, term.image), 0))
    return state, sums.add(k, term, plan.weights(k))


def repeat(batch: Any, probes: int) -> Any:
    """Repeats every array [B, ...] of the batch for each probe: [probes * B, ...]."""
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (probes, *[1] * (leaf.ndim - 1))), batch)


def with_log_det(x: Array, g_x: Array, sums: Sums, scale: float = 1.0) -> tuple[Array, Array]:
    """y and log_det [B] of x [B, ...], from g_x [probes * B, ...], and the sums of all probes times a plan's scale."""
    batch = x.shape[0]
    return x + g_x[:batch], scale * jnp.mean(sums.value.reshape(-1, batch), axis=0)
