"""The divergence of a vector field, tr(df/dx): exact, or estimated with the probes of the log-det estimators.

    exact:  sum_i e_i^T (df/dx) e_i           D Jacobian-vector products
    probes: mean over v of v^T (df/dx) v      one product for each probe v,  E[v v^T] = I  (Hutchinson 1990)

Probes are drawn once for each example, with the laws and seeds of `functional.probes`, and are those that a residual
block would draw with the same key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.estimators import Estimator, Exact, is_series
from resflow_jax.functional.opaque import original
from resflow_jax.functional.probes import draw_seeds, make_probes, seed_keys
from resflow_jax.layers.without_log_det import WithoutLogDet

Array = jax.Array
Field = Callable[[Array], Array]


def probes_for(estimator: Estimator, key: Array | None, x: Array) -> Array | None:
    """The probes [n, B, ...] of an estimator for examples x [B, ...]; None if it takes none.

    Raises:
      ValueError: for an estimator that is not a trace estimate, and for a missing key.
    """
    estimator = original(estimator)
    if isinstance(estimator, Exact | WithoutLogDet):
        return None
    if not is_series(estimator):
        raise ValueError(
            "estimator: expected Exact, or Roulette or Truncated for their probes, where a ContinuousBlock is inside, "
            f"got {estimator!r}"
        )
    if key is None:
        raise ValueError("key: expected a PRNG key for the probes of the trace, got None; Exact() takes none")
    settings = estimator.probe, estimator.probes
    _, keys = seed_keys(*settings, key, x)
    return make_probes(*settings, draw_seeds(*settings, keys, x), x).reshape(estimator.probes, *x.shape)


@dataclass(frozen=True)
class Trace:
    """How a divergence is computed.

    Attributes:
      is_needed: whether at all; a pass without log-dets needs none.
      chunk_size: number of elements at once, without probes.
    """

    is_needed: bool
    chunk_size: int

    @classmethod
    def of(cls, estimator: Estimator) -> "Trace":
        """The settings that the estimator determines."""
        estimator = original(estimator)
        return cls(not isinstance(estimator, WithoutLogDet), getattr(estimator, "chunk_size", 1))

    def with_value(self, field: Field, x: Array, probes: Array | None) -> tuple[Array, Array]:
        """f(x) [B, ...], and the divergence [B]: estimated with probes, else exact; zeros if it is not needed."""
        if not self.is_needed:
            return field(x), jnp.zeros(x.shape[0], x.dtype)
        axes = tuple(range(1, x.ndim))
        value, product = jax.linearize(field, x)
        if probes is not None:
            found = [jnp.sum(probe * product(probe), axis=axes) for probe in probes]
            return value, sum(found) / len(found)
        dim = math.prod(x.shape[1:])

        def diagonal(number):
            row = jnp.broadcast_to(jax.nn.one_hot(number, dim, dtype=x.dtype).reshape(1, *x.shape[1:]), x.shape)
            return jnp.sum(row * product(row), axis=axes)

        return value, jnp.sum(lax.map(diagonal, jnp.arange(dim), batch_size=min(self.chunk_size, dim)), axis=0)
