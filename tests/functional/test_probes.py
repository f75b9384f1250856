"""Probes: E[v v^T] = I for every law; orthogonal ones are at exact right angles and give exact traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.batch_axes import example_keys
from resflow_jax.functional.probes import PROBES, draw_seeds, make_probes
from tests.functional.contractions import z_scores

X = jnp.zeros((3, 2, 2))


def draws(probe, probes, keys, x=X, seed=0):
    """v of many keys: [keys, probes, B, D]."""
    run = jax.jit(
        jax.vmap(lambda key: make_probes(probe, probes, draw_seeds(probe, probes, example_keys(key, x), x), x))
    )
    v = np.asarray(run(jax.random.split(jax.random.key(seed), keys)))
    assert v.shape == (keys, probes * len(x), *x.shape[1:])
    return v.reshape(keys, probes, len(x), -1)


@pytest.mark.parametrize("probe", PROBES)
def test_second_moment_is_the_identity(probe):
    """E[v v^T] = I for every probe of every example: |z| < 4 over 20000 keys."""
    v = draws(probe, 2, 20_000)
    assert np.abs(z_scores(v[..., :, None] * v[..., None, :], np.eye(4))).max() < 4


@pytest.mark.parametrize("probe", PROBES)
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


@pytest.mark.parametrize("probe", PROBES)
def test_dtype_and_shape(probe):
    """v has the dtype and event shape of x, also for x of shape [B]."""
    for shape in [(3, 2, 2), (3,)]:
        x = jnp.zeros(shape, jnp.float32)
        v = make_probes(probe, 1, draw_seeds(probe, 1, jax.random.split(jax.random.key(0), 3), x), x)
        assert (v.shape, v.dtype) == (shape, jnp.float32)
    if probe == "orthogonal":
        np.testing.assert_allclose(np.abs(v), 1, rtol=1e-6)


def test_too_many_orthogonal_probes():
    """No more than dimensions."""
    with pytest.raises(ValueError, match=r"^probes: expected at most 4 orthogonal probes in 4 dimensions, got 5$"):
        make_probes("orthogonal", 5, jax.random.split(jax.random.key(0), 3), X)
