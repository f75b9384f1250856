"""Anomaly scores: the distance of an example's log-density from that of typical data, on either side.

    score(x) = |-log p(x) - H|,   H = mean of -log p over training data, an estimate of the flow's entropy on data

Nalisnick et al. (2019, arXiv 1906.02994): in many dimensions the data lie where log p is near -H, not where it is
largest. An image of one colour may be more likely than every image of the data, yet its score is large. Their test
(algorithm 1) compares the score with those of held-out examples; so do the p-values here.

Everything is in nats, as returned by `log_prob`. `unit="bits/dim"` divides scores by D log 2. The bits/dim of images
also have an offset for their levels, which cancels in a score.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import (
    as_float_array,
    as_host_array,
    check_choice,
    check_count,
    check_key,
    check_type,
)
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.texts import constructor, count, fields_text, is_number, number, span, values_of
from resflow_jax.layers.conditions import as_condition
from resflow_jax.models.flow import Flow

Array = jax.Array

UNITS = ("nats", "bits/dim")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Typicality:
    """The distribution of log-densities of typical examples: a pytree of arrays, for use under jit and vmap.

    `Typicality.fit` makes it from examples, `Typicality.from_log_probs` from their log-densities. It does not hold the
    flow. Its methods take log p(x) in nats of any shape [...], from `log_prob` or `forward_and_log_prob` with the same
    estimator as for the typical examples. NaN stays NaN.

    Attributes:
      entropy: H, mean of -log p over the training examples, [] in nats.
      deviation: standard deviation of -log p over them, [] in nats.
      log_probs: log p of the N held-out examples in ascending order, [N] in nats.
      scores: their scores in ascending order, [N] in nats.
      dim: D, the number of elements of one example.

    Randomness: `group_p_value` only, and the estimates of `fit`. Cost: no evaluation of g, except in `fit`.

    Source: Nalisnick et al. (2019, arXiv 1906.02994), algorithm 1.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (600, 50))
      >>> flow = rf.Flow(rf.ActNorm((50,)), rf.StandardNormal((50,)))
      >>> typicality = rf.Typicality.fit(flow, x[:300], x[300:])
      >>> log_prob = flow.log_prob(jnp.zeros((1, 50)))   # the point of highest density
      >>> bool(typicality.p_value(log_prob)[0] < 0.01), bool(typicality.quantile(log_prob)[0] > 0.99)
      (True, True)
    """

    entropy: Array
    deviation: Array
    log_probs: Array
    scores: Array
    dim: int = field(metadata={"static": True})

    @classmethod
    def fit(
        cls,
        flow: Flow,
        x_train: Any,
        x_held_out: Any = None,
        *,
        key: Array | None = None,
        condition: Any = None,
        condition_held_out: Any = None,
        estimator: Estimator | None = None,
        batch_size: int = 256,
    ) -> "Typicality":
        """Computes H from training examples and the distribution of scores from held-out ones.

        Args:
          flow: the trained flow, its norms converged.
          x_train: floats [N, *event_shape] as `flow.log_prob` takes them, N >= 2; images are dequantised.
          x_held_out: the same for examples that the flow has not been trained on. Without them x_train is used for
            both. The p-values are then too small if the flow has overfitted.
          key: PRNG key of the log-det estimates, and of the noise of a flow that pads x; not needed by `Exact`.
          condition: for a conditional flow, one for each of x_train, [N, *condition_shape], or one for all. The
            distribution of log p(x | c) is that over the pairs (x, c) of the data.
          condition_held_out: the same for x_held_out.
          estimator: estimator of the log-dets, as in `flow.log_prob`; use the same for the examples to evaluate, since
            its noise widens the distribution.
          batch_size: number of examples in one call of `log_prob`.

        Cost: one `log_prob` of every example, compiled once; not for use under jit.

        Raises:
          ValueError: as `flow.log_prob`; for fewer than two training examples, for a condition without held-out
            examples, and for log-densities that are not finite.
        """
        check_type("flow", flow, Flow)
        check_key("key", key, optional=True)
        check_count("batch_size", batch_size, 1)
        if x_held_out is None and condition_held_out is not None:
            raise ValueError("condition_held_out: expected None without x_held_out, got a condition")
        keys = (None, None) if key is None else jax.random.split(key)
        with _named(x="x_train"):
            found = _log_probs("x_train", flow, x_train, condition, keys[0], estimator, batch_size)
        held_out = None
        if x_held_out is not None:
            arguments = x_held_out, condition_held_out, keys[1], estimator, batch_size
            with _named(x="x_held_out", condition="condition_held_out"):
                held_out = _log_probs("x_held_out", flow, *arguments)
        return cls.from_log_probs(found, held_out, dim=int(np.prod(flow.event_shape, dtype=int)))

    @classmethod
    def from_log_probs(cls, log_prob: Array, held_out: Array | None = None, *, dim: int) -> "Typicality":
        """As `fit`, from log-densities in nats that are known already.

        Args:
          log_prob: log p of training examples, floats [N], N >= 2; may be traced.
          held_out: log p of held-out examples, floats [M]; by default those of the training examples.
          dim: D, the number of elements of one example.

        Raises:
          ValueError: for another shape or dtype, fewer examples, and concrete values that are not finite.
        """
        check_count("dim", dim, 1)
        log_prob = _checked("log_prob", log_prob, 2)
        held_out = log_prob if held_out is None else _checked("held_out", held_out, 1).astype(log_prob.dtype)
        entropy, deviation = -jnp.mean(log_prob), jnp.std(log_prob, ddof=1)
        return cls(entropy, deviation, jnp.sort(held_out), jnp.sort(jnp.abs(-held_out - entropy)), dim)

    def score(self, log_prob: Array, *, unit: str = "nats") -> Array:
        """|-log p(x) - H| [...] from log p(x) [...] in nats; large for atypical examples, also for too likely ones.

        Args:
          log_prob: floats [...].
          unit: unit of the score: "nats" for an example as a whole, or "bits/dim", which divides by D log 2.

        Raises:
          ValueError: for an unknown unit, and for log_prob that is not a float array.
        """
        check_choice("unit", unit, UNITS)
        score = jnp.abs(-self._of(log_prob) - self.entropy)
        return score / (self.dim * np.log(2).item()) if unit == "bits/dim" else score

    def p_value(self, log_prob: Array) -> Array:
        """The p-value [...] in (0, 1] of each example, from log p(x) [...] in nats: small for atypical ones.

            p = (1 + number of held-out examples with this score or a larger one) / (N + 1)

        If an example is drawn as the held-out examples are, P(p <= a) <= a for every a, and nearly equal. So the rule
        p <= 0.01 wrongly declares one in a hundred typical examples atypical. The smallest possible value is 1 / (N +
        1).
        """
        score = self.score(log_prob)
        number = self.scores.shape[0]
        below = jnp.searchsorted(self.scores, score, side="left")
        p = (1 + number - below).astype(score.dtype) / (number + 1)
        return jnp.where(jnp.isnan(score), jnp.nan, p)

    def quantile(self, log_prob: Array) -> Array:
        """The fraction [...] in [0, 1] of held-out examples that are less likely, from log p(x) [...] in nats.

        Ties count half. The quantile shows on which side an atypical example lies: near 0 it is too unlikely, near 1
        too likely, for example an image of one colour.
        """
        log_prob = self._of(log_prob)
        ends = [jnp.searchsorted(self.log_probs, log_prob, side=side) for side in ("left", "right")]
        share = (ends[0] + ends[1]).astype(log_prob.dtype) / (2 * self.log_probs.shape[0])
        return jnp.where(jnp.isnan(log_prob), jnp.nan, share)

    def group_p_value(self, log_prob: Array, key: Array, *, resamples: int = 1000) -> Array:
        """The p-value [...] of groups of M examples each, from log p(x) [..., M] in nats, by the bootstrap of the
        paper.

            score = |mean over the group of -log p(x) - H|

        is compared with the scores of groups of M examples that are drawn, with replacement, from the held-out
        examples. A group reveals far more than one example. M should be small compared with N, since the errors of H
        and of the finite held-out set have a relative size of M / N.

        Args:
          log_prob: floats [..., M], the groups along the last axis.
          key: PRNG key of the drawn groups; the same draws serve all groups.
          resamples: R, the number of groups to draw; the smallest possible p-value is 1 / (R + 1).

        Cost: memory for R * M numbers; no evaluation of g.

        Raises:
          ValueError: for log_prob without an axis of examples, and for a number below one.
        """
        check_key("key", key)
        check_count("resamples", resamples, 1)
        log_prob = self._of(log_prob)
        if log_prob.ndim < 1 or log_prob.shape[-1] < 1:
            raise ValueError(f"log_prob: expected floats [..., M] with M > 0, got shape {log_prob.shape}")
        chosen = jax.random.randint(key, (resamples, log_prob.shape[-1]), 0, self.log_probs.shape[0])
        drawn = jnp.sort(jnp.abs(-jnp.mean(self.log_probs[chosen], axis=-1) - self.entropy))
        score = jnp.abs(-jnp.mean(log_prob, axis=-1) - self.entropy)
        below = jnp.searchsorted(drawn, score, side="left")
        p = (1 + resamples - below).astype(score.dtype) / (resamples + 1)
        return jnp.where(jnp.isnan(score), jnp.nan, p)

    def _of(self, log_prob: Array) -> Array:
        """log_prob, checked, in the dtype of the typical examples'."""
        return as_float_array("log_prob", log_prob).astype(self.entropy.dtype)

    def __repr__(self) -> str:
        if not (is_number(self.entropy) and is_number(self.deviation) and isinstance(self.scores, Array)):
            return constructor(self)
        bits = float(self.entropy) / (self.dim * np.log(2))
        return (
            f"Typicality by {count(self.scores.shape[0], 'example')}: H = {number(self.entropy)} nats "
            f"({number(bits)} bits/dim of the density), deviation {number(self.deviation)} nats, {self.dim} dimensions"
        )


