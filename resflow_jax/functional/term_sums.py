"""The sums over the terms of a series that estimate log|det(I + J)| and w, an unbiased estimate of (I + J)^-T v.

    value = sum_{k<=n} value_weight(k) * value of term k,     w = v + sum_{k<=n} w_weight(k) * w of term k

A `Plan` holds what one draw of an estimator fixes: the series, the number of terms n, and their weights. Probes v are
arrays [probes * B, ...], one batch after the other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.batch_axes import vary_alike
from resflow_jax.functional.diagnostics import DIAGNOSED_TERMS
from resflow_jax.functional.estimators import Roulette, Truncated
from resflow_jax.functional.roulette import draw_lengths, length_cap, term_weight
from resflow_jax.functional.series import MinimalResidual, PowerSeries, Product, Term

Array = jax.Array


class TermWeights(NamedTuple):
    """The weights of one term, scalars.

    Attributes:
      value: in the sum that estimates the log-det.
      w: in the sum that makes w, from which the gradient follows.
    """

    value: Array
    w: Array


class Plan(NamedTuple):
    """What one draw of an estimator fixes.

    Attributes:
      series: whose terms are added up.
      length: the number of terms.
      weights: from the number k >= 1 of a term to its weights.
    """

    series: PowerSeries | MinimalResidual
    length: Array | int
    weights: Callable[[Array], TermWeights]


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

    def add(self, k: Array, term: Term, weights: TermWeights) -> "Sums":
        """With term k, by its weights."""
        value_weight, w_weight = (weight.astype(term.w.dtype) for weight in weights)
        norm = value_weight * jnp.mean(jnp.square(term.w))
        is_kth = jnp.arange(1, DIAGNOSED_TERMS + 1, dtype=jnp.int32) == k
        return Sums(
            w=self.w + w_weight * term.w,
            value=self.value + value_weight * term.value,
            norms=self.norms + jnp.where(is_kth, norm, 0),
        )


def draw_plan(estimator: Truncated | Roulette, key: Array) -> Plan:
    """One draw; that of `Truncated` is always the same."""
    if isinstance(estimator, Truncated):
        return Plan(PowerSeries(), estimator.terms, partial(_truncated_weights, estimator.terms))
    series = PowerSeries() if estimator.minres_steps == 0 else MinimalResidual(estimator.minres_steps)
    lengths = draw_lengths(estimator.length, key, estimator.samples)

    def weights(k: Array) -> TermWeights:
        weight = term_weight(estimator.length, lengths, estimator.exact_terms, k)
        return TermWeights(value=weight, w=weight)

    return Plan(series, estimator.exact_terms + jnp.max(lengths), weights)


def _truncated_weights(terms: int, k: Array) -> TermWeights:
    # tr(J^k) has the derivative k * tr(J^(k-1) dJ): n terms of the value have powers below n.
    return TermWeights(value=jnp.ones(()), w=jnp.where(k < terms, 1.0, 0.0))


def longest_series(estimator: Truncated | Roulette) -> int:
    """The number of terms of the longest series."""
    if isinstance(estimator, Truncated):
        return estimator.terms
    return estimator.exact_terms + length_cap(estimator.length)


def sum_terms(plan: Plan, v: Array, product: Product) -> Sums:
    """The sums over the terms of a plan, in a loop that takes no more; reverse mode cannot differentiate it.

    Args:
      plan: of `draw_plan`.
      v: probes.
      product: u -> J^T u, of all probes at once.
    """

    def advance(carry):
        k, state, sums = carry
        return k + 1, *_add_term(plan, v, product, k, state, sums)

    start = jnp.int32(1), *_start(plan, v)
    _, _, sums = lax.while_loop(lambda carry: carry[0] <= plan.length, advance, start)
    return sums


def sum_terms_differentiably(plan: Plan, v: Array, product: Product, longest: int) -> Sums:
    """The same sums, which JAX can differentiate in any mode; `longest` bounds the length, and the memory."""

    @jax.checkpoint
    def advance(carry, k):
        return _add_term(plan, v, product, k, *carry)

    def step(carry, k):  # reverse mode needs a static length: later steps are skipped
        return lax.cond(k <= plan.length, advance, lambda carry, k: carry, carry, k), None

    (_, sums), _ = lax.scan(step, _start(plan, v), jnp.arange(1, longest + 1, dtype=jnp.int32))
    return sums


def _start(plan: Plan, v: Array) -> tuple[Any, Sums]:
    return vary_alike(plan.series.start(v), Sums.zero(v))


def _add_term(plan: Plan, v: Array, product: Product, k: Array, state: Any, sums: Sums) -> tuple[Any, Sums]:
    state, term = plan.series.step(k, v, state, product)
    return state, sums.add(k, term, plan.weights(k))


def repeat(batch: Any, probes: int) -> Any:
    """[probes * B, ...]: every array [B, ...] of the batch once for every probe."""
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (probes, *[1] * (leaf.ndim - 1))), batch)


def with_log_det(x: Array, g_x: Array, sums: Sums) -> tuple[Array, Array]:
    """y and log_det of x [B, ...], from g [probes * B, ...] and the sums over all probes."""
    batch = x.shape[0]
    return x + g_x[:batch], jnp.mean(sums.value.reshape(-1, batch), axis=0)
