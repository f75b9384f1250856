"""The estimators' expectation is the exact value and gradient.

It is computed in two ways: exactly, by summing over all lengths and over probes v with mean(v v^T) = I, and by the mean
over thousands of keys. The tests at the end check that deliberate mistakes are found.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from resflow_jax.functional import direct_estimates, neumann, series, term_sums, trace_probes
from resflow_jax.functional.estimators import Roulette, Truncated
from resflow_jax.functional.length_laws import Defensive, Fitted, Geometric, Poisson
from resflow_jax.functional.series import MinimalResidual, PowerSeries
from tests.functional.contractions import dense_series
from tests.functional.estimates import (
    FITTED,
    SAFE,
    SLOW,
    estimate,
    exact,
    flat_value_and_gradient,
    net_named,
    worst_z,
)

# Expectations without sampling

LONGEST = 40  # the minimal residuals of these nets have by then fallen to rounding


def enumerate_draws(monkeypatch, net, estimator, lengths=(0,), estimate=estimate):
    """The estimate for every length and for D draws of orthogonal +-1 probes: [lengths, D, ...].

    In draw i, row n of the batch of probes is row (i + n) % D of a Hadamard matrix: each row of the batch sees them
    all, so that its mean of v v^T is I, and no two rows of the batch see the same.
    """
    x = net[2]
    hadamard = jnp.asarray(scipy.linalg.hadamard(x[0].size), float)

    def one(length, first):
        def make_probes(probe, probes, seeds, x):
            rows = (first + jnp.arange(probes * len(x))) % len(hadamard)
            return hadamard[rows].reshape(-1, *x.shape[1:])

        with monkeypatch.context() as patch:  # what it sets holds traced arrays
            for module in (direct_estimates, neumann, trace_probes):
                patch.setattr(module, "make_probes", make_probes)
            for law in (Geometric, Poisson, Defensive, Fitted):
                patch.setattr(law, "sample", lambda self, key, shape: jnp.broadcast_to(length, shape))
                patch.setattr(law, "from_bits", lambda self, bits: jnp.broadcast_to(length, bits.shape[1:]))
            return estimate(net, estimator, jax.random.key(0))

    over_probes = jax.vmap(one, (None, 0))
    return jax.jit(jax.vmap(over_probes, (0, None)))(jnp.asarray(lengths), jnp.arange(len(hadamard)))


@cache
def series_reference(name):
    """The dense reference of the truncated series: a program of the number of terms."""
    g, params, x = net_named(name)
    value = lambda terms, params, x: (x + g(params, x), dense_series(g, params, x, terms))  # noqa: E731
    return jax.jit(lambda terms: flat_value_and_gradient(g, params, x, partial(value, terms)))


@pytest.mark.parametrize(("terms", "gradient"), [(1, "neumann"), (4, "neumann"), (4, "autodiff")])
def test_truncated_is_the_truncated_series(monkeypatch, terms, gradient):
    """Averaged over orthogonal probes, value and gradient are those of sum_{k <= n} (-1)^(k+1) tr(J^k) / k."""
    draws = enumerate_draws(monkeypatch, net_named("saturated"), Truncated(terms, gradient=gradient))[0]
    expected = series_reference("saturated")(terms)
    np.testing.assert_allclose(draws.mean(axis=0), expected, rtol=1e-10, atol=1e-10)


def test_truncated_conv(monkeypatch):
    """The same for convolutions, D = 32."""
    draws = enumerate_draws(monkeypatch, net_named("conv"), Truncated(4))[0]
    expected = series_reference("conv")(4)
    np.testing.assert_allclose(draws.mean(axis=0), expected, rtol=1e-10, atol=1e-10)


def test_truncation_bias_shrinks():
    """|bias of the value| <= D L^(n+1) / ((n+1) (1-L)); from 3 to 27 terms that of the gradient falls 90 times."""
    worst = []
    for terms in (3, 9, 27):
        error = jnp.abs(series_reference("saturated")(terms) - exact("saturated"))
        assert jnp.max(error[:3]) <= 4 * 0.8 ** (terms + 1) / ((terms + 1) * 0.2)
        worst.append(jnp.max(error))
    assert worst[0] > 3 * worst[1] > 90 * worst[2]


def expectation(monkeypatch, name, estimator, longest, estimate=estimate):
    """sum_n P(N = n) * (mean over probes), n = 0..longest, all longer ones counted as the longest.

    Every term up to `longest` thus has the weight one in expectation: what is left out is the rest of the series.
    """
    lengths = np.arange(longest + 1, dtype=np.int32)
    survival = np.append(estimator.length.survival(lengths), 0)
    draws = enumerate_draws(monkeypatch, net_named(name), estimator, lengths, estimate)
    return np.tensordot(survival[:-1] - survival[1:], np.asarray(draws).mean(axis=1), 1)


@pytest.mark.parametrize(
    ("name", "estimator", "tolerance"),
    [
        ("moderate", Roulette(Geometric(0.4), 2, minres_steps=0), 1e-10),
        (
            "moderate",
            Roulette(Geometric(0.5), 2, minres_steps=0, gradient="autodiff", trace_probes=1),
            1e-7,
        ),  # leaves out P(N > n) <= 2^-24
        ("moderate", Roulette(SAFE, 0, minres_steps=0, probes=2), 1e-10),
    ],
    ids=str,
)
def test_power_series_roulette_summed_over_its_law(monkeypatch, name, estimator, tolerance):
    """sum_n P(N = n) * (mean over probes) is the exact value and gradient, to rounding: no sampling."""
    result = expectation(monkeypatch, name, estimator, 60)
    np.testing.assert_allclose(result, exact(name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("nonsymmetric", Roulette(SAFE, 2, probes=2, trace_probes=2)),
        ("moderate", Roulette(FITTED, 0, minres_steps=1, probes=3)),
        ("nonsymmetric", Roulette(Poisson(2.0), 2, minres_steps=2)),
        ("nonsymmetric", Roulette(Geometric(0.3), 0, gradient="autodiff", probes=2)),
        ("nonsymmetric", Roulette(FITTED, 0, minres_steps=3, gradient="autodiff")),
        ("saturated", Roulette(FITTED, 0)),
    ],
    ids=str,
)
def test_minimal_residual_roulette_summed_over_its_law(monkeypatch, name, estimator):
    """The same for minimal residuals: each probe's series depends on the probe, but its limit is exact for each."""
    result = expectation(monkeypatch, name, estimator, LONGEST if estimator.minres_steps is None else 80)
    tolerance = 1e-9 if estimator.gradient == "neumann" else 1e-7
    np.testing.assert_allclose(result, exact(name), rtol=tolerance, atol=tolerance)


