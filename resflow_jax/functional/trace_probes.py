"""Further probes for the trace of J alone, which is the first term of the log-det.

Much of the noise of one example's estimate is that of its probe v, and often most of that is the noise of v^T J v. With
further probes u the value is

    sum_k weight_k term_k(v) + mean_u(u^T J u) - v^T J v

whatever the series is. Its expectation stays the same, since E[u^T J u] = E[v^T J v] = tr(J). Each u costs one vjp of
g, whereas a further probe of the series costs all terms. The Neumann gradient does not change: it is estimated on its
own (`functional.neumann`). With gradient="autodiff" the gradient is that of this value.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.estimators import Roulette, Truncated
from resflow_jax.functional.probes import draw_seeds, make_probes, seed_keys
from resflow_jax.functional.series import Product, dot

Array = jax.Array


def number_of_trace_probes(estimator: Truncated | Roulette) -> int:
    """How many of these probes there are for each probe of the series."""
    return getattr(estimator, "trace_probes", 0)


def trace_keys(estimator: Truncated | Roulette, shared_key: Array, x: Array) -> Array | None:
    """What `draw_trace_probes` takes for each example of x [B, ...]; None without such probes.

    Args:
      estimator: a series.
      shared_key: a key that all examples share, whose fold 4 is used here alone.
      x: floats [B, ...], the batch or a device's part of it.

    Raises:
      ValueError: for more orthogonal probes than dimensions.
    """
    count, dim = number_of_trace_probes(estimator) * estimator.probes, math.prod(x.shape[1:])
    if estimator.probe == "orthogonal" and count > dim:
        given = f"{number_of_trace_probes(estimator)} for each of {estimator.probes}"
        raise ValueError(f"trace_probes: expected at most {dim} orthogonal probes in {dim} dimensions, got {given}")
    return seed_keys(estimator.probe, count, jax.random.fold_in(shared_key, 4), x)[1] if count else None


def draw_trace_probes(estimator: Truncated | Roulette, keys: Array | None, x: Array) -> Array | None:
    """The probes u [trace_probes, probes * B, ...] from keys of `trace_keys`; None without such probes."""
    if keys is None:
        return None
    number = number_of_trace_probes(estimator)
    settings = estimator.probe, number * estimator.probes
    u = make_probes(*settings, draw_seeds(*settings, keys, x), x)
    return u.reshape(number, estimator.probes * x.shape[0], *x.shape[1:])


def mean_trace(u: Array, product: Product) -> Array:
    """The mean of u^T M u over the probes u [trace_probes, probes * B, ...], one after the other: [probes * B]."""
    return jnp.mean(lax.map(lambda u: dot(u, product(u)), u), axis=0)
