"""The monotone map in float32 against dense mathematics in float64, and its inverse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from tests.float32 import dense

PARAMS, X = dense.network()
WEIGHTS = np.arange(1.0, 4)


def half_way(params, x):
    """w with w + g(w) = sqrt(2) x in float64, by plain iteration."""
    w = x
    for _ in range(200):
        w = np.sqrt(2) * x - dense.dense_g(params, w)
    return w


def log_det(params, x):
    j = dense.jacobians(params, half_way(params, x))
    return np.linalg.slogdet(np.eye(x.shape[1]) - j)[1] - np.linalg.slogdet(np.eye(x.shape[1]) + j)[1]


def values(estimator, params, x, key=None):
    found = rf.monotone(dense.g, params, x, key=key, estimator=estimator)[1]
    assert found.dtype == jnp.float32
    return jnp.sum(jnp.asarray(WEIGHTS, jnp.float32) * found), found


def flat_estimate(estimator, params, x, key=None):
    """Log-dets and gradient as one vector."""
    (_, found), slopes = jax.value_and_grad(partial(values, estimator), (0, 1), has_aux=True)(params, x, key)
    return jnp.concatenate([found, *(leaf.ravel() for leaf in jax.tree.leaves(slopes))])


def expected():
    whole = dense.gradient(lambda params, x: WEIGHTS @ log_det(params, x), PARAMS, X)
    return np.concatenate([log_det(PARAMS, X), whole])


def test_exact_and_the_inverse():
    """Log-det and gradient, also through w, to the tolerance of the solve; x -> y -> x to 1e-5."""
    params, x = dense.single((PARAMS, X))
    found = jax.jit(partial(flat_estimate, rf.Exact()))(params, x)
    np.testing.assert_allclose(found, expected(), rtol=1e-4, atol=2e-5)
    y, _ = rf.monotone(dense.g, params, x, estimator=rf.Exact())
    np.testing.assert_allclose(y, np.sqrt(2) * half_way(PARAMS, X) - X, atol=1e-5)
    np.testing.assert_allclose(rf.monotone_inverse(dense.g, params, y), X, atol=1e-5)


@pytest.mark.parametrize("minres_steps", [None, 0])
def test_unbiased(minres_steps):
    """The mean over 4000 keys is within five standard errors, in every component."""
    params, x = dense.single((PARAMS, X))
    estimator = rf.Roulette(minres_steps=minres_steps)
    run = jax.jit(jax.vmap(lambda key: flat_estimate(estimator, params, x, key)))
    samples = np.asarray(run(jax.random.split(jax.random.key(0), 4000)), float)
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - expected()) < 5 * error + 1e-4)
