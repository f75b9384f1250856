"""Fitted laws: the stated minimum, by brute force, and its properties for any input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from resflow_jax.functional.length_laws import Fitted, fit_lengths

K = np.arange(1, 9)
NORMS = {
    "geometric": 0.5**K,
    "slow": 0.9**K,
    "large": 5.0 * 0.8**K,
    "sudden end": np.array([0.4, 0.3, 1e-3, 1e-8, 0, 0, 0, 0]),
    "steps": np.array([0.5, 0.5, 0.1, 0.1, 0.1, 0.02, 0.02, 0.001]),
    "zero": np.zeros(8),
}


def fit(norms, **options):
    return fit_lengths(jnp.asarray(norms, float), **options)


def objective(norms, table, fixed_cost):
    return (1 + np.sum(norms / table)) * (fixed_cost + np.sum(table))


@pytest.mark.parametrize("fixed_cost", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("name", NORMS)
def test_minimum(name, fixed_cost):
    """The table minimises (1 + sum n_k / S_k) (cost + sum S_k) over share L^(k-1) <= S_k <= 1, as scipy finds it."""
    norms, floor = NORMS[name], 0.01 * 0.9 ** (K - 1)
    table = np.asarray(fit(norms, fixed_cost=fixed_cost, lipschitz=0.9).table)[: len(K)]
    found = scipy.optimize.minimize(  # convex in log S
        lambda log: np.log(objective(norms, np.exp(log), fixed_cost)),
        np.log(np.sqrt(floor)),
        bounds=[(low, 0.0) for low in np.log(floor)],
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
    )
    assert objective(norms, table, fixed_cost) <= np.exp(found.fun) * (1 + 1e-6)
    np.testing.assert_allclose(table, np.exp(found.x), rtol=1e-2)


def test_the_closed_form():
    """Where no bound is active, S_k = sqrt(fixed_cost * n_k)."""
    norms = 0.1 * 0.5**K
    for cost in (1.0, 4.0, 9.0):
        table = fit(norms, fixed_cost=cost, share=1e-6).table[: len(K)]
        np.testing.assert_allclose(table, np.sqrt(cost * norms), rtol=1e-9)


@pytest.mark.parametrize("lipschitz", [None, 0.5, 0.95])
@pytest.mark.parametrize("name", [*NORMS, "noise"])
def test_any_fit_is_a_law(name, lipschitz):
    """Survival does not increase, also if the norms are noise, and never falls below share L^(k-1)."""
    norms = NORMS.get(name, np.random.default_rng(0).normal(size=8))
    law = fit(norms, share=0.02, lipschitz=lipschitz)
    law.check()
    k = np.arange(1, 60)
    survival = np.asarray(law.survival(k))
    assert law.lipschitz == lipschitz
    assert np.all(np.diff(survival) <= 0)
    assert np.all(survival >= 0.02 * (lipschitz or 0.98) ** (k - 1) * (1 - 1e-12))
    if name == "zero":
        np.testing.assert_allclose(survival, 0.02 * (lipschitz or 0.98) ** (k - 1), rtol=1e-9)


def test_norms_that_increase_are_pooled():
    """A law cannot take term 2 more often than term 1: both count with their mean; a negative norm counts as zero."""
    noisy, pooled = [0.5, 0.2, 0.3, 0.1, -0.1, 0.2], [0.5, 0.25, 0.25, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(fit(noisy).table, fit(pooled).table, rtol=1e-12)


@pytest.mark.parametrize("norms", [[0.0145, 34.6, 1e-15, 0.0], [0.01, 0.02, 0.1, 0.2], [0.3, 0.05, 0.2, 0.01]])
def test_minimum_over_laws_where_norms_increase(norms):
    """No other law does better: scipy's minimum over ratios S_k / S_{k-1} in (0, 1]."""
    table = np.asarray(fit(norms, share=1e-6).table)
    found = scipy.optimize.minimize(
        lambda logs: np.log(objective(np.asarray(norms), np.exp(np.cumsum(logs)), 4.0)),
        np.full(4, -0.1),
        bounds=[(-8.0, 0.0)] * 4,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
    )
    assert objective(np.asarray(norms), table, 4.0) <= np.exp(found.fun) * (1 + 1e-5)


def test_more_cost_beside_the_terms_means_more_terms():
    """A higher fixed cost gives more terms; larger terms are cut less often."""
    tables = [np.asarray(fit(0.5**K, fixed_cost=cost).table) for cost in (1.0, 4.0, 16.0)]
    assert np.all(tables[0] <= tables[1]) and np.all(tables[1] <= tables[2])
    assert tables[2].sum() > tables[0].sum() + 0.1


def test_jit_and_blocks():
    """Under jit and with a row a block it is what it is for each row alone; float32 stays float32."""
    norms = jnp.asarray(np.stack([NORMS["geometric"], NORMS["slow"], NORMS["sudden end"]]))
    law = jax.jit(fit_lengths)(norms)
    assert isinstance(law, Fitted)
    assert law.table.shape[0] == 3
    law.check()
    for row, table in zip(norms, law.table, strict=True):
        np.testing.assert_allclose(table, fit(row).table, rtol=1e-12)
    narrow = fit_lengths(norms.astype(jnp.float32))
    assert narrow.table.dtype == jnp.float32
    np.testing.assert_allclose(narrow.table, law.table, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_widened(dtype):
    """Norms and tables in 16 bits give what they give in float32: no rounded sums, and draws below a table of one."""
    norms = jnp.asarray(NORMS["slow"], dtype)
    np.testing.assert_array_equal(fit_lengths(norms).table, fit_lengths(norms.astype(jnp.float32)).table)
    narrow = jnp.asarray([1.0, 0.5, 0.1], dtype)
    laws = Fitted(narrow, 0.5), Fitted(narrow.astype(jnp.float32), 0.5)
    lengths, expected = (law.sample(jax.random.key(0), (2000,)) for law in laws)
    np.testing.assert_array_equal(lengths, expected)
    assert lengths.min() == 1
    np.testing.assert_array_equal(*(law.survival(jnp.arange(9)) for law in laws))


@pytest.mark.parametrize(
    ("name", "norms", "options"),
    [
        ("term_norms", jnp.array(0.5), {}),
        ("term_norms", jnp.ones((2, 3, 4)), {}),
        ("term_norms", jnp.ones(3, int), {}),
        ("fixed_cost", jnp.ones(3), {"fixed_cost": 0.0}),
        ("fixed_cost", jnp.ones(3), {"fixed_cost": float("nan")}),
        ("share", jnp.ones(3), {"share": 0.0}),
        ("share", jnp.ones(3), {"share": 1.0}),
        ("lipschitz", jnp.ones(3), {"lipschitz": 1.0}),
    ],
)
def test_bad_input(name, norms, options):
    """The argument that is wrong is named."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        fit_lengths(norms, **options)


def test_a_fit_of_measured_norms_is_traced():
    """A law made under jit may be sampled there."""

    @jax.jit
    def lengths(norms, key):
        return fit_lengths(norms).sample(key, (5,))

    assert np.all(lengths(jnp.asarray(NORMS["slow"]), jax.random.key(0)) >= 0)


def test_examples_that_share_a_length():
    """batch_size weighs the norms: the error of a shared length does not average out."""
    norms = jnp.asarray([0.1, 0.02, 0.001])
    shared = fit_lengths(norms, batch_size=16).table
    np.testing.assert_allclose(shared, fit_lengths(16 * norms).table, rtol=1e-12)
    assert (shared > fit_lengths(norms).table).all()
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got 0"):
        fit_lengths(norms, batch_size=0)
