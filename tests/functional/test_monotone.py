"""The monotone map against dense Jacobians: values, gradients through w, unbiasedness, inverse, status and modes.

The dense reference solves for w by Newton's method, written here, and differentiates it through Newton's last step.
"""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional import monotone as monotone_module
from resflow_jax.functional import neumann, term_sums
from resflow_jax.functional.cayley_series import ParityPowerSeries, TwoSidedKrylov
from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.inverse import InverseError
from resflow_jax.functional.length_laws import Defensive, Geometric, Poisson
from resflow_jax.functional.monotone import monotone, monotone_inverse
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint
from tests.functional import conditional
from tests.functional.contractions import jacobians
from tests.functional.estimates import FITTED, PAPERS, SAFE, flat_value_and_gradient, net_named, worst_z
from tests.functional.test_unbiasedness import LONGEST, enumerate_draws, expectation

ROOT = np.sqrt(2)
EXACT = Exact(chunk_size=3)
TIGHT = Anderson(tolerance=1e-14)
PLAIN = FixedPoint(tolerance=1e-13)  # the solver that compiles fastest


def newton(g, params, x, steps=30):
    """w with w + g(w) = sqrt(2) x; the last of the steps is differentiated, and gives the implicit derivative."""

    def step(params, x, w):
        j = jnp.eye(x[0].size)[None] + jacobians(g, params, w)
        residual = (w + g(params, w) - ROOT * x).reshape(len(x), -1, 1)
        return w - jnp.linalg.solve(j, residual).reshape(x.shape)

    start = jax.lax.stop_gradient((params, x))
    w = jax.lax.fori_loop(0, steps, lambda _, w: step(*start, w), start[1])
    return step(params, x, w)


def dense(g, params, x, log_det=None):
    """y and the log-det by dense linear algebra."""
    w = newton(g, params, x)
    j = jacobians(g, params, w)
    eye = jnp.eye(j.shape[-1])[None]
    if log_det is None:
        log_det = lambda j: jnp.linalg.slogdet(eye - j)[1] - jnp.linalg.slogdet(eye + j)[1]  # noqa: E731
    return ROOT * w - x, log_det(j)


@cache
def reference(name, log_det=None):
    """The program of the dense reference; `log_det` takes J and what the program is called with."""
    g, params, x = net_named(name)
    return jax.jit(
        lambda *args: flat_value_and_gradient(
            g, params, x, lambda p, x: dense(g, p, x, log_det and (lambda j: log_det(j, *args)))
        )
    )


def odd_series(j, weights):
    power, total = j, 0.0
    for n in range(3):
        total -= 2 * weights[n] / (2 * n + 1) * jnp.trace(power, axis1=1, axis2=2)
        power = power @ j @ j
    return total


@cache
def exact(name):
    return reference(name)()


def estimate(net, estimator, key, solver=PLAIN):
    value = lambda params, x: monotone(net[0], params, x, key=key, estimator=estimator, solver=solver)  # noqa: E731
    return flat_value_and_gradient(*net, value)


def test_the_log_det_is_that_of_the_map():
    """The reference's formula is the log-det of the dense Jacobian of x -> y, by jacfwd of the whole map."""
    g, params, x = net_named("nonsymmetric")
    y_of_one = lambda x: monotone(g, params, x[None], estimator=EXACT, solver=TIGHT)[0][0]  # noqa: E731
    whole = jax.jit(jax.vmap(jax.jacfwd(y_of_one)))(x)
    y, log_det = monotone(g, params, x, estimator=EXACT)
    expected_y, expected = jax.jit(partial(dense, g))(params, x)
    np.testing.assert_allclose(jnp.linalg.slogdet(whole)[1], expected, rtol=1e-9)
    np.testing.assert_allclose(log_det, expected, rtol=1e-9)
    np.testing.assert_allclose(y, expected_y, atol=1e-11)


