"""Laws of lengths: samples follow the stated survival, and the variance is finite where it is said to be."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from resflow_jax.functional.length_laws import Defensive, Fitted, Geometric, Poisson, check_variance
from resflow_jax.functional.length_laws.draws import event_and_uniform
from resflow_jax.functional.roulette import draw_lengths, term_weight
from tests.functional.contractions import z_scores

K = np.arange(-2, 61)
CLOSED_FORMS = [
    *(Geometric(p) for p in (0.3, 0.5, 0.8)),
    *(Poisson(rate) for rate in (1.0, 2.0, 4.0)),
    Defensive(),
    Defensive(0.3, 0.2, 0.9),
    Defensive(0.1, 0.2, 0.5),  # the short law is the longer one: both are that
]
TABLES = [
    Fitted(jnp.array([0.9, 0.5, 0.5, 0.1]), 0.8),  # two equal entries: N = 2 is never drawn
    Fitted(jnp.array([1.0, 1.0, 0.3]), 0.7),
    Fitted(jnp.ones(3), 0.9),
    Fitted(jnp.array([0.4]), 0.6),
    Fitted(jnp.array([1.0]), 0.6),
    Fitted(jnp.array([0.5, 0.02])),
]
LAWS = CLOSED_FORMS + TABLES


def stated_survival(law, k):
    """P(N >= k) = P(N > k - 1) by scipy, or read off the table."""
    if isinstance(law, Geometric):
        return scipy.stats.geom.sf(k - 1, law.p)
    if isinstance(law, Poisson):
        return scipy.stats.poisson.sf(k - 1, law.rate)
    lipschitz = 0.98 if law.lipschitz is None else law.lipschitz
    if isinstance(law, Defensive):
        short, long = (scipy.stats.geom.sf(k - 1, p) for p in (law.p, min(law.p, 1 - lipschitz)))
        return (1 - law.share) * short + law.share * long
    table = np.asarray(law.table)
    one = lambda k: 1.0 if k < 1 else table[k - 1] if k <= len(table) else table[-1] * lipschitz ** (k - len(table))  # noqa: E731
    return np.array([one(k) for k in np.ravel(k)]).reshape(np.shape(k))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_survival_of_samples(law):
    """The fraction of 2e5 samples with N >= k is P(N >= k) to 4 standard errors, for every k."""
    count = 200_000
    samples = np.asarray(jax.jit(lambda key: law.sample(key, (count,)))(jax.random.key(0)))
    assert samples.dtype == np.int32
    assert samples.min() >= 0
    p = stated_survival(law, K)
    fraction = np.mean(samples[:, None] >= K, axis=0)
    certain = p == 1
    assert np.all(fraction[certain] == 1)
    common = ~certain & (count * p > 20)
    assert common.sum() >= 5
    z = (fraction - p)[common] / np.sqrt((p * (1 - p))[common] / count)
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_survival_is_the_stated_one(law):
    """P(N >= k) to 1e-10 relative in float64, far tail included; one below the support; k may be a Python integer."""
    np.testing.assert_allclose(law.survival(K), stated_survival(law, K), rtol=1e-10)
    assert law.survival(1 if isinstance(law, Geometric | Defensive) else 0) == 1
    assert law.survival(-3) == 1
    np.testing.assert_allclose(law.survival(5), stated_survival(law, 5), rtol=1e-10)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_tail_ratio(law):
    """P(N >= k + 1) / P(N >= k) far out; for Poisson it falls to zero like rate / k."""
    k = 100 if isinstance(law, Poisson) else 3000
    ratio = float(law.survival(k + 1) / law.survival(k)) if stated_survival(law, k + 1) > 0 else law.tail_ratio()
    np.testing.assert_allclose(ratio, law.tail_ratio(), rtol=1e-9, atol=law.rate / k if isinstance(law, Poisson) else 0)


@pytest.mark.parametrize("law", [Poisson(2.0), Poisson(4.0), Geometric(0.5), Defensive(0.5, 1e-3, 0.9)], ids=str)
def test_far_tail_in_float32(law):
    """P(N >= 20), 1e-13 for Poisson(2), keeps four digits in float32: one minus a cdf would have none."""
    k = np.arange(1, 26)
    with jax.enable_x64(False):
        survival = law.survival(jnp.asarray(k))
        assert survival.dtype == jnp.float32
    np.testing.assert_allclose(survival, stated_survival(law, k), rtol=1e-4)


def test_fitted_in_float32():
    """A float32 table is sampled and continued in float32, as far as that resolves probabilities."""
    with jax.enable_x64(False):
        law = Fitted(jnp.array([1.0, 0.5, 0.1], jnp.float32), 0.8)
        samples = np.asarray(law.sample(jax.random.key(0), (100_000,)))
        survival = law.survival(jnp.arange(1, 15))
        assert (samples.dtype, survival.dtype) == (np.int32, jnp.float32)
    k = np.arange(2, 15)
    p = stated_survival(law, k)
    np.testing.assert_allclose(survival[1:], p, rtol=1e-5)
    z = (np.mean(samples[:, None] >= k, axis=0) - p) / np.sqrt(p * (1 - p) / len(samples))
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("law", [Defensive(), Defensive(0.3, 0.2, 0.9), Defensive(0.5, 0.05, 0.6)], ids=str)
def test_mean_of_a_defensive_law(law):
    """(1 - share) / p + share / (1 - L), by the sum of survival and by samples, |z| < 4."""
    mean = (1 - law.share) / law.p + law.share / (1 - law.tail_ratio())
    np.testing.assert_allclose(np.sum(law.survival(np.arange(1, 3000))), mean, rtol=1e-9)
    assert abs(z_scores(law.sample(jax.random.key(0), (100_000,)), mean)) < 4


# Lipschitz constants


def test_within():
    """Laws without a Lipschitz constant take that of the block; all other laws do not change."""
    for unknown, known in [(Defensive(0.3, 0.2), Defensive(0.3, 0.2, 0.9)), (Fitted(jnp.ones(2)), None)]:
        within = unknown.within(0.9)
        assert type(within) is type(unknown)
        assert within.lipschitz == within.tail_ratio() == 0.9
        assert within.within(0.5).lipschitz == 0.9
        assert unknown.within(None).lipschitz is None
        assert unknown.tail_ratio() == 0.98
        assert known is None or within == known
    for law in (Geometric(0.5), Poisson(2.0)):
        assert law.within(0.9) == law.within(None) == law


SAFE = [
    Geometric(0.1),
    Defensive().within(0.9),
    Defensive(),
    Defensive(lipschitz=0.82),
    Fitted(jnp.ones(2), 0.9),
]
UNSAFE = [
    Geometric(0.2),
    Geometric(0.5),
    Poisson(2.0),
    Poisson(50.0),
    Defensive(lipschitz=0.8),
    Fitted(jnp.ones(2), 0.5),
]


@pytest.mark.parametrize("law", SAFE, ids=str)
def test_safe_laws(law):
    """No warning where the tail falls more slowly than L^(2k), here 0.81^k."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_variance(law, 0.9)


