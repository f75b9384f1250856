"""The series of a Cayley transform against dense linear algebra: (I - M^2)^-1 v and v^T atanh(M) v.

The matrices are those of `test_series`; all of one size are one batch [B, D, D].
"""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from resflow_jax.functional import cayley_series
from resflow_jax.functional.cayley_series import ParityPowerSeries, TwoSidedKrylov
from tests.functional.test_series import DIM, DTYPES, NAMES, M, V, norms, run, run_all


def solutions(m=M, v=V):
    """(I - M^2)^-1 v and v^T atanh(M) v by scipy."""
    eye = np.eye(m.shape[-1])
    logs = [scipy.linalg.logm(eye + a).real - scipy.linalg.logm(eye - a).real for a in m]
    values = [u @ log @ u / 2 for log, u in zip(logs, v, strict=True)]
    return np.linalg.solve(eye - m @ m, v[..., None])[..., 0], np.array(values)


def residuals(states):
    """The residuals of (I - M) x = v and (I + M) x = v: [2, K + 1, B, D]."""
    return np.stack([states.zeta[..., n, None] * states.q for n in (0, 1)])


def test_power_series_is_the_textbook_one():
    """Even powers M^k v for w, odd ones v^T M^k v / k for the value."""
    w, value, _ = run_all(ParityPowerSeries(), 12)
    power = V
    for k in range(1, 13):
        power = np.einsum("bij,bj->bi", M, power)
        np.testing.assert_allclose(w[k - 1], (k % 2 == 0) * power, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(value[k - 1], (k % 2) * np.sum(V * power, -1) / k, rtol=1e-12, atol=1e-14)


@DTYPES
@pytest.mark.parametrize("series", [ParityPowerSeries(), TwoSidedKrylov(), TwoSidedKrylov(2)], ids=str)
def test_sums_are_those_of_scipy(series, dtype):
    """All terms of w add up to (I - M^2)^-1 v, of the value to v^T atanh(M) v: to 1e-10, 1e-4 in float32."""
    w, value, _ = run_all(series, 1500, dtype)
    assert np.all(np.isfinite(w)) and np.all(np.isfinite(value))
    expected_w, expected_value = solutions()
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-4
    scale = 1 + norms(expected_w)[:, None]
    np.testing.assert_allclose((V + w.sum(axis=0)) / scale, expected_w / scale, atol=tolerance)
    np.testing.assert_allclose(value.sum(axis=0), expected_value, atol=tolerance * (1 + np.abs(expected_value).max()))


@DTYPES
@pytest.mark.parametrize("steps", [None, 3])
def test_no_step_is_worse_than_one_of_the_power_series(steps, dtype):
    """|r(1)|^2 + |r(-1)|^2 of a step is at most that of M r(1) and M r(-1), up to rounding; both are true residuals."""
    _, _, states = run_all(TwoSidedKrylov(steps), 40, dtype)
    r = residuals(states)
    after = np.sqrt(np.sum(np.square(r[:, 1:]), axis=(0, -1)))
    bound = np.sqrt(np.sum(np.square(np.einsum("bij,skbj->skbi", M, r[:, :-1])), axis=(0, -1)))
    rounding = 64 * float(jnp.finfo(dtype).eps)
    assert np.all(after <= bound * (1 + rounding) + rounding * norms(V))
    solved = np.cumsum(np.stack([states.forward, states.backward])[:, 1:], axis=1)
    signs = np.array([1.0, -1.0])[:, None, None, None]
    found = V - solved + signs * np.einsum("bij,skbj->skbi", M, solved)
    np.testing.assert_allclose(found, r[:, 1:], atol=300 * rounding)


def test_no_steps_are_the_power_series():
    """TwoSidedKrylov(0) has the terms of ParityPowerSeries: of w to rounding, of the value to the quadrature."""
    one, other = (run_all(series, 30) for series in (TwoSidedKrylov(0), ParityPowerSeries()))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(one[1], other[1], atol=1e-10)


@pytest.mark.parametrize(
    ("name", "products"),
    [("zero", 0), ("identity", 1), ("rotation", 2), ("spectrum of +-0.98", 2), ("symmetric of rank one", 2)],
)
def test_done_after_as_many_products_as_eigenvalues(name, products):
    """With one or two eigenvalues one or two terms are the whole series, to 1e-10; later ones are zero."""
    n = NAMES.index(name)
    w, value = (term[:, n] for term in run_all(TwoSidedKrylov(), 40)[:2])
    expected, start = [solution[n] for solution in solutions()], V[n]
    scale = 1 + norms(expected[0])
    np.testing.assert_allclose(start + w[:products].sum(axis=0), expected[0], atol=1e-10 * scale)
    np.testing.assert_allclose(value[:products].sum(), expected[1], atol=1e-10 * (1 + abs(expected[1])))
    np.testing.assert_allclose(w[products:], 0, atol=1e-10 * scale)


@pytest.mark.parametrize(("low", "high", "factor"), [(-0.9, -0.1, 3), (-0.9, 0.9, 1.1), (0.05, 0.3, 50)])
def test_far_fewer_terms_than_the_power_series(low, high, factor):
    """For D = 64 eigenvalues spread over an interval, the error of w after four terms is that many times smaller."""
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    m, v = ((q * np.linspace(low, high, 64)) @ q.T)[None], rng.choice([-1.0, 1.0], size=(1, 64))
    expected = solutions(m, v)[0]
    two, power = (run(series, m, v, 4)[0].sum(axis=0) for series in (TwoSidedKrylov(), ParityPowerSeries()))
    assert norms(v + power - expected) > factor * norms(v + two - expected)


@DTYPES
@pytest.mark.parametrize("series", [ParityPowerSeries(), TwoSidedKrylov()], ids=str)
def test_one_dimension(series, dtype):
    """D = 1: 1 / (1 - m^2) and atanh(m)."""
    m = np.array([-0.9, -0.3, 0.0, 0.4, 0.9]).reshape(-1, 1, 1)
    terms = 300 if series == ParityPowerSeries() else 1
    w, value, _ = run(series, jnp.asarray(m, dtype), jnp.ones((5, 1), dtype), terms)
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(1 + w.sum(axis=0), 1 / (1 - m[:, 0] ** 2), rtol=tolerance)
    np.testing.assert_allclose(value.sum(axis=0), np.arctanh(m[:, 0, 0]), rtol=tolerance, atol=tolerance)


def test_examples_are_independent_and_events_may_have_any_shape():
    """An example alone, as an event [2, 4], has the terms that it has in the batch."""
    w, value, _ = run_all(TwoSidedKrylov(), 6)
    for n in (0, 6, 12):
        m, v = M[n].reshape(2, 4, 2, 4), jnp.asarray(V[n].reshape(1, 2, 4))
        state = TwoSidedKrylov().start(v)
        for k in range(1, 7):
            state, term = TwoSidedKrylov().step(k, v, state, lambda u, m=m: jnp.einsum("ijkl,bkl->bij", m, u))
            np.testing.assert_allclose(term.w.ravel(), w[k - 1, n], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(term.value[0], value[k - 1, n], rtol=1e-9, atol=1e-12)


def test_the_value_up_to_a_lipschitz_constant_of_0_999():
    """The quadrature holds for eigenvalues up to 0.999 in size, also complex ones: v^T atanh(M) v to 1e-9."""
    nodes, weights = cayley_series._nodes(np.dtype("float64"))
    for m in 0.999 * np.exp(1j * np.linspace(0, np.pi, 50)):
        np.testing.assert_allclose(np.sum(weights / (1 - nodes * m)), np.arctanh(m), atol=1e-9)
    spectrum = np.linspace(-0.999, 0.999, DIM)
    _, values, _ = run(TwoSidedKrylov(), np.diag(spectrum)[None], V[:1], 400)
    np.testing.assert_allclose(values.sum(axis=0), [V[0] ** 2 @ np.arctanh(spectrum)], atol=1e-9)