@pytest.mark.parametrize("name", ["nonsymmetric", "conv"])
def test_exact_value_and_gradient(name):
    """Exact: value, gradient in params and in x, the part through w included, to 1e-8."""
    found = jax.jit(lambda: estimate(net_named(name), EXACT, None, Anderson()))()
    np.testing.assert_allclose(found, exact(name), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("terms", "gradient"), [(4, "neumann"), (5, "neumann"), (4, "autodiff")])
def test_truncated_is_the_truncated_series(monkeypatch, terms, gradient):
    """Averaged over orthogonal probes, value and gradient are those of the odd powers up to `terms`."""
    draws = enumerate_draws(
        monkeypatch, net_named("saturated"), Truncated(terms, gradient=gradient), estimate=estimate
    )[0]
    expected = reference("saturated", odd_series)(np.where(np.arange(1, 6, 2) <= terms, 1.0, 0.0))
    np.testing.assert_allclose(draws.mean(axis=0), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("moderate", Roulette(Geometric(0.5), 0, minres_steps=0)),
        ("nonsymmetric", Roulette(SAFE, 2, probes=2, trace_probes=2)),
        ("moderate", Roulette(Geometric(0.5), 1, minres_steps=0, trace_probes=1)),
        ("nonsymmetric", Roulette(Poisson(2.0), 2, minres_steps=2)),
        ("nonsymmetric", Roulette(Geometric(0.5), 0, gradient="autodiff", probes=2)),
        ("saturated", Roulette(FITTED, 0)),
    ],
    ids=str,
)
def test_roulette_summed_over_its_law(monkeypatch, name, estimator):
    """sum_n P(N = n) * (mean over probes) is the exact value and gradient, with no sampling."""
    result = expectation(monkeypatch, name, estimator, LONGEST if estimator.minres_steps is None else 80, estimate)
    tolerance = 1e-8 if estimator.gradient == "neumann" else 1e-6
    np.testing.assert_allclose(result, exact(name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("nonsymmetric", PAPERS),
        ("moderate", Roulette(Poisson(2.0), 2, samples=3, probe="orthogonal", probes=2)),
        (
            "moderate",
            Roulette(Geometric(0.5), 1, minres_steps=1, probe="gaussian", gradient="autodiff", trace_probes=1),
        ),
        ("conv", Roulette(Defensive(lipschitz=0.8), subsample=2, trace_probes=1)),
    ],
    ids=str,
)
def test_roulette_is_unbiased(name, estimator):
    """Value and gradient have the exact expectation: |z| < 4.5 over all components, 1000 keys."""
    assert worst_z(name, estimator, 1000, estimate, exact) < 4.5


# Power: mistakes that the tests above must find


def _terms(mutate):
    def replaced(original):
        def step(self, k, v, state, product):
            after, term = original(self, k, v, state, product)
            return after, mutate(k, term)

        return step

    return replaced


def _plan(**changes):
    return lambda original: lambda form, plan: original(form, plan)._replace(**changes)


def _unweighted(original):
    def plan_of(form, plan):
        plan = original(form, plan)
        return plan._replace(weights=lambda k: plan.weights(k)._replace(w=jnp.ones(())))

    return plan_of


def _through_w(original):
    """The log-det with no derivative through w."""
    return lambda g, params, w, **options: original(g, params, jax.lax.stop_gradient(w), **options)


MUTATIONS = {
    "sign": (neumann, "plan_of", _plan(scale=2.0)),
    "unweighted gradient": (neumann, "plan_of", _unweighted),
    "no derivative through w": (monotone_module, "log_det_at", _through_w),
    "size of w": (TwoSidedKrylov, "step", _terms(lambda k, term: term._replace(w=1.1 * term.w))),
    "sign of the value": (TwoSidedKrylov, "step", _terms(lambda k, term: term._replace(value=-term.value))),
    "N > k": (term_sums, "term_weight", lambda original: lambda law, n, *args: original(law, n - 1, *args)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(monkeypatch, mutation):
    """With one thing wrong, the sum over the law differs clearly from the exact vector."""
    owner, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))
    result = expectation(monkeypatch, "saturated", Roulette(Geometric(0.4), 0), LONGEST, estimate)
    assert np.max(np.abs(result - exact("saturated"))) > 1e-3


