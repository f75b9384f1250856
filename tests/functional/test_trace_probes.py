"""`Roulette.trace_probes`: the first term of the value has probes of its own. Unbiasedness: `test_unbiasedness`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional import neumann, term_sums, trace_probes
from resflow_jax.functional.estimators import Roulette
from resflow_jax.functional.length_laws import Geometric
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.series import dot
from tests.functional.estimates import estimate, exact, net_named
from tests.functional.test_unbiasedness import LONGEST, expectation

KEYS = jax.random.split(jax.random.key(5), 400)


@pytest.mark.parametrize("gradient", ["neumann", "autodiff"])
def test_orthogonal_probes_give_the_exact_trace(gradient):
    """Where J^2 = 0 the first term is all: D orthogonal probes of its own leave no noise, 1 leaves some."""
    x, triangular = jnp.ones((6, 4)), jnp.zeros((4, 4)).at[0, 2:].set(0.5)

    def log_det(trace_probes):
        options = {"minres_steps": 0, "gradient": gradient, "trace_probes": trace_probes}
        estimator = Roulette(Geometric(0.5), 1, probe="orthogonal", **options)
        return residual(lambda w, x: x @ w, triangular, x, key=KEYS[0], estimator=estimator)[1]

    np.testing.assert_allclose(log_det(4), 0, atol=1e-14)
    with_v, with_one = log_det(0), log_det(1)
    for noisy in (with_v, with_one, with_one - with_v):
        assert np.abs(noisy).min() > 1e-3


@pytest.mark.parametrize("minres_steps", [None, 0], ids=["minimal residuals", "power series"])
def test_the_first_term_is_replaced(monkeypatch, minres_steps):
    """The value is that of the same v without, plus mean u^T J u - v^T J v; the gradient is the same."""
    g, params, x = net_named("nonsymmetric")
    drawn = {n: np.random.default_rng(n).normal(size=(n, *x.shape)) for n in (1, 3)}
    for module in (neumann, trace_probes):
        monkeypatch.setattr(
            module, "make_probes", lambda probe, n, seeds, x: jnp.asarray(drawn[n]).reshape(-1, *x.shape[1:])
        )

    def found(trace_probes):
        options = {"exact_terms": 2, "minres_steps": minres_steps, "subsample": 1, "trace_probes": trace_probes}
        return jax.jit(lambda: estimate((g, params, x), Roulette(Geometric(0.4), **options), KEYS[1]))()

    _, pullback = jax.vjp(lambda x: g(params, x), x)
    v, u = (np.mean([dot(probe, pullback(probe)[0]) for probe in probes], axis=0) for probes in drawn.values())
    plain, replaced = found(0), found(3)
    np.testing.assert_allclose(replaced[: len(x)], plain[: len(x)] + u - v, rtol=1e-12)
    np.testing.assert_array_equal(replaced[len(x) :], plain[len(x) :])


def test_less_noise():
    """Four such probes leave less than half of the standard deviation of each example's log-det, and of their mean."""
    g, params, x = net_named("conv")

    def deviations(trace_probes):
        estimator = Roulette(trace_probes=trace_probes)
        run = jax.jit(jax.vmap(lambda key: residual(g, params, x, key=key, estimator=estimator)[1]))
        log_dets = run(KEYS)
        return np.std(log_dets, axis=0), np.std(np.mean(log_dets, axis=1))

    (of_each, of_mean), (of_each_with, of_mean_with) = deviations(0), deviations(4)
    assert np.all(of_each_with < 0.5 * of_each)
    assert of_mean_with < 0.5 * of_mean


MUTATIONS = {
    "not subtracted": (term_sums, "number_of_trace_probes", lambda original: lambda estimator: 0),
    "a sum": (term_sums, "mean_trace", lambda original: lambda u, product: len(u) * original(u, product)),
    "subtracted twice": (term_sums, "dot", lambda original: lambda v, image: 2 * original(v, image)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(monkeypatch, mutation):
    """With one thing wrong, the sum over the law differs clearly from the exact vector."""
    owner, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))
    result = expectation(monkeypatch, "nonsymmetric", Roulette(Geometric(0.4), 1, trace_probes=2), LONGEST)
    assert np.max(np.abs(result - exact("nonsymmetric"))) > 1e-3