def test_minimal_residual_roulette_conv(monkeypatch):
    """The same for convolutions, D = 32."""
    result = expectation(monkeypatch, "conv", Roulette(Geometric(0.4), 2, subsample=1), 30)
    np.testing.assert_allclose(result, exact("conv"), rtol=1e-9, atol=1e-9)


# Expectations over keys


@pytest.mark.parametrize(
    ("name", "law", "exact_terms", "samples", "probe"),
    [
        ("saturated", SLOW, 0, 1, "gaussian"),
        ("saturated", SLOW, 5, 3, "rademacher"),
        ("small", Poisson(2.0), 2, 1, "rademacher"),
    ],
)
def test_roulette_is_unbiased(name, law, exact_terms, samples, probe):
    """Value and Neumann gradient have the exact expectation: |z| < 4 over all components, 4000 keys."""
    estimator = Roulette(law, exact_terms, samples, probe, minres_steps=0)
    assert worst_z(name, estimator) < 4


@pytest.mark.parametrize(
    ("name", "law", "exact_terms", "samples", "probe"),
    [
        ("saturated", SLOW, 0, 3, "rademacher"),
        ("small", Poisson(2.0), 2, 1, "gaussian"),
    ],
)
def test_roulette_autodiff_is_unbiased(name, law, exact_terms, samples, probe):
    """The same for the gradient of the estimate itself."""
    estimator = Roulette(law, exact_terms, samples, probe, minres_steps=0, gradient="autodiff")
    assert worst_z(name, estimator) < 4


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("nonsymmetric", Roulette(Geometric(0.4), 2, samples=3, probe="gaussian", probes=2, trace_probes=2)),
        ("nonsymmetric", Roulette(Geometric(0.25), 2, minres_steps=3, probe="gaussian")),
        ("nonsymmetric", Roulette(FITTED, 0, minres_steps=0, samples=3, probe="orthogonal", probes=3)),
        ("saturated", Roulette(Poisson(2.0), 0, probe="gaussian")),  # four eigenvalues: the series ends
        ("small", Roulette(Poisson(2.0), 2, minres_steps=1, samples=3, probe="orthogonal")),
        ("nonsymmetric", Roulette(SAFE, 1, probe="hadamard", subsample=3, trace_probes=3)),
        ("nonsymmetric", Roulette(FITTED, 0, minres_steps=0, samples=3, probe="hadamard", probes=2, subsample=3)),
    ],
    ids=str,
)
def test_minimal_residual_roulette_is_unbiased(name, estimator):
    """The same for minimal residuals, and for more than one probe an example."""
    assert worst_z(name, estimator) < 4