def test_a_mutation_of_the_power_series_is_caught(monkeypatch):
    """The same for the power series with the weight 1/k missing."""
    step = _terms(lambda k, term: term._replace(value=k.astype(term.value.dtype) * term.value))
    monkeypatch.setattr(ParityPowerSeries, "step", step(ParityPowerSeries.step))
    result = expectation(monkeypatch, "moderate", Roulette(Geometric(0.4), 0, minres_steps=0), 60, estimate)
    assert np.max(np.abs(result - exact("moderate"))) > 1e-3


# Conditions, pytrees, custom estimators


def dense_conditional(params, x, condition):
    """y and log-det with a condition, w by Newton's method."""

    def one(x, condition):
        row = jax.tree.map(lambda leaf: leaf[None], condition)
        g = lambda params, w: conditional.g(params, w, row)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf[0], dense(g, params, x[None]))

    return jax.vmap(one)(x, condition)


@cache
def of_condition(estimator):
    """Gradients in params, x and the floats of the condition, and log_det; None is the dense reference."""
    params, x, condition = conditional.net()
    label, key = condition.pop("label"), jax.random.key(0)

    def loss(params, x, floats):
        c = conditional.with_label(floats, label)
        if estimator is None:
            y, log_det = dense_conditional(params, x, c)
        else:
            y, log_det = monotone(conditional.g, params, x, condition=c, key=key, estimator=estimator)
        return jnp.sum(jnp.sin(3 * y)) + log_det @ jnp.arange(1.0, 5.0), log_det

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, condition)


@pytest.mark.parametrize("estimator", [EXACT, Truncated(80, probe="orthogonal", probes=3)], ids=str)
def test_condition(estimator):
    """Values and gradients in params, x and the floats of the condition; with D orthogonal probes nothing is random."""
    close = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-8)
    jax.tree.map(close, of_condition(estimator), of_condition(None))


def test_events_may_be_pytrees_and_estimators_custom():
    """A batch {"a": [B, 1], "b": [B, 3]} maps as its rows do; a custom estimator is called for -g and for g."""

    class Dense:
        needs_key = False

        def estimate(self, g, x, key):
            j = jax.vmap(jax.jacfwd(lambda x: g(jnp.broadcast_to(x[None], whole))[0]))(x)
            return x + g(x), jnp.linalg.slogdet(jnp.eye(4)[None] + j)[1]

    g, params, x = net_named("moderate")
    whole = x.shape
    expected = jax.jit(partial(dense, g))(params, x)
    split = lambda x: {"a": x[:, :1], "b": x[:, 1:]}  # noqa: E731
    join = lambda tree: jnp.concatenate([tree["a"], tree["b"]], axis=1)  # noqa: E731
    y, log_det = monotone(lambda params, tree: split(g(params, join(tree))), params, split(x), estimator=EXACT)
    np.testing.assert_allclose(join(y), expected[0], atol=1e-9)
    np.testing.assert_allclose(log_det, expected[1], atol=1e-9)
    back = monotone_inverse(lambda params, tree: split(g(params, join(tree))), params, y)
    np.testing.assert_allclose(join(back), x, atol=1e-9)
    np.testing.assert_allclose(monotone(g, params, x, estimator=Dense())[1], expected[1], atol=1e-9)


# The inverse


@pytest.mark.parametrize("solver", [Anderson(), FixedPoint(), Broyden()], ids=str)
def test_inverse(solver):
    """x -> y -> x and y -> x -> y, within the error bounds of the statuses."""
    g, params, x = net_named("nonsymmetric")
    y, _, status = monotone(g, params, x, estimator=EXACT, solver=solver, return_status=True)
    back, inverse_status = monotone_inverse(g, params, y, solver=solver, return_status=True)
    assert status.converged.all() and inverse_status.converged.all()
    np.testing.assert_allclose(back, x, atol=1e-9)
    again = monotone(g, params, monotone_inverse(g, params, x, solver=solver), estimator=EXACT, solver=solver)[0]
    np.testing.assert_allclose(again, x, atol=1e-9)


