"""Roulette lengths: samples follow the stated law, and the weights keep every series unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from resflow_jax.functional.roulette import Geometric, Poisson, length_cap, term_weight
from tests.functional.contractions import quick_jit

LAWS = [Geometric(0.3), Geometric(0.5), Geometric(0.8), Poisson(1.0), Poisson(2.0), Poisson(4.0)]
K = np.arange(-2, 31)


def scipy_survival(law, k):
    """P(N >= k) = P(N > k - 1)."""
    if isinstance(law, Geometric):
        return scipy.stats.geom.sf(k - 1, law.p)
    return scipy.stats.poisson.sf(k - 1, law.rate)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_survival_of_samples(law):
    """The fraction of 2e5 samples with N >= k is P(N >= k) to 4 standard errors, for every k."""
    count = 200_000
    samples = np.asarray(quick_jit(lambda key: law.sample(key, (count,)))(jax.random.key(0)))
    assert samples.dtype == np.int32
    p = np.asarray(law.survival(K))
    fraction = np.mean(samples[:, None] >= K, axis=0)
    certain = p == 1
    assert np.all(fraction[certain] == 1)
    common = ~certain & (count * p > 20)
    assert common.sum() >= 5
    z = (fraction - p)[common] / np.sqrt((p * (1 - p))[common] / count)
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_survival_is_that_of_scipy(law):
    """P(N >= k) to 1e-10 relative in float64, far tail included; one below the support."""
    np.testing.assert_allclose(law.survival(K), scipy_survival(law, K), rtol=1e-10)
    assert law.survival(1 if isinstance(law, Geometric) else 0) == 1
    np.testing.assert_allclose(law.survival(5), scipy_survival(law, 5), rtol=1e-10)  # a Python integer


@pytest.mark.parametrize("law", [Poisson(2.0), Poisson(4.0), Geometric(0.5)], ids=str)
def test_far_tail_in_float32(law):
    """P(N >= 20), 1e-13 for Poisson(2), keeps four digits in float32: one minus a cdf would have none."""
    k = np.arange(1, 26)
    with jax.enable_x64(False):
        survival = law.survival(jnp.asarray(k))
        assert survival.dtype == jnp.float32
    np.testing.assert_allclose(survival, scipy_survival(law, k), rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("law", [Geometric(0.5), Poisson(2.0)], ids=str)
def test_term_weight_has_expectation_one(law, samples):
    """E[weight of term k] = 1 for k = 1..8 and m = 0, 2, 5 exact terms, which weigh one without randomness."""
    exact_terms, k = np.array([0, 2, 5])[:, None], np.arange(1, 9)

    @quick_jit
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
    assert np.sum(error > 0) >= np.sum(~exact) - 3  # P(N >= 1) may be one
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_term_weight_summed_over_the_law(law):
    """sum_n P(N = n) * weight(n, k) = 1 for every k, to rounding: no sampling."""
    n, exact_terms, k = np.arange(120), np.array([0, 3])[:, None, None], np.arange(1, 21)[:, None]
    probability = scipy_survival(law, n) - scipy_survival(law, n + 1)
    weight = jnp.vectorize(lambda n, m, k: term_weight(law, n[None], m, k))
    np.testing.assert_allclose(quick_jit(weight)(n, exact_terms, k) @ probability, 1.0, rtol=1e-8)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_length_cap(law):
    """The smallest n with P(N > n) <= probability, under jit as outside."""
    for probability in (1e-3, 2.0**-24):
        n = length_cap(law, probability)
        assert scipy_survival(law, n + 1) <= probability < scipy_survival(law, n)
    assert quick_jit(lambda x: x + length_cap(law))(0) == length_cap(law)


def test_length_cap_beyond_the_limit():
    """A law too long to unroll is refused by name."""
    with pytest.raises(ValueError, match=r"law: .*Geometric\(p=0.001\)"):
        length_cap(Geometric(0.001))
    with pytest.raises(ValueError, match="law: "):
        length_cap(Geometric(0.5), limit=10)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_bad_p(p):
    """0 < p < 1."""
    with pytest.raises(ValueError, match="p: expected"):
        Geometric(p)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_rate(rate):
    """0 < rate < infinity."""
    with pytest.raises(ValueError, match="rate: expected"):
        Poisson(rate)