@pytest.mark.parametrize("law", UNSAFE, ids=str)
def test_unsafe_laws(law):
    """The warning names the law and the bound."""
    with pytest.warns(
        RuntimeWarning, match=rf"^length: {type(law).__name__}\(.* infinite variance .* up to 0\.9\. .* 0\.81"
    ):
        check_variance(law, 0.9)


def second_moments(law, lipschitz, counts):
    """E[estimate^2] of the sum of the first n terms L^k, without sampling, for each n of `counts`.

    With T_k the sum of the terms from k to n, it is sum_k (T_k^2 - T_{k+1}^2) / P(N >= k): twice the term times what
    follows it, over the probability of both, which is that of the later one over the product of the two weights.
    """
    moments = []
    for n in counts:
        terms = lipschitz ** np.arange(1, n + 1.0)
        tails = np.append(np.cumsum(terms[::-1])[::-1], 0)
        moments.append(np.sum(-np.diff(tails**2) / np.asarray(law.survival(np.arange(1, n + 1)))))
    return np.array(moments)


def test_the_second_moment():
    """The formula for it is the sum over all lengths of P(N = n) * estimate^2 with the weights of the package."""
    for law in (Geometric(0.3), Defensive(0.5, 0.1, 0.7)):
        n, k = np.arange(200), np.arange(1, 31)
        weight = jnp.vectorize(lambda n, k, law=law: term_weight(law, n[None], 0, k))(n[:, None], k[None])
        probability = np.append(law.survival(n), 0)
        probability = probability[:-1] - probability[1:]
        moment = probability @ np.asarray(weight @ 0.6**k) ** 2
        np.testing.assert_allclose(second_moments(law, 0.6, [30]), moment, rtol=1e-10)


