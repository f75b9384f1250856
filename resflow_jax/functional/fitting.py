"""Laws of lengths fitted to what a run has seen: the cheapest for the variance."""

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_count, check_open_interval, check_positive
from resflow_jax.functional.laws import Fitted

Array = jax.Array


def fit_lengths(
    term_norms: Array,
    *,
    batch_size: int = 1,
    fixed_cost: float = 4.0,
    share: float = 0.01,
    lipschitz: float | None = None,
) -> Fitted:
    """The law of lengths that minimises variance times cost, for measured norms of the series' terms.

    With n_k = E|term k|^2 relative to the probe's |v|^2 = D, and S_k = P(N >= k), it minimises

        (1 + batch_size * sum_k n_k / S_k) * (fixed_cost + sum_k S_k)

    whose solution is S_k = min(1, c sqrt(n_k)) (Rhee & Glynn 2015, doi 10.1287/opre.2015.1404, section 3;
    Beatson & Adams 2019, arXiv 1905.07006, section 4). The one stands for the variance of the probes,
    which no length can lower; it averages out over a batch, and the error of the length, which a batch
    shares, does not. S_k does not fall below share * L^(k-1), and behind the K measured terms it
    falls like L^k: as for `Defensive`, the variance is finite for every g with Lip(g) <= L.

    Args:
      term_norms: [K] or [blocks, K], `Diagnostics.term_norms` averaged over many keys. Not increasing in
        expectation; what noise increases is lowered to the term before.
      batch_size: examples that share a length.
      fixed_cost: cost of the rest of a training step, forward and backward pass, in vjps of g.
      share: what is kept for the unexpected.
      lipschitz: L; by default the bound of the block where the law is used.

    Returns:
      A `Fitted` law with a table of the shape of `term_norms`. Works under jit.

    Raises:
      ValueError: for a wrong rank, share or cost.
    """
    if term_norms.ndim not in (1, 2) or not jnp.issubdtype(term_norms.dtype, jnp.floating):
        raise ValueError(f"term_norms: expected floats [K] or [blocks, K], got {term_norms.dtype} {term_norms.shape}")
    check_count("batch_size", batch_size, 1)
    check_positive("fixed_cost", fixed_cost)
    check_open_interval("share", share, 0, 1)
    norms = batch_size * jax.lax.cummin(jnp.maximum(term_norms, 0), axis=term_norms.ndim - 1)
    floor = share * Fitted(norms, lipschitz).tail_ratio() ** jnp.arange(norms.shape[-1], dtype=norms.dtype)

    def improve(_, table):
        variance = 1 + jnp.sum(norms / table, axis=-1, keepdims=True)
        cost = fixed_cost + jnp.sum(table, axis=-1, keepdims=True)
        return jnp.clip(jnp.sqrt(norms * cost / variance), floor, 1.0)

    return Fitted(jax.lax.fori_loop(0, 200, improve, jnp.ones_like(norms)), lipschitz)