class Anomaly(NamedTuple):
    """The result of `anomaly_score` for each example, four floats [B].

    Attributes:
      log_prob: log p(x) in nats; unbiased with `Roulette`.
      score: |-log p(x) - H| in nats.
      p_value: p-value of the score, in (0, 1]; small for atypical examples.
      quantile: the fraction of held-out examples that are less likely; near 1 an example is too likely.

    Example:
      >>> flow = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
      >>> x = jnp.array([[0.0, 0.5], [1.0, 1.0], [0.5, -1.0]])
      >>> found = rf.anomaly_score(flow, x, rf.Typicality.fit(flow, x))
      >>> isinstance(found, rf.Anomaly), found.score.shape, found.p_value.shape
      (True, (3,), (3,))
    """

    log_prob: Array
    score: Array
    p_value: Array
    quantile: Array

    def __repr__(self) -> str:
        log_prob, score, p_value, _ = fields = [values_of(value) for value in self]
        if any(value is None or not value.size or value.shape != fields[0].shape for value in fields):
            return fields_text(self)
        return (
            f"Anomaly of {count(p_value.size, 'example')}: {np.count_nonzero(p_value <= 0.05)} with p <= 0.05 "
            f"(p {span(p_value)}), log p {span(log_prob)} nats, score {span(score)} nats"
        )