@pytest.mark.parametrize(
    ("law", "lipschitz"),
    [
        (Geometric(0.18), 0.9),
        (Geometric(0.1), 0.9),
        (Defensive(lipschitz=0.9), 0.9),
        (Defensive(), 0.98),
        (Defensive(lipschitz=0.82), 0.9),
        (Fitted(jnp.array([1.0, 0.3, 0.1]), 0.9), 0.9),
    ],
    ids=str,
)
def test_finite_variance(law, lipschitz):
    """The tail falls more slowly than L^(2k): the second moment converges with the number of terms."""
    few, many = second_moments(law, lipschitz, [2000, 3000])
    np.testing.assert_allclose(few, many, rtol=1e-8)


@pytest.mark.parametrize(
    ("law", "lipschitz"),
    [
        (Geometric(0.2), 0.9),
        (Geometric(0.5), 0.8),
        (Defensive(lipschitz=0.8), 0.9),
        (Fitted(jnp.array([1.0, 0.3, 0.1]), 0.8), 0.9),
        (Poisson(2.0), 0.3),
        (Poisson(4.0), 0.5),
    ],
    ids=str,
)
def test_infinite_variance(law, lipschitz):
    """It falls faster: the second moment grows without bound, geometrically, for Poisson even faster."""
    counts = [30, 60, 90] if isinstance(law, Poisson) else [300, 600, 900]
    moments = second_moments(law, lipschitz, counts)
    growth = moments[1:] / moments[:-1]
    assert np.all(growth > 10)
    assert growth[1] > (1e3 * growth[0] if isinstance(law, Poisson) else 0.9 * growth[0])


# Bad input


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_bad_p(p):
    """0 < p < 1, and so the share and the Lipschitz constant."""
    for make in (Geometric, Defensive):
        with pytest.raises(ValueError, match=r"^p: expected"):
            make(p)
    with pytest.raises(ValueError, match=r"^share: expected"):
        Defensive(share=p)
    for make in (Defensive, lambda lipschitz: Fitted(jnp.ones(2), lipschitz)):
        with pytest.raises(ValueError, match=r"^lipschitz: expected"):
            make(lipschitz=p)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_rate(rate):
    """0 < rate < infinity."""
    with pytest.raises(ValueError, match=r"^rate: expected"):
        Poisson(rate)


@pytest.mark.parametrize(
    "table",
    [0.5, [[[1.0, 0.5]]], [0.5, 0.6], [1.1, 0.5], [0.5, 0.0], [0.5, -0.1], [1.0, np.nan], [[1.0, 0.5], [0.3, 0.4]]],
    ids=str,
)
def test_bad_tables(table):
    """`Fitted.check`: positive, at most one, not increasing, [K] or [blocks, K]."""
    with pytest.raises(ValueError, match=r"^table: expected probabilities P\(N >= 1\.\.K\) in \(0, 1\]"):
        Fitted(jnp.asarray(table)).check()


def test_good_tables():
    """Ones, equal entries and a row a block pass; a traced table is not looked at."""
    for law in [*TABLES, Fitted(jnp.array([[1.0, 0.5], [0.3, 0.3]]))]:
        law.check()
    jax.jit(lambda table: Fitted(table).check())(jnp.array([0.5, 0.6]))


