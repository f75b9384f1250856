"""The roulette's weights keep every series unbiased, whatever the law of the lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.length_laws import Defensive, Fitted, Geometric, Poisson
from resflow_jax.functional.roulette import length_cap, term_weight

FITTED = Fitted(jnp.array([1.0, 0.7, 0.7, 0.2]), 0.6)
LAWS = [Geometric(0.3), Geometric(0.8), Poisson(1.0), Poisson(4.0), Defensive(0.5, 0.1, 0.8), FITTED]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("law", [Geometric(0.5), Poisson(2.0), Defensive(0.5, 0.2, 0.8), FITTED], ids=str)
def test_term_weight_has_expectation_one(law, samples):
    """E[weight of term k] = 1 for k = 1..8 and m = 0, 2, 5 exact terms, which weigh one without randomness."""
    exact_terms, k = np.array([0, 2, 5])[:, None], np.arange(1, 9)[None]

    @jax.jit
    @jax.vmap
    def draw(key):
        lengths = law.sample(key, (samples,))
        weight = jnp.vectorize(lambda m, k: term_weight(law, lengths, m, k))
        return weight(exact_terms, k), jnp.max(lengths)

    weights, longest = map(np.asarray, draw(jax.random.split(jax.random.key(1), 100_000)))
    exact = k <= exact_terms
    assert np.all(weights[:, exact] == 1)
    assert np.all((weights == 0) == (k > exact_terms + longest[:, None, None]))
    error = weights.std(axis=0) / np.sqrt(len(weights))
    z = (weights.mean(axis=0) - 1) / (error + 1e-12)
    assert np.sum(error > 0) >= np.sum(~exact) - 3  # P(N >= 1) may be one, never more
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_term_weight_summed_over_the_law(law):
    """sum_n P(N = n) * weight(n, k) = 1 for every k, to rounding: no sampling."""
    n, exact_terms, k = np.arange(150)[None, None], np.array([0, 3])[:, None, None], np.arange(1, 21)[None, :, None]
    probability = np.asarray(law.survival(n[0, 0]) - law.survival(n[0, 0] + 1))
    weight = jnp.vectorize(lambda n, m, k: term_weight(law, n[None], m, k))
    np.testing.assert_allclose(jax.jit(weight)(n, exact_terms, k) @ probability, 1.0, rtol=1e-8)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_length_cap(law):
    """The smallest n with P(N > n) <= probability, under jit as outside."""
    for probability in (1e-3, 2.0**-24):
        n = length_cap(law, probability)
        bound = Fitted(jnp.ones(4), law.lipschitz) if isinstance(law, Fitted) else law
        assert bound.survival(n + 1) <= probability < bound.survival(n)
        assert law.survival(n + 1) <= probability
    assert jax.jit(lambda x: x + length_cap(law))(0) == length_cap(law)


def test_length_cap_beyond_the_limit():
    """A law too long to unroll is refused by name."""
    with pytest.raises(ValueError, match=r"length: .*Geometric\(p=0.001\)"):
        length_cap(Geometric(0.001))
    with pytest.raises(ValueError, match=r"length: .*P\(N > 10\)"):
        length_cap(Geometric(0.5), limit=10)


def test_length_cap_of_a_traced_table():
    """For a `Fitted` law it depends only on the size of the table, which may be traced."""
    cap = length_cap(FITTED)
    assert cap == length_cap(Fitted(jnp.array([0.3, 0.2, 0.1, 0.1]), 0.6))
    assert jax.jit(lambda law: jnp.asarray(length_cap(law)))(FITTED) == cap
