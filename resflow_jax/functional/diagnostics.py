"""What an estimate of a log-det tells about itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

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

    @classmethod
    def of(cls, log_det: Array, length: Array | int, term_norms: Array | None = None) -> "Diagnostics":
        """Those of log_det [B]; without `term_norms` for an estimate that is no series. They have no derivative."""
        if term_norms is None:
            term_norms = jnp.zeros(DIAGNOSED_TERMS, log_det.dtype)
        values = jnp.asarray(length, log_det.dtype), term_norms, jnp.mean(log_det), jnp.mean(jnp.square(log_det))
        return cls(*map(lax.stop_gradient, values))