def test_fitted_is_a_pytree():
    """Its leaf is the table; the Lipschitz constant is static."""
    law = Fitted(jnp.array([1.0, 0.5]), 0.7)
    leaves, treedef = jax.tree.flatten(law)
    assert len(leaves) == 1
    assert jax.tree.unflatten(treedef, leaves).lipschitz == 0.7
    assert jax.tree.structure(Fitted(jnp.ones(3), 0.8)) != treedef


def test_survival_has_the_precision_of_the_moment():
    """float64 switched on, off and on again, under jit."""
    for enabled in (True, False, True):
        with jax.enable_x64(enabled):
            survival = jax.jit(lambda k: Poisson(2.0).survival(k))(jnp.arange(3))
            assert survival.dtype == jnp.result_type(float)


@pytest.mark.parametrize("law", [Geometric(1e-4), Defensive(0.5, 0.9, 1 - 1e-6)], ids=str)
def test_ratios_near_one_in_float32(law):
    """A ratio that float32 rounds to one still gives long lengths, with the mean of the law, |z| < 4."""
    with jax.enable_x64(False):
        samples = np.asarray(law.sample(jax.random.key(0), (20_000,)), float)
    mean = 1e4 if isinstance(law, Geometric) else 0.1 * 2 + 0.9 * 1e6
    assert abs(z_scores(samples, mean)) < 4


def test_far_tails_are_drawn():
    """Words close to a threshold give the lengths whose probability is the interval beside it, in both float types."""
    law = Defensive(0.5, 0.25, 0.9)
    first = np.array([0, 2**30 - 1, 2**30, 2**32 - 1], np.uint32)
    bits = np.stack([first, np.array([0, 2**32 - 1, 0, 2**32 - 1], np.uint32)])
    expected = [np.log(2.0**-63) / np.log(0.9), 1, np.log2(2**65 * 0.75), 1]
    for is_wide in (True, False):
        with jax.enable_x64(is_wide):
            np.testing.assert_array_equal(law.from_bits(jnp.asarray(bits)), np.ceil(expected))


@pytest.mark.parametrize("share", [2.0**-40, 0.3, 1 - 2.0**-40])
def test_event_and_uniform(share):
    """The event has its probability, and the float is uniform given it and given its opposite (Kolmogorov-Smirnov)."""
    bits = np.random.default_rng(0).integers(2**32, size=(2, 100_000), dtype=np.uint32)
    if share < 0.1:  # integers around the threshold of 2^24
        bits = np.stack([np.zeros_like(bits[0]), bits[1] >> 7])
    occurs, u = map(np.asarray, event_and_uniform(jnp.asarray(bits), share))
    expected = 0.5 if share < 0.1 else share
    assert abs(occurs.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / occurs.size) + 1e-12
    for part in (u[occurs], u[~occurs] * (2.0**40 - 1 if share < 0.1 else 1)):
        assert len(part) == 0 or scipy.stats.kstest(part, "uniform").pvalue > 1e-4


class Longer(Geometric):
    """A law that overrides `sample` alone."""

    def sample(self, key, shape=()):
        return 100 + super().sample(key, shape)


def test_a_single_length_is_drawn_from_the_words_of_its_key():
    """The fraction of lengths over many keys is the stated one; a subclass with its own `sample` keeps it."""
    keys = jax.random.split(jax.random.key(3), 100_000)
    for law in (Geometric(0.3), Poisson(2.0), Defensive(0.3, 0.2, 0.9), TABLES[0]):
        lengths = np.asarray(jax.jit(jax.vmap(lambda key, law=law: draw_lengths(law, key, 1)[0]))(keys))
        p = stated_survival(law, np.arange(1, 12))
        fraction = np.mean(lengths[:, None] >= np.arange(1, 12), axis=0)
        assert np.all(np.abs(fraction - p) <= 5 * np.sqrt(p * (1 - p) / keys.size))
    assert draw_lengths(Longer(0.3), keys[0], 1) > 100
