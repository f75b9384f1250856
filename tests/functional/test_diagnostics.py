"""The diagnostics of an estimate: length, norms of the terms, moments of the log-det."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.diagnostics import DIAGNOSED_TERMS
from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.length_laws import Defensive, Geometric
from resflow_jax.functional.logdet import residual
from tests.functional.contractions import (
    z_scores,
)
from tests.functional.estimates import (
    PAPERS,
    SAFE,
    dense_jacobians,
    net_named,
)

DIAGNOSED = [
    Exact(),
    Truncated(5, probes=2),
    Truncated(5, gradient="autodiff"),
    PAPERS,
    Roulette(SAFE, 1, samples=2, probes=2),
    Roulette(SAFE, 0, minres_steps=2, gradient="autodiff"),
]


@pytest.mark.parametrize("estimator", DIAGNOSED, ids=str)
def test_diagnostics_of_one_estimate(estimator):
    """mean and second moment are those of the returned log_det, which they do not change; there is no gradient."""
    g, params, x = net_named("moderate")

    @jax.jit
    def run(params, x, key):
        def both(params, x):
            y, log_det, diagnostics = residual(g, params, x, key=key, estimator=estimator, return_diagnostics=True)
            return sum(map(jnp.sum, diagnostics)), (y, log_det, diagnostics)

        gradient, results = jax.grad(both, (0, 1), has_aux=True)(params, x)
        return gradient, results, residual(g, params, x, key=key, estimator=estimator)

    gradient, (y, log_det, diagnostics), plain = run(params, x, jax.random.key(2))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(y, plain[0], rtol=1e-14)
    np.testing.assert_allclose(log_det, plain[1], rtol=1e-13)
    np.testing.assert_allclose(diagnostics.mean, np.mean(log_det), rtol=1e-13)
    np.testing.assert_allclose(diagnostics.second_moment, np.mean(np.square(log_det)), rtol=1e-13)
    assert diagnostics.term_norms.shape == (DIAGNOSED_TERMS,)
    assert diagnostics.length.shape == ()
    if not isinstance(estimator, Roulette):
        assert diagnostics.length == (4 if isinstance(estimator, Exact) else 5)
    if isinstance(estimator, Exact):
        assert np.all(diagnostics.term_norms == 0)


def diagnose(name, estimator, keys=2000, seed=0):
    """The diagnostics of many keys."""
    run = lambda key: residual(*net_named(name), key=key, estimator=estimator, return_diagnostics=True)[2]  # noqa: E731
    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(seed), keys))


def power_norms(name, terms=8):
    """|J^k|_F^2 / D averaged over the batch, k = 1..terms: E|J^k v|^2 / D."""
    powers = [np.linalg.matrix_power(dense_jacobians(name), k) for k in range(1, terms + 1)]
    return np.array([np.mean(np.sum(np.square(power), (1, 2))) / power.shape[-1] for power in powers])


def test_term_norms_of_a_truncated_series():
    """With D orthogonal probes they are |J^k|_F^2 / D, and zero after the last term."""
    diagnosed = DIAGNOSED_TERMS
    for terms in (5, diagnosed + 2):
        norms = diagnose("nonsymmetric", Truncated(terms, "orthogonal", probes=8), keys=2).term_norms
        expected = np.where(np.arange(diagnosed) < terms, power_norms("nonsymmetric", diagnosed), 0)
        np.testing.assert_allclose(norms, np.tile(expected, (2, 1)), rtol=1e-10)


def test_term_norms_of_the_roulette():
    """Whatever the law, the mean over keys is |J^k|_F^2 / D for the power series: |z| < 4 for k = 1..8."""
    estimator = Roulette(SAFE, 2, minres_steps=0, samples=2, probe="gaussian", probes=2)
    z = z_scores(diagnose("nonsymmetric", estimator).term_norms[:, :8], power_norms("nonsymmetric"))
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("minres_steps", [None, 2])
def test_term_norms_do_not_depend_on_the_law(minres_steps):
    """The means of two laws agree also for minimal residuals, |z| < 4; no term is larger than of the power series."""
    laws = [
        Roulette(SAFE, 0, minres_steps=minres_steps),
        Roulette(Geometric(0.3), 1, minres_steps=minres_steps, samples=2),
    ]
    first, second = (diagnose("nonsymmetric", law, seed=n).term_norms[:, :8] for n, law in enumerate(laws))
    error = np.sqrt((first.var(axis=0) + second.var(axis=0)) / len(first))
    assert np.abs(first.mean(axis=0) - second.mean(axis=0)).max() > 0
    assert np.abs((first.mean(axis=0) - second.mean(axis=0)) / (error + 1e-12)).max() < 4
    assert np.all(second.mean(axis=0) < 1.05 * power_norms("nonsymmetric"))


def test_the_diagnosed_length():
    """exact_terms + trace_probes + the longest length: its mean over keys is 2 + 3 + E max_i N_i, |z| < 4."""
    law, samples = Defensive(0.4, 0.1, 0.75), 3
    estimator = Roulette(law, 2, minres_steps=0, samples=samples, trace_probes=3)
    length = diagnose("small", estimator).length
    short = replace(estimator, length=Geometric(0.5), gradient="autodiff")
    assert diagnose("small", short, keys=50).length.min() >= 6
    survival = np.asarray(law.survival(np.arange(1, 200)))
    assert length.min() >= 6
    assert np.abs(z_scores(length, 5 + np.sum(1 - (1 - survival) ** samples))) < 4
