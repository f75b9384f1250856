"""Fits a length distribution to the measured norms of a series' terms, so that variance times cost is least."""

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_float_array, check_count, check_finite, check_open_interval, check_positive
from resflow_jax.functional.length_laws.fitted import Fitted
from resflow_jax.functional.primitives.precision import wide_dtype

Array = jax.Array


def fit_lengths(
    term_norms: Array,
    *,
    batch_size: int = 1,
    fixed_cost: float = 4.0,
    share: float = 0.01,
    lipschitz: float | None = None,
) -> Fitted:
    """Finds the length distribution with the least variance times cost, for measured norms of the series' terms.

    With n_k = E|term k|^2 / D (D = E|v|^2 of the probe) and S_k = P(N >= k), it minimises

        (1 + batch_size * sum_k n_k / S_k) * (fixed_cost + sum_k S_k),   1 >= S_1 >= S_2 >= ...

    The solution is S_k = min(1, c sqrt(m_k)), where m is the non-increasing isotonic regression of n (Rhee & Glynn
    2015, doi 10.1287/opre.2015.1404, section 3; Beatson & Adams 2019, arXiv 1905.07006, section 4). The variance
    in it is a model, which treats the terms of w as uncorrelated. The summand 1 is the variance of the probes: no
    length distribution can lower it, and it averages out over a batch. The error of the length does not average out,
    since all examples of a batch share a length.

    S_k is at least share * L^(k-1), and beyond the K measured terms it falls like L^k. So the variance is finite for
    every g with Lip(g) <= L, as for `Defensive`. The function is deterministic, evaluates no g, and works under jit.

    Args:
      term_norms: floats [K] or [blocks, K]: `Diagnostics.term_norms`, averaged over many keys. With m exact terms,
        pass `term_norms[..., m:]`.
      batch_size: number of examples that share a length.
      fixed_cost: cost of the rest of a training step, in vjps of g. A forward and a backward pass cost about 4.
      share: weight of the geometric lower bound on S_k, in (0, 1).
      lipschitz: L. None takes the bound of the residual block where the distribution is used.

    Returns:
      A `Fitted` distribution with a table of the shape of `term_norms`, in float32 for 16-bit floats.

    Raises:
      ValueError: for norms that are not finite floats [K] or [blocks, K], a batch size below 1, a cost that is not
        positive, or a share outside (0, 1).

    Example:
      >>> law = rf.fit_lengths(jnp.array([1e-2, 1e-4, 1e-6]), batch_size=16)
      >>> [round(float(p), 2) for p in law.table]
      [0.8, 0.08, 0.01]
    """
    term_norms = as_float_array("term_norms", term_norms)
    if term_norms.ndim not in (1, 2) or not term_norms.size:
        raise ValueError(f"term_norms: expected a float array [K] or [blocks, K], got shape {term_norms.shape}")
    if not isinstance(term_norms, jax.core.Tracer) and not np.isfinite(np.asarray(term_norms)).all():
        raise ValueError(f"term_norms: expected finite numbers, got {term_norms}")
    check_count("batch_size", batch_size, 1)
    check_positive("fixed_cost", fixed_cost)
    check_finite("fixed_cost", fixed_cost)
    fixed_cost = float(fixed_cost)
    check_open_interval("share", share, 0, 1)
    term_norms = term_norms.astype(wide_dtype(term_norms.dtype))  # sums and the fixed point would be rounded
    norms = batch_size * _non_increasing(jnp.maximum(term_norms, 0))
    floor = share * Fitted(norms, lipschitz).tail_ratio() ** jnp.arange(norms.shape[-1], dtype=norms.dtype)

    def improve(_, table):
        variance = 1 + jnp.sum(norms / table, axis=-1, keepdims=True)
        cost = fixed_cost + jnp.sum(table, axis=-1, keepdims=True)
        return jnp.clip(jnp.sqrt(norms * cost / variance), trailing(floor, norms), 1.0)

    return Fitted(jax.lax.fori_loop(0, 200, improve, jnp.ones_like(norms)), lipschitz)


def _non_increasing(n: Array) -> Array:
    """The non-increasing sequence nearest to n [..., K] in least squares: min_{i<=k} max_{j>=k} mean(n_i..n_j)."""
    size = n.shape[-1]
    sums = jnp.concatenate([jnp.zeros_like(n[..., :1]), jnp.cumsum(n, axis=-1)], axis=-1)
    i, j = jnp.arange(size)[:, None], jnp.arange(size)[None]
    means = sums[..., None, 1:] - sums[..., :-1, None]
    means = means / trailing(jnp.maximum(j - i + 1, 1).astype(n.dtype), means)
    is_range = trailing(j >= i, means)
    from_k = jax.lax.cummax(jnp.where(is_range, means, -jnp.inf), axis=n.ndim, reverse=True)
    return jnp.maximum(jnp.min(jnp.where(is_range, from_k, jnp.inf), axis=-2), 0)
