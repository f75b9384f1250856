"""`rf.residual` around networks of Flax Linen, of Equinox, and plain functions: value, log-det, gradient, inverse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.flatten_util import ravel_pytree

import resflow_jax as rf
from tests.functional.contractions import dense_log_det

COEFFICIENT = 0.9
X = jax.random.normal(jax.random.key(0), (3, 3))


def bounded(params):
    """Every matrix W as min(1, c / |W|_F) W: the Frobenius norm is no less than the largest singular value."""
    bound = lambda w: w * jnp.minimum(1, COEFFICIENT / jnp.sqrt(jnp.sum(w**2))) if w.ndim == 2 else w  # noqa: E731
    return jax.tree.map(bound, params)


def of_linen():
    network = linen.Sequential([linen.Dense(4, param_dtype=float), jnp.tanh, linen.Dense(3, param_dtype=float)])
    return network.apply, network.init(jax.random.key(1), X)


def of_equinox():
    eqx = pytest.importorskip("equinox", reason="comes with the extra flowjax")
    network = eqx.nn.MLP(3, 3, 4, depth=1, activation=jnp.tanh, key=jax.random.key(1))
    params, static = eqx.partition(network, eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


def of_functions():
    keys = jax.random.split(jax.random.key(1))
    params = [jax.random.normal(key, shape) for key, shape in zip(keys, [(3, 4), (4, 3)], strict=True)]
    return lambda params, x: jnp.tanh(x @ params[0]) @ params[1], params


@pytest.mark.parametrize("make", [of_linen, of_equinox, of_functions])
def test_a_network_as_g(make):
    """y, log-det and gradient by the exact estimator and dense Jacobians alike; the inverse gives x again."""
    g, params = make()
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: 2 * leaf, params))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def ours(flat):
        y, log_det = rf.residual(g, unravel(flat), X, estimator=rf.Exact(), prepare=bounded)
        return jnp.sum(log_det) + jnp.sum(y**2), (y, log_det)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def dense(flat):
        params = bounded(unravel(flat))
        y, log_det = X + g(params, X), dense_log_det(g, params, X)
        return jnp.sum(log_det) + jnp.sum(y**2), (y, log_det)

    (_, (y, log_det)), gradient = ours(flat)
    (_, (dense_y, dense_log_det_)), dense_gradient = dense(flat)
    np.testing.assert_allclose(y, dense_y, atol=1e-12)
    np.testing.assert_allclose(log_det, dense_log_det_, atol=1e-12)
    np.testing.assert_allclose(gradient, dense_gradient, atol=1e-10)
    x = rf.residual_inverse(g, bounded(unravel(flat)), y, solver=rf.FixedPoint(tolerance=1e-13))
    np.testing.assert_allclose(x, X, atol=1e-11)
    assert jnp.abs(log_det).max() > 0.1
