"""Statistics of a log-det estimate that cost no further evaluation of g."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.texts import fields_text, number, span, values_of

Array = jax.Array

DIAGNOSED_TERMS = 16


class Diagnostics(NamedTuple):
    """Statistics of one estimate of the log-det, computed without further evaluations of g.

    Each is random with the estimate; averaged over keys (training steps) it is an unbiased estimate of the quantity
    below. A flow returns them with a leading axis of residual blocks. They have no derivative.

    Attributes:
      length: [], number of vjps of g for each probe, with `subsample` the mean over the batch, those of `trace_probes`
        included; for `Exact`, the dimension D.
      term_norms: [16], mean over batch and probes of |term k of w|^2 / D for k = 1..16, times the roulette weight of
        the term. Because of the weight, the expectation does not depend on the length distribution. Zeros for `Exact`.
        For a monotone map, whose w has only even powers, they are those of the residual after k products.
        `fit_lengths` takes their average.
      mean: [], mean of log_det over the batch, in nats.
      second_moment: [], mean of log_det^2 over the batch, in nats^2.

    Example:
      >>> g = lambda w, x: 0.5 * jnp.tanh(x @ w)
      >>> w, x = jnp.eye(3), jnp.ones((2, 3))
      >>> _, log_det, found = rf.residual(g, w, x, estimator=rf.Exact(), return_diagnostics=True)
      >>> found.length.item(), found.term_norms.shape, bool(found.mean == log_det.mean())
      (3.0, (16,), True)
    """

    length: Array
    term_norms: Array
    mean: Array
    second_moment: Array

    @classmethod
    def of(cls, log_det: Array, length: Array | int, term_norms: Array | None = None) -> "Diagnostics":
        """The diagnostics of log_det [B], without derivative. Omit `term_norms` if the estimate is not a series."""
        if term_norms is None:
            term_norms = jnp.zeros(DIAGNOSED_TERMS, log_det.dtype)
        values = jnp.asarray(length, log_det.dtype), term_norms, jnp.mean(log_det), jnp.mean(jnp.square(log_det))
        return cls(*map(lax.stop_gradient, values))

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
