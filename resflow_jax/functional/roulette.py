"""The random length of a Russian-roulette series, and the weights that keep it unbiased.

For a convergent series sum_{k>=1} D_k, any law of N with P(N >= k) > 0 and m terms
that are always taken ("exact terms"),

    sum_{k>=1} D_k = E_N [ sum_{k=1}^{m+N} D_k / P(N >= k - m) ],   P(N >= j) = 1 for j <= 0

(Chen et al. 2019, arXiv 1906.02735, equation 6; Kahn 1955). Averaging the indicator over
several independent lengths N_1..N_s keeps it unbiased and lowers its variance; the cost is
m + max_i N_i terms.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_open_interval

Array = jax.Array


@dataclass(frozen=True)
class Geometric:
    """P(N >= k) = (1 - p)^(k - 1) for k >= 1, mean 1 / p: at least one term is always drawn.

    The estimator's variance is finite if the terms decay faster than (1 - p)^(k/2).

    Raises:
      ValueError: unless 0 < p < 1.
    """

    p: float = 0.5

    def __post_init__(self):
        check_open_interval("p", self.p, 0, 1)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws lengths, int32 of `shape`, inside or outside jit."""
        return jax.random.geometric(key, self.p, shape, dtype=jnp.int32)

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), a float of k's shape; one for k <= 1."""
        exponent = jnp.maximum(jnp.asarray(k) - 1, 0)
        return jnp.exp(exponent * jnp.log1p(-self.p))


@dataclass(frozen=True)
class Poisson:
    """P(N >= k) of the Poisson law of mean `rate` on {0, 1, ...}: the papers' choice, with rate 2.

    Its tail falls faster than that of any geometric series, so the estimator's variance is
    infinite unless the series ends; see `Geometric`.

    Raises:
      ValueError: unless rate is positive and finite.
    """

    rate: float = 2.0

    def __post_init__(self):
        check_open_interval("rate", self.rate, 0, math.inf)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws lengths, int32 of `shape`, inside or outside jit."""
        return jax.random.poisson(key, self.rate, shape, dtype=jnp.int32)

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), a float of k's shape; one for k <= 0.

        The regularised lower incomplete gamma function at (k, rate): accurate in the far tail,
        where one minus the distribution function would cancel.
        """
        k = jnp.asarray(k)
        a = jnp.maximum(k, 1).astype(jnp.result_type(float))
        return jnp.where(k <= 0, 1.0, jax.scipy.special.gammainc(a, self.rate))


Law = Geometric | Poisson


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
    j = jnp.asarray(k) - exact_terms
    return jnp.mean((lengths >= j) / law.survival(j))


def length_cap(law: Law, probability: float = 2.0**-24, limit: int = 4096) -> int:
    """The smallest n with P(N > n) <= probability, found on the host: a law's parameters are static.

    Raises:
      ValueError: if that n exceeds `limit`.
    """
    with jax.ensure_compile_time_eval():
        n = int(jnp.sum(law.survival(jnp.arange(1, limit + 2)) > probability))
    if n > limit:
        raise ValueError(f"law: expected lengths below {limit} but for a probability of {probability:.1e}, got {law}")
    return n
