"""Value and gradient of the estimators against dense mathematics in float64, exactly or by statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from tests.float32 import dense

PARAMS, X = dense.network()
WEIGHTS = np.arange(1.0, 4)
PAPERS = rf.Roulette(rf.Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian")


def values(estimator, params, x, key=None, chunk_size=None):
    """The weighted sum of log-dets and the log-dets."""
    log_det = rf.residual(dense.g, params, x, key=key, estimator=estimator, chunk_size=chunk_size)[1]
    assert log_det.dtype == jnp.float32
    return jnp.sum(jnp.asarray(WEIGHTS, jnp.float32) * log_det), log_det


def flat_estimate(estimator, params, x, key=None, **options):
    """Log-dets and gradient as one vector."""
    (_, log_det), found = jax.value_and_grad(partial(values, estimator, **options), (0, 1), has_aux=True)(
        params, x, key
    )
    return jnp.concatenate([log_det, *(leaf.ravel() for leaf in jax.tree.leaves(found))])


def expected_of(function):
    """The same of a function of params and x, in float64."""
    whole = dense.gradient(lambda params, x: WEIGHTS @ function(params, x), PARAMS, X)
    return np.concatenate([function(PARAMS, X), whole])


def test_exact():
    """To rounding, eagerly and compiled."""
    expected = expected_of(dense.log_det)
    apply = partial(flat_estimate, rf.Exact())
    for function in (apply, jax.jit(apply)):
        np.testing.assert_allclose(function(*dense.single((PARAMS, X))), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:length. Poisson:RuntimeWarning")
@pytest.mark.parametrize(
    ("estimator", "function"),
    [
        (rf.Truncated(terms=3), partial(dense.series, terms=3)),
        (rf.Roulette(), dense.log_det),
        (PAPERS, dense.log_det),
    ],
    ids=["truncated", "default", "papers"],
)
def test_unbiased(estimator, function):
    """The mean over 8000 keys is within five standard errors of what it should be, in every component.

    The standard errors are small enough to tell a wrong term.
    """
    draw = jax.jit(jax.vmap(partial(flat_estimate, estimator), (None, None, 0)))
    keys = jax.random.split(jax.random.key(1), (8, 1000))
    draws = np.concatenate([np.asarray(draw(*dense.single((PARAMS, X)), part), np.float64) for part in keys])
    assert np.isfinite(draws).all()
    expected = expected_of(function)
    error = draws.std(axis=0, ddof=1) / len(draws) ** 0.5
    assert (np.abs(draws.mean(axis=0) - expected) <= 5 * error + 5e-6).all()
    assert error[:3].max() < 0.02
    assert np.median(error) < 0.03


def test_chunks():
    """A batch in chunks, the last of one example: as whole."""
    params, x = dense.single((PARAMS, X))
    apply = [jax.jit(partial(flat_estimate, rf.Roulette(exact_terms=1), chunk_size=size)) for size in (None, 2)]
    whole, parts = (function(params, x, jax.random.key(2)) for function in apply)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=2e-6)
