"""Russian roulette: the weights that make a randomly truncated series unbiased.

For an absolutely convergent series sum_{k>=1} D_k, a distribution of N with P(N >= k) > 0 for all k, and m terms that
are always taken ("exact terms"),

    sum_{k>=1} D_k = E_N [ sum_{k=1}^{m+N} D_k / P(N >= k - m) ],   P(N >= j) = 1 for j <= 0

(Chen et al. 2019, arXiv 1906.02735, equation 6; Kahn 1955). The mean over several independent lengths N_1..N_s is
unbiased too and has a lower variance; it costs m + max_i N_i terms.
"""

import jax
import jax.numpy as jnp

from resflow_jax.functional.length_laws import LengthLaw

Array = jax.Array


def draw_lengths(law: LengthLaw, key: Array, num_lengths: int) -> Array:
    """Draws independent lengths, int32 [num_lengths]; ValueError if `law` does not return integers of this shape.

    The key must be random itself, as `jax.random.fold_in` returns it, and not be used elsewhere.
    """
    words = jax.random.key_data(key)
    has_both = {"sample", "from_bits"} <= vars(type(law)).keys()  # inherited, `from_bits` may belong to another law
    if num_lengths == 1 and words.shape == (2,) and has_both:
        lengths = jnp.asarray(law.from_bits(words[:, None]))  # compiles faster than a draw
    else:
        lengths = jnp.asarray(law.sample(key, (num_lengths,)))
    if lengths.shape != (num_lengths,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"length: expected sample(key, {(num_lengths,)}) to return integers {(num_lengths,)}, got {lengths.dtype} "
            f"{lengths.shape} of {law}"
        )
    return lengths.astype(jnp.int32)


def term_weight(law: LengthLaw, lengths: Array, exact_terms: int, k: Array | int) -> Array:
    """Weight of term k >= 1: 1 for k <= m, then mean_i 1[N_i >= k - m] / P(N >= k - m).

    Args:
      law: the distribution of the lengths.
      lengths: the drawn lengths N_1..N_s, shape [s].
      exact_terms: m, the number of terms that are always taken.
      k: number of the term, a scalar.

    Returns:
      A scalar with expectation 1; it is 0 for k > m + max_i N_i.
    """
    j = jnp.asarray(k - exact_terms, lengths.dtype)
    survival = _floats(law, jnp.maximum(j, 1))
    drawn = jnp.mean((lengths >= j).astype(survival.dtype) / survival)
    return jnp.where(j <= 0, 1, drawn)


def length_cap(law: LengthLaw, probability: float = 2.0**-24, limit: int = 4096) -> int:
    """The smallest n with P(N > n) <= probability, computed on the host; for the law's `upper_bound()` if it has one.

    Raises:
      ValueError: if this n exceeds `limit`, or if P(N >= k) is traced.
    """
    bound = law.upper_bound() if callable(getattr(law, "upper_bound", None)) else law
    with jax.ensure_compile_time_eval():
        survival = _floats(bound, jnp.arange(1, limit + 2))
        if isinstance(survival, jax.core.Tracer):
            raise ValueError(
                "length: gradient='autodiff' expected a distribution whose survival is known when a program is traced, "
                f"got {type(law).__name__} of traced arrays; give it a method upper_bound(), or use gradient='neumann'"
            )
        n = int(jnp.sum(survival > probability))
    if n > limit:
        raise ValueError(
            f"length: gradient='autodiff' expected a distribution with P(N > {limit}) of at most {probability:.1e}, "
            f"got {law}; use a distribution with a shorter tail, such as Geometric(0.5), or gradient='neumann'"
        )
    return n


def _floats(law: LengthLaw, k: Array) -> Array:
    """P(N >= k), floats of k's shape; ValueError if the law returns anything else."""
    survival = jnp.asarray(law.survival(k))
    if survival.shape != k.shape or not jnp.issubdtype(survival.dtype, jnp.floating):
        raise ValueError(
            f"length: expected survival(k) to return floats {k.shape} for integers {k.shape}, got {survival.dtype} "
            f"{survival.shape} of {law}"
        )
    return survival
