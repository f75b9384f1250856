"""Probes: E[v v^T] = I for every law; orthogonal and Hadamard ones are at exact right angles and give exact traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.batch_axes import batch_axes
from resflow_jax.functional.probes import PROBES, draw_seeds, make_probes, seed_keys
from tests.functional.contractions import z_scores

X = jnp.zeros((3, 2, 2))


def one_draw(probe, probes, key, x):
    """v of a batch: [probes * B, ...]."""
    return make_probes(probe, probes, draw_seeds(probe, probes, seed_keys(probe, probes, key, x)[1], x), x)


def draws(probe, probes, keys, x=X, seed=0):
    """v of many keys: [keys, probes, B, D]."""
    run = jax.jit(jax.vmap(lambda key: one_draw(probe, probes, key, x)))
    v = np.asarray(run(jax.random.split(jax.random.key(seed), keys)))
    assert v.shape == (keys, probes * len(x), *x.shape[1:])
    return v.reshape(keys, probes, len(x), -1)


@pytest.mark.parametrize("probe", PROBES)
def test_second_moment_is_the_identity(probe):
    """E[v v^T] = I for every probe of every example: |z| < 4 over 20000 keys."""
    v = draws(probe, 2, 20_000)
    assert np.abs(z_scores(v[..., :, None] * v[..., None, :], np.eye(4))).max() < 4


@pytest.mark.parametrize("probe", [probe for probe in PROBES if probe != "hadamard"])
def test_examples_are_independent(probe):
    """E (v^T v')^2 = D between examples, as for independent v and v'; for one probe as between two: |z| < 4."""
    v = draws(probe, 2, 20_000)
    for p in (0, 1):
        assert np.abs(z_scores(np.sum(v[:, 0, 0] * v[:, p, 1], axis=-1) ** 2, 4)).max() < 4


def test_the_law_of_rademacher_and_gaussian():
    """Entries are +-1; the fourth moment of a normal entry is three."""
    assert set(np.unique(draws("rademacher", 2, 10))) == {-1.0, 1.0}
    assert np.abs(z_scores(draws("gaussian", 2, 20_000) ** 4, 3)).max() < 4


@pytest.mark.parametrize("probes", [1, 3, 4])
def test_orthogonal_probes(probes):
    """V V^T = D I for the probes of an example, to rounding; of different examples they differ."""
    v = draws("orthogonal", probes, 50)
    gram = np.einsum("kpbi,kqbi->kbpq", v, v)
    np.testing.assert_allclose(gram, np.broadcast_to(4 * np.eye(probes), gram.shape), atol=1e-12)
    assert np.abs(v[:, :, 0] - v[:, :, 1]).max(axis=(1, 2)).min() > 1e-2
    assert np.abs(v[0] - v[1]).max() > 1e-2


def test_all_dimensions_give_the_exact_trace():
    """The mean of v v^T over D probes is the identity for every key: v^T A v averages to tr A."""
    v = draws("orthogonal", 4, 20)
    a = np.random.default_rng(0).normal(size=(4, 4))
    np.testing.assert_allclose(np.einsum("kpbi,ij,kpbj->kpb", v, a, v).mean(axis=1), np.trace(a), rtol=1e-12)


@pytest.mark.parametrize("number", [0, 2, 5])
def test_each_hadamard_probe_is_a_rademacher_probe(number):
    """All 16 vectors of signs in four dimensions are equally likely for each example: chi^2 below 38 (p = 0.001)."""
    v = draws("hadamard", 1, 16_000, jnp.zeros((6, 2, 2)))[:, 0, number]
    assert set(np.unique(v)) == {-1.0, 1.0}
    counts = np.bincount((v > 0) @ [1, 2, 4, 8], minlength=16)
    assert np.sum((counts - 1000) ** 2 / 1000) < 38


@pytest.mark.parametrize(
    ("event", "batch", "probes"), [((2, 2), 4, 1), ((2, 2), 8, 1), ((2, 2), 2, 2), ((3, 1, 5), 16, 2)]
)
def test_hadamard_probes_of_a_batch(event, batch, probes):
    """The mean of v v^T over examples and probes is the identity, for every key, if the number of probes is enough."""
    v = draws("hadamard", probes, 20, jnp.zeros((batch, *event))).reshape(20, -1, np.prod(event))
    gram = np.einsum("kni,knj->kij", v, v) / v.shape[1]
    np.testing.assert_array_equal(gram, np.broadcast_to(np.eye(v.shape[-1]), gram.shape))
    assert np.abs(v - v[:1]).max() == 2


def test_more_hadamard_probes_than_rows():
    """Later examples have new signs, independent of the first: E (v^T v')^2 = D, |z| < 4."""
    v = draws("hadamard", 1, 20_000, jnp.zeros((8, 2, 2)))[:, 0]
    assert np.abs(z_scores(np.sum(v[:, 1] * v[:, 5], axis=-1) ** 2, 4)).max() < 4
    assert np.abs(np.sum(v[:, 4] * v[:, 6], axis=-1)).max() == 0


def test_hadamard_probes_of_neighbours():
    """With fewer examples than dimensions, v_j v_k averages to zero for elements within two pixels, and not for all."""
    v = draws("hadamard", 1, 1, jnp.zeros((64, 12, 10, 1)))[0, 0]
    gram = np.abs(v.T @ v / 64).reshape(12, 10, 12, 10)
    assert set(np.unique(gram)) == {0.0, 1.0}
    rows, columns = np.arange(12), np.arange(10)
    near = np.abs(rows[:, None] - rows[None])[:, None, :, None] <= 2
    near = near & (np.abs(columns[:, None] - columns[None])[None, :, None, :] <= 2)
    assert gram[near].sum() == 120 and gram.sum() > 120


def test_hadamard_probes_of_a_divided_batch():
    """They depend on an example's number in the whole batch, also where the batch has more examples than rows."""
    x, key = jnp.zeros((8, 3)), jax.random.key(2)

    def part(x):
        with batch_axes("devices"):
            return one_draw("hadamard", 1, key, x)

    parts = jax.vmap(part, axis_name="devices")(x.reshape(4, 2, 3))
    np.testing.assert_array_equal(parts.reshape(8, 3), one_draw("hadamard", 1, key, x))


@pytest.mark.parametrize("probe", PROBES)
def test_dtype_and_shape(probe):
    """v has the dtype and event shape of x, also for x of shape [B]."""
    for shape in [(3, 2, 2), (3,)]:
        x = jnp.zeros(shape, jnp.float32)
        v = one_draw(probe, 1, jax.random.key(0), x)
        assert (v.shape, v.dtype) == (shape, jnp.float32)
    if probe == "orthogonal":
        np.testing.assert_allclose(np.abs(v), 1, rtol=1e-6)


def test_too_many_orthogonal_probes():
    """No more than dimensions."""
    with pytest.raises(ValueError, match=r"^probes: expected at most 4 orthogonal probes in 4 dimensions, got 5$"):
        make_probes("orthogonal", 5, jax.random.split(jax.random.key(0), 3), X)