def test_error_bound():
    """The status bounds the error of y and of x, also of solves that have not converged."""
    g, params, x = net_named("nonsymmetric")
    rough, truth = FixedPoint(max_iterations=4), Anderson(tolerance=1e-14)
    y, _, status = monotone(g, params, x, estimator=EXACT, solver=rough, return_status=True)
    error = jnp.linalg.norm(y - monotone(g, params, x, estimator=EXACT, solver=truth)[0], axis=1)
    assert np.all(error <= status.error_bound(0.75)) and np.all(error > 1e-3 * status.error_bound(0.75))
    back, status = monotone_inverse(g, params, x, solver=rough, return_status=True)
    error = jnp.linalg.norm(back - monotone_inverse(g, params, x, solver=truth), axis=1)
    assert np.all(error <= status.error_bound(0.75)) and np.all(error > 1e-3 * status.error_bound(0.75))


def test_the_derivative_of_the_inverse():
    """In params and y: that of the dense inverse, which is the map of -g."""
    g, params, y = net_named("nonsymmetric")
    value = lambda found: jnp.sum(jnp.sin(3 * found))  # noqa: E731
    minus = lambda params, x: -g(params, x)  # noqa: E731
    expected = jax.jit(jax.grad(lambda p, y: value(dense(minus, p, y)[0]), (0, 1)))(params, y)
    found = jax.jit(jax.grad(lambda p, y: value(monotone_inverse(g, p, y, solver=TIGHT)), (0, 1)))(params, y)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9), found, expected)


def test_failures_are_reported():
    """As of `residual_inverse`: a warning or an error in eager calls, NaN in compiled ones that should raise."""
    g, params, x = net_named("saturated")
    warns, raises = (FixedPoint(max_iterations=2, on_failure=what) for what in ("warn", "raise"))
    call = lambda solver: monotone(g, params, x, estimator=EXACT, solver=solver)  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"monotone: 3 of 3 examples did not converge"):
        call(warns)
    with pytest.raises(InverseError, match=r"monotone: 3 of 3 examples did not converge"):
        call(raises)
    with pytest.raises(InverseError, match=r"monotone_inverse: 3 of 3 examples did not converge"):
        monotone_inverse(g, params, x, solver=raises)
    for solver, is_expected in ((raises, np.isnan), (warns, np.isfinite)):
        assert all(is_expected(leaf).all() for leaf in jax.jit(partial(call, solver))())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, status = monotone(g, params, x, estimator=EXACT, solver=warns, return_status=True)
    assert not status.converged.any()


@pytest.mark.parametrize("minres_steps", [0, None])
def test_diagnostics_for_fitted_lengths(minres_steps):
    """term_norms do not vanish at odd terms and do not grow: for the power series they are |M^k v|^2 / D."""
    g, params, x = net_named("nonsymmetric")
    estimator = Roulette(Geometric(0.01), 0, minres_steps=minres_steps, probe="orthogonal", probes=8)
    *_, found = monotone(g, params, x, key=jax.random.key(0), estimator=estimator, return_diagnostics=True)
    j = jax.jit(lambda: jacobians(g, params, newton(g, params, x)).mT)()
    powers = [jnp.mean(jnp.sum(jnp.square(jnp.linalg.matrix_power(j, k)), axis=(1, 2))) / 8 for k in (1, 2, 3)]
    weights = 0.99 ** -np.arange(3.0)
    if minres_steps == 0:
        np.testing.assert_allclose(found.term_norms[:3], weights * np.asarray(powers), rtol=1e-9)
    assert np.all(found.term_norms[:3] <= weights * np.asarray(powers) * (1 + 1e-9)) and found.term_norms[2] > 1e-4