def anomaly_score(
    flow: Flow,
    x: Array,
    typicality: Typicality,
    *,
    condition: Array | None = None,
    key: Array | None = None,
    estimator: Estimator | None = None,
) -> Anomaly:
    """How atypical each example is under a flow, with its p-value.

    Args:
      flow: the flow that `typicality` was fitted to.
      x: floats [B, *event_shape], as `flow.log_prob` takes them; images are dequantised.
      typicality: typicality of training and held-out examples, from `Typicality.fit`.
      condition: as in `flow.log_prob`.
      key: PRNG key of the log-det estimates; not needed by `Exact`.
      estimator: the one given to `Typicality.fit`.

    Returns:
      `Anomaly`, four floats [B]; log_prob and score in nats of an example as a whole.

    Cost: one `log_prob` of x. It works under jit, vmap and grad (of log_prob and score).

    Raises:
      ValueError: as `flow.log_prob`, and if `typicality` is not a `Typicality`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (600, 50))
      >>> flow = rf.Flow(rf.ActNorm((50,)), rf.StandardNormal((50,)))
      >>> typicality = rf.Typicality.fit(flow, x[:300], x[300:])
      >>> found = rf.anomaly_score(flow, jnp.stack([x[0], 3 * x[0]]), typicality)
      >>> (found.p_value < 0.01).tolist()
      [False, True]
    """
    check_type("flow", flow, Flow)
    check_type("typicality", typicality, Typicality)
    log_prob = flow.log_prob(x, condition=condition, key=key, estimator=estimator)
    scores = typicality.score(log_prob), typicality.p_value(log_prob), typicality.quantile(log_prob)
    return Anomaly(log_prob, *scores)


def _checked(name: str, log_prob: Any, least: int) -> Array:
    """Log-densities [N], checked: at least `least` of them, and finite if concrete."""
    log_prob = as_float_array(name, log_prob)
    if log_prob.ndim != 1 or log_prob.shape[0] < least:
        raise ValueError(f"{name}: expected floats [N] of {least} or more examples, got shape {log_prob.shape}")
    if not isinstance(log_prob, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # a program that is being traced may hold them
            others = int(jnp.sum(~jnp.isfinite(log_prob)))
        if others:
            raise ValueError(f"{name}: expected finite log-densities, got {others} that are not")
    return log_prob


@contextmanager
def _named(**names: str) -> Iterator[None]:
    """A context in which errors about an argument of the flow name that of `Typicality.fit`."""
    try:
        yield
    except ValueError as error:
        name, _, text = str(error).partition(": ")
        if name not in names:
            raise
        raise ValueError(f"{names[name]}: {text}") from error


def _log_probs(
    name: str, flow: Flow, x: Any, condition: Any, key: Array | None, estimator: Estimator | None, batch_size: int
) -> Array:
    """log p of the examples x [N, ...], [N]; the last batch is padded, so that one compiled program serves all."""
    sizes = ", ".join(map(str, flow.event_shape))
    x = as_host_array(name, x, f"a float array [N, {sizes}]")
    least = 2 if name == "x_train" else 1
    if x.shape[1:] != tuple(flow.event_shape) or x.ndim < 1 or x.shape[0] < least:
        raise ValueError(f"{name}: expected floats [N, {sizes}] of {least} or more examples, got shape {x.shape}")
    condition = as_condition(condition, flow.condition_shape, x.shape[:1])
    number, size = x.shape[0], min(batch_size, x.shape[0])
    batches = -(-number // size)
    keys = [None] * batches if key is None else jax.random.split(key, batches)
    parts = []
    for n, subkey in enumerate(keys):
        rows = np.arange(n * size, (n + 1) * size) % number
        own = None if condition is None else condition[rows]
        parts.append(flow.log_prob(x[rows], condition=own, key=subkey, estimator=estimator))
    return jnp.concatenate(parts)[:number]
