"""Russian roulette: the weights that make a randomly cut series unbiased.

For a convergent series sum_{k>=1} D_k, any law of N with P(N >= k) > 0 and m terms
that are always taken ("exact terms"),

    sum_{k>=1} D_k = E_N [ sum_{k=1}^{m+N} D_k / P(N >= k - m) ],   P(N >= j) = 1 for j <= 0

(Chen et al. 2019, arXiv 1906.02735, equation 6; Kahn 1955). Averaging the indicator over
several independent lengths N_1..N_s keeps it unbiased and lowers its variance; the cost is
m + max_i N_i terms.
"""

import jax
import jax.numpy as jnp

from resflow_jax.functional.laws import Fitted, Law

Array = jax.Array


def term_weight(law: Law, lengths: Array, exact_terms: int, k: Array | int) -> Array:
    """Weight of term k >= 1: one up to `exact_terms`, then mean_i 1[N_i >= k - m] / P(N >= k - m).

    Args:
      law: the law of the lengths.
      lengths: the drawn lengths N_1..N_s, shape [s].
      exact_terms: m, the number of terms that are always taken.
      k: which term, a scalar.

    Returns:
      A scalar whose expectation is one; zero beyond m + max_i N_i.
    """
    j = jnp.asarray(k - exact_terms, lengths.dtype)
    survival = law.survival(j)
    return jnp.mean((lengths >= j).astype(survival.dtype) / survival)


def length_cap(law: Law, probability: float = 2.0**-24, limit: int = 4096) -> int:
    """The smallest n with P(N > n) <= probability, found on the host.

    Of a `Fitted` law, whose table may be traced, a bound: that of a table of ones.

    Raises:
      ValueError: if that n exceeds `limit`.
    """
    with jax.ensure_compile_time_eval():
        if isinstance(law, Fitted):
            law = Fitted(jnp.ones(law.table.shape[-1]), law.lipschitz)
        n = int(jnp.sum(law.survival(jnp.arange(1, limit + 2)) > probability))
    if n > limit:
        raise ValueError(
            f"law: expected lengths below {limit} but for a probability of {probability:.1e}, got {law}; "
            "a Geometric law, or gradient='neumann', has no such limit"
        )
    return n