def test_minimal_residual_roulette_autodiff_is_unbiased():
    """The same for the gradient of the estimate itself."""
    law = Geometric(0.5)  # a short one: the gradient goes through the longest possible series
    estimator = Roulette(law, 0, minres_steps=1, samples=3, probe="orthogonal", probes=2, gradient="autodiff")
    assert worst_z("nonsymmetric", estimator, keys=1000) < 4


@pytest.mark.parametrize(
    "estimator",
    [
        Roulette(Geometric(0.3), 0, minres_steps=0, samples=3, probe="gaussian"),
        Roulette(Defensive(lipschitz=0.8), 0, probe="orthogonal", probes=2),
        Roulette(),  # the default, for parts of the batch
    ],
    ids=str,
)
def test_roulette_is_unbiased_for_convolutions(estimator):
    """The same on [B, 4, 4, 2]: 127 components."""
    assert worst_z("conv", estimator, keys=1000) < 4


# Power: mistakes that the tests above must find


def _cotangents(mutate):
    def replaced(original):
        def backward(*static_and_kept_and_cotangents):
            *static, kept, (y_bar, log_det_bar, diagnostics_bar) = static_and_kept_and_cotangents
            return original(*static, kept, (y_bar, mutate(kept[0], log_det_bar), diagnostics_bar))

        return backward

    return replaced


def _terms(mutate):
    def replaced(original):
        def step(self, k, v, state, product):
            after, term = original(self, k, v, state, product)
            return after, mutate(k, term, state, after)

        return step

    return replaced


def _without_lookahead(k, term, before, after):
    weights = series._quadrature(term.value.dtype)[1]
    return term._replace(value=term.value + (after.lookahead - before.lookahead) @ weights)


def _positive_product(original):
    return lambda self, k, v, state, product: original(self, k, v, state, lambda u: -product(u))


def _no_roulette_in_gradient(original):
    def draw_plan(estimator, key):
        plan = original(estimator, key)
        return plan._replace(weights=lambda k: plan.weights(k)._replace(w=jnp.ones(())))

    return draw_plan


first_for_all = _cotangents(lambda estimator, log_det_bar: jnp.full_like(log_det_bar, log_det_bar.ravel()[0]))
no_mean = _cotangents(lambda estimator, log_det_bar: estimator.probes * log_det_bar)
wrong_sign = _terms(lambda k, term, *_: term._replace(w=-term.w, value=-term.value))


def _unweighted_part(original):
    return lambda self, plan, number: original(self, plan, number)._replace(weights=plan.weights)


MUTATIONS = {
    "sign": (PowerSeries, "step", wrong_sign),
    "no sign": (PowerSeries, "step", _positive_product),
    "no 1/k": (
        PowerSeries,
        "step",
        _terms(lambda k, term, *_: term._replace(value=k.astype(term.value.dtype) * term.value)),
    ),
    "survival(k + 1)": (Geometric, "survival", lambda original: lambda self, k: original(self, k + 1)),
    "unweighted gradient": (neumann, "draw_plan", _no_roulette_in_gradient),
    "first cotangent for all": (neumann._neumann, "bwd", first_for_all),
}
MINIMAL_RESIDUAL_MUTATIONS = {
    "sign of w": (MinimalResidual, "step", _terms(lambda k, term, *_: term._replace(w=-term.w))),
    "sign of the value": (MinimalResidual, "step", _terms(lambda k, term, *_: term._replace(value=-term.value))),
    "no lookahead": (MinimalResidual, "step", _terms(_without_lookahead)),
    "N > k": (term_sums, "term_weight", lambda original: lambda law, lengths, *args: original(law, lengths - 1, *args)),
    "survival(k - 1)": (Defensive, "survival", lambda original: lambda self, k: original(self, k - 1)),
    "sum over probes in the gradient": (neumann._neumann, "bwd", no_mean),
    "subsample not weighted": (term_sums.Part, "plan_of", _unweighted_part),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(monkeypatch, mutation):
    """With one thing wrong the same test of the mean over keys fails, and clearly: |z| > 6."""
    owner, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))
    assert worst_z("saturated", Roulette(SLOW, 0, minres_steps=0)) > 6


@pytest.mark.parametrize("mutation", MINIMAL_RESIDUAL_MUTATIONS)
def test_mutations_of_minimal_residuals_are_caught(monkeypatch, mutation):
    """The same for minimal residuals and two probes, with half the keys and a shorter law."""
    owner, name, mutate = MINIMAL_RESIDUAL_MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))
    estimator = Roulette(Defensive(0.7, 0.1, 0.75), 0, probes=2, subsample=3 if mutation.startswith("subsample") else 1)
    assert worst_z("nonsymmetric", estimator, keys=2000) > 6
