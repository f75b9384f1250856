"""Laws of lengths fitted to what a run has seen: the cheapest for the variance."""

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_float_array, check_count, check_open_interval, check_positive
from resflow_jax.functional.length_laws.fitted import Fitted

Array = jax.Array


def fit_lengths(
    term_norms: Array,
    *,
    batch_size: int = 1,
    fixed_cost: float = 4.0,
    share: float = 0.01,
    lipschitz: float | None = None,
) -> Fitted:
    """The law of lengths of least variance times cost, for measured norms of the series' terms.

    With n_k = E|term k|^2 relative to the probe's |v|^2 = D, and S_k = P(N >= k), it minimises

        (1 + batch_size * sum_k n_k / S_k) * (fixed_cost + sum_k S_k),   1 >= S_1 >= S_2 >= ...

    whose solution is S_k = min(1, c sqrt(m_k)), m the non-increasing isotonic regression of n (Rhee &
    Glynn 2015, doi 10.1287/opre.2015.1404, section 3; Beatson & Adams 2019, arXiv 1905.07006, section 4).
    The variance is a model: of w, as if the terms were uncorrelated. The one stands for the probes, which
    no length can improve and which average out over a batch; the error of a length that the batch
    shares is taken not to. S_k does not fall below share * L^(k-1), and behind the K measured terms it
    falls like L^k: as for `Defensive`, the variance is finite for every g with Lip(g) <= L.

    Args:
      term_norms: [K] or [blocks, K], `Diagnostics.term_norms` averaged over many keys; behind m exact
        terms, `term_norms[..., m:]`.
      batch_size: examples that share a length.
      fixed_cost: cost of the rest of a training step in vjps of g; a forward and a backward pass take about
        four.
      share: what is kept for the unexpected.
      lipschitz: L; by default the bound of the block where the law is used.

    Returns:
      A `Fitted` law with a table of the shape of `term_norms`. Works under jit.

    Raises:
      ValueError: for a wrong rank, share or cost.
    """
    term_norms = as_float_array("term_norms", term_norms)
    if term_norms.ndim not in (1, 2) or not term_norms.size:
        raise ValueError(f"term_norms: expected a float array [K] or [blocks, K], got shape {term_norms.shape}")
    if not isinstance(term_norms, jax.core.Tracer) and not np.isfinite(np.asarray(term_norms)).all():
        raise ValueError(f"term_norms: expected finite numbers, got {term_norms}")
    check_count("batch_size", batch_size, 1)
    check_positive("fixed_cost", fixed_cost)
    check_open_interval("share", share, 0, 1)
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
