"""The simulators' posteriors against their own simulations, grids and importance weights; the two-sample test."""

import numpy as np
import pytest

from experiments.studies.conditioning.c2st import c2st
from experiments.studies.conditioning.simulators import GaussianLinear, TwoMoons

SIMULATORS = {"two moons": TwoMoons(), "Gaussian linear": GaussianLinear(3, 0.2, 0.1)}
EDGE = np.array([-0.75, 0.35])  # of this x the crescents are cut by the square
MIDDLE = np.array([0.3, 0.1])  # of this x by the line u = 0


@pytest.mark.parametrize("name", SIMULATORS)
def test_posterior_samples_complete_the_joint_distribution(name):
    """(theta, x) and (a posterior sample at x, x) have the same distribution: means of products, within 5 errors."""
    simulator, rng = SIMULATORS[name], np.random.default_rng(0)
    theta = simulator.prior(rng, 3000)
    x = simulator.simulate(rng, theta)
    again = np.concatenate([simulator.posterior(rng, 1, one) for one in x])
    for f in (lambda t: t, lambda t: t**2, lambda t: np.sin(9 * t * np.roll(t, 1, axis=1))):
        for g in (np.ones_like(x), x, x**2):
            difference = f(theta) * g - f(again) * g
            assert np.all(np.abs(difference.mean(0)) < 5 * difference.std(0) / np.sqrt(len(x)))
    assert np.abs(theta - again).mean() > 0.05  # they are samples, not the theta of x


def test_gaussian_posterior_by_bayes_rule():
    """log p(theta | x) differs from log p(theta) + log p(x | theta) by the same for all theta; moments of samples."""
    simulator, rng = SIMULATORS["Gaussian linear"], np.random.default_rng(1)
    theta, x = rng.normal(size=(50, 3)), rng.normal(size=3)
    joint = -0.5 * np.sum(theta**2, axis=1) / 0.2 - 0.5 * np.sum((x - theta) ** 2, axis=1) / 0.1
    posterior = simulator.posterior_log_prob(theta, np.tile(x, (50, 1)))
    np.testing.assert_allclose(posterior - joint, posterior[0] - joint[0], rtol=1e-12)
    samples = simulator.posterior(rng, 100_000, x)
    np.testing.assert_allclose(samples.mean(0), simulator.posterior_mean(x), atol=0.005)
    np.testing.assert_allclose(samples.var(0), simulator.posterior_variance, rtol=0.03)
    entropy = -simulator.posterior_log_prob(samples, np.tile(x, (len(samples), 1))).mean()
    assert abs(entropy - 1.5 * np.log(2 * np.pi * np.e * 0.2 / 3)) < 0.02


@pytest.mark.parametrize("x", [np.zeros(2), EDGE, MIDDLE])
def test_density_of_two_moons(x):
    """It integrates to one on a grid, and the grid's cells hold as many samples as it says."""
    simulator, rng = TwoMoons(), np.random.default_rng(2)
    cells = 1000
    middles = -1 + (np.arange(cells) + 0.5) * 2 / cells
    theta = np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.exp(simulator.posterior_log_prob(theta, x[None]))
    mass = density.reshape(20, cells // 20, 20, cells // 20).sum(axis=(1, 3)) * (2 / cells) ** 2
    np.testing.assert_allclose(mass.sum(), 1, atol=0.03)
    samples = simulator.posterior(rng, 20000, x)
    counts = np.histogram2d(*samples.T, bins=20, range=[[-1, 1]] * 2)[0] / len(samples)
    np.testing.assert_allclose(counts, mass, atol=0.015)
    assert (mass > 0.02).sum() >= 3


def test_two_moons_by_simulation():
    """Without the formula: the parameters of prior draws whose x falls near an observation are posterior samples."""
    simulator, rng = TwoMoons(), np.random.default_rng(3)
    theta = simulator.prior(rng, 2_000_000)
    near = np.abs(simulator.simulate(rng, theta) - EDGE).max(axis=1) < 0.02
    accepted, samples = theta[near], simulator.posterior(rng, 20000, EDGE)
    assert near.sum() > 200
    for part in (np.abs, np.square, lambda t: np.abs(t[:, :1] + t[:, 1:])):
        error = 5 * part(accepted).std(0) / np.sqrt(near.sum()) + 0.01
        assert np.all(np.abs(part(accepted).mean(0) - part(samples).mean(0)) < error)
    assert abs((accepted.sum(1) > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(near.sum())


def test_what_no_parameter_explains():
    with pytest.raises(
        ValueError, match=r"x: expected a value that some theta in the square explains, got \[9\. 9\.\]"
    ):
        TwoMoons().posterior(np.random.default_rng(0), 2, np.array([9.0, 9.0]))
    assert TwoMoons().posterior_log_prob(np.array([[1.1, 0.0]]), np.zeros((1, 2))) == -np.inf


def test_c2st_of_equal_and_different_samples():
    """About 1/2 for samples of one distribution, 1 for disjoint ones, in between for N(0, I) and N(1, I)."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500, 2))
    assert abs(c2st(a, b, epochs=20) - 0.5) < 0.06
    assert c2st(a, b + 10, epochs=20) > 0.99
    best = 0.7602  # Phi(|(1, 1)| / 2), that of Bayes' rule
    assert abs(c2st(a, b + 1, epochs=20) - best) < 0.05
    with pytest.raises(ValueError, match=r"samples: expected two arrays \[N, D\] of one shape, .*got .* and \(3, 2\)"):
        c2st(a, b[:3])
    with pytest.raises(ValueError, match="samples: expected finite values"):
        c2st(a, b * np.nan)
