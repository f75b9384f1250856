"""The two series against dense linear algebra: (I + M)^-1 v and v^T log(I + M) v for matrices M of every kind.

All matrices of one size are one batch [B, D, D]; one program takes all steps and returns every term and residual.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from resflow_jax.functional.series import MinimalResidual, PowerSeries

DIM = 8


def _with_norm(m, norm):
    return norm * m / np.linalg.norm(m, 2)


def matrices():
    """{name: M}, all of |M|_2 < 1."""
    rng = np.random.default_rng(0)
    q, u = (np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] for _ in range(2))
    skew = rng.normal(size=(DIM, DIM))
    skew -= skew.T
    symmetric = lambda spectrum: (q * np.resize(spectrum, DIM)) @ q.T  # noqa: E731
    return {
        "zero": np.zeros((DIM, DIM)),
        "symmetric": _with_norm(skew @ q + (skew @ q).T, 0.8),
        "spectrum from -0.98 to 0.98": symmetric(np.linspace(-0.98, 0.98, DIM)),
        "spectrum of +-0.98": symmetric([-0.98, 0.98]),
        "three eigenvalues": symmetric([0.9, -0.5, 0.2]),
        "identity": -0.9 * np.eye(DIM),
        "nonsymmetric": _with_norm(rng.normal(size=(DIM, DIM)), 0.8),
        "nonsymmetric, near one": _with_norm(rng.normal(size=(DIM, DIM)), 0.98),
        "orthogonal": 0.95 * u,
        "rotation": 0.98 * np.kron(np.eye(DIM // 2), [[0.0, -1.0], [1.0, 0.0]]),
        "skew": _with_norm(skew, 0.9),
        "nilpotent": np.diag(np.full(DIM - 1, 0.9), 1),
        "rank one": _with_norm(np.outer(q[0], u[0]), 0.9),
        "symmetric of rank one": -0.9 * np.outer(q[0], q[0]),
    }


NAMES, M = list(matrices()), np.stack(list(matrices().values()))
V = np.random.default_rng(1).choice([-1.0, 1.0], size=(len(M), DIM))
DTYPES = pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=lambda dtype: dtype.__name__)


@partial(jax.jit, static_argnums=(0, 3))
def run(series, m, v, terms):
    """All terms of w [K, B, D] and of the value [K, B], and all states of the series, the first included."""

    def step(state, k):
        after, term = series.step(k, v, state, lambda u: jnp.einsum("bij,bj->bi", m, u))
        return after, (term, after)

    start = series.start(v)
    _, (terms, states) = jax.lax.scan(step, start, jnp.arange(1, terms + 1))
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)
    return terms.w, terms.value, states


def run_all(series, terms, dtype=jnp.float64):
    return jax.tree.map(partial(np.asarray, dtype=float), run(series, *(jnp.asarray(a, dtype) for a in (M, V)), terms))


def solutions(m=M, v=V):
    """(I + M)^-1 v and v^T log(I + M) v by scipy."""
    a = np.eye(m.shape[-1]) + m
    values = [v @ scipy.linalg.logm(a).real @ v for a, v in zip(a, v, strict=True)]
    return np.linalg.solve(a, v[..., None])[..., 0], np.array(values)


def norms(u):
    return np.linalg.norm(u, axis=-1)


def test_power_series_is_the_textbook_one():
    """Term k of w is (-M)^k v, of the value -v^T (-M)^k v / k."""
    w, value, _ = run_all(PowerSeries(), 12)
    power = V
    for k in range(1, 13):
        power = -np.einsum("bij,bj->bi", M, power)
        np.testing.assert_allclose(w[k - 1], power, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(value[k - 1], -np.sum(V * power, -1) / k, rtol=1e-12, atol=1e-14)


@DTYPES
@pytest.mark.parametrize("steps", [None, 3])
def test_no_step_is_worse_than_one_of_the_power_series(steps, dtype):
    """|r_{k+1}| <= |M r_k|, up to the rounding of r_k and squares that underflow; r is the residual of w."""
    w, _, states = run_all(MinimalResidual(steps), 40, dtype)
    r = states.r
    bound = norms(np.einsum("bij,kbj->kbi", M, r[:-1]))
    rounding = 8 * float(jnp.finfo(dtype).eps)
    before = norms(np.concatenate([r[:1], r[:-2]]))
    assert np.all(norms(r[1:]) <= bound + rounding * before + 10 * float(jnp.finfo(dtype).tiny) ** 0.5)
    solution = V + np.cumsum(w, axis=0) - r[1:]
    residual = V - solution - np.einsum("bij,kbj->kbi", M, solution)
    np.testing.assert_allclose(residual, r[1:], atol=300 * rounding)


@DTYPES
@pytest.mark.parametrize("steps", [None, 2])
def test_sums_are_those_of_scipy(steps, dtype):
    """All terms of w add up to (I + M)^-1 v, of the value to v^T log(I + M) v: to 1e-10, 1e-4 in float32."""
    w, value, _ = run_all(MinimalResidual(steps), 1500, dtype)
    assert np.all(np.isfinite(w)) and np.all(np.isfinite(value))
    expected_w, expected_value = solutions()
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-4
    size = 1 + np.abs(expected_value)
    for n, name in enumerate(NAMES):
        np.testing.assert_allclose(
            V[n] + w.sum(axis=0)[n], expected_w[n], atol=tolerance * (1 + norms(expected_w[n])), err_msg=name
        )
        np.testing.assert_allclose(value.sum(axis=0)[n], expected_value[n], atol=tolerance * size[n], err_msg=name)


@pytest.mark.parametrize(
    ("name", "factor"), [("nonsymmetric", 5), ("nonsymmetric, near one", 5), ("rotation", 20), ("skew", 10)]
)
def test_far_fewer_terms_than_the_power_series(name, factor):
    """Where it cannot end either, the residual after ten terms is that many times smaller."""
    minimal, power = (run_all(series, 10)[2] for series in (MinimalResidual(), PowerSeries()))
    n = NAMES.index(name)
    assert norms(power[-1, n]) > factor * norms(minimal.r[-1, n]) > 0


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("zero", 0),
        ("identity", 1),
        ("symmetric of rank one", 2),
        ("spectrum of +-0.98", 2),
        ("three eigenvalues", 3),
        ("symmetric", DIM),
        ("spectrum from -0.98 to 0.98", DIM),
    ],
)
def test_done_after_as_many_products_as_eigenvalues(name, products):
    """For symmetric M with d eigenvalues d terms are the whole series, to 1e-10; for M = 0 every term is zero."""
    n = NAMES.index(name)
    w, value = (term[:, n] for term in run_all(MinimalResidual(), 40)[:2])
    expected, start = [solution[n] for solution in solutions()], V[n]
    np.testing.assert_allclose(start + w[:products].sum(axis=0), expected[0], atol=1e-10 * (1 + norms(expected[0])))
    np.testing.assert_allclose(value[:products].sum(), expected[1], atol=1e-10 * (1 + abs(expected[1])))
    np.testing.assert_allclose(w[products:], 0, atol=1e-10 * (1 + norms(expected[0])))
    if name == "zero":
        assert np.all(w == 0) and np.all(value == 0)


@pytest.mark.parametrize("steps", [1, 4])
def test_after_its_steps_it_is_the_power_series(steps):
    """The first m residuals are those without an end, and r_{m+j} = (-M)^j r_m, the terms of w alike."""
    w, _, states = run_all(MinimalResidual(steps), 12)
    free = run_all(MinimalResidual(), 12)[2]
    np.testing.assert_allclose(states.r[: steps + 1], free.r[: steps + 1], rtol=1e-13, atol=1e-14)
    power = states.r[steps]
    for j in range(1, 12 - steps):
        power = -np.einsum("bij,bj->bi", M, power)
        np.testing.assert_allclose(states.r[steps + j], power, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(w[steps + j - 1], power, rtol=1e-10, atol=1e-14)


def test_no_steps_are_the_power_series():
    """MinimalResidual(0) has the terms of PowerSeries: of w to rounding, of the value to the quadrature, 1e-10."""
    (w, value, _), (power_w, power_value, _) = (run_all(series, 30) for series in (MinimalResidual(0), PowerSeries()))
    np.testing.assert_allclose(w, power_w, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(value, power_value, atol=1e-10)


@DTYPES
@pytest.mark.parametrize("series", [PowerSeries(), MinimalResidual(), MinimalResidual(1)], ids=str)
def test_one_dimension(series, dtype):
    """D = 1: 1 / (1 + m) and log(1 + m), after one minimal-residual step."""
    m = np.array([-0.9, -0.3, 0.0, 0.4, 0.9]).reshape(-1, 1, 1)
    w, value, _ = run(series, jnp.asarray(m, dtype), jnp.ones((5, 1), dtype), 300 if series == PowerSeries() else 1)
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(1 + w.sum(axis=0), 1 / (1 + m[:, 0]), rtol=tolerance)
    np.testing.assert_allclose(value.sum(axis=0), np.log1p(m[:, 0, 0]), rtol=tolerance, atol=tolerance)


def test_examples_are_independent_and_events_may_have_any_shape():
    """An example alone, as an event [2, 4], has the terms that it has in the batch."""
    w, value, _ = run_all(MinimalResidual(), 6)
    for n in (0, 6, 12):
        m = M[n].reshape(2, 4, 2, 4)
        v = V[n].reshape(1, 2, 4)
        state = MinimalResidual().start(v)
        for k in range(1, 7):
            state, term = MinimalResidual().step(k, v, state, lambda u, m=m: jnp.einsum("ijkl,bkl->bij", m, u))
            np.testing.assert_allclose(term.w.ravel(), w[k - 1, n], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(term.value[0], value[k - 1, n], rtol=1e-9, atol=1e-12)


def test_the_value_up_to_a_lipschitz_constant_of_0_999():
    """The quadrature holds for spectra from -0.999 to 0.999: v^T log(I + M) v to 1e-10, at both ends and between."""
    for spectrum in (np.full(DIM, -0.999), np.linspace(-0.999, 0.999, DIM)):
        _, values, _ = run(MinimalResidual(), np.diag(spectrum)[None], V[:1], 30)
        np.testing.assert_allclose(values.sum(axis=0), [V[0] ** 2 @ np.log1p(spectrum)], rtol=1e-10, atol=1e-10)
