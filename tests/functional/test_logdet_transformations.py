"""`residual` under jit, vmap and scan; integers in pytrees, arrays that g closes over, float32, both kinds of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.logdet import residual
from tests.functional.contractions import (
    dense_net,
)
from tests.functional.estimates import (
    PAPERS,
    estimate,
    flat_value_and_gradient,
    loss_of,
    net_named,
)


@pytest.mark.parametrize("estimator", [Exact(), PAPERS, Roulette(probes=2)], ids=str)
def test_jit_and_vmap(estimator):
    """jit = eager; vmap over batches with a key each = a loop over them; gradient included."""
    g, params, x = net_named("saturated")
    xs, keys = jnp.stack([x, 0.5 * x - 0.1]), jax.random.split(jax.random.key(0), 2)

    def run(x, key):
        return estimate((g, params, x), estimator, key)

    batched, one = jax.jit(jax.vmap(run))(xs, keys), jax.jit(run)
    for n in range(2):
        np.testing.assert_allclose(batched[n], one(xs[n], keys[n]), rtol=1e-12, atol=1e-12)
    eager = residual(g, params, x, key=keys[0], estimator=estimator)
    np.testing.assert_allclose(one(x, keys[0])[: len(x)], eager[1], rtol=1e-12)


@pytest.mark.parametrize("estimator", [Exact(), Roulette()], ids=str)
def test_scan_over_blocks(estimator):
    """A scan over stacked parameters = the chain of blocks in Python, gradient included."""
    g, params, x = dense_net(0.6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.7 * leaf, -0.9 * leaf]), params)
    keys = jax.random.split(jax.random.key(0), 3)

    def scanned(stacked, x):
        def block(x, inputs):
            return residual(g, inputs[0], x, key=inputs[1], estimator=estimator)

        y, log_dets = jax.lax.scan(block, x, (stacked, keys))
        return y, jnp.sum(log_dets, axis=0)

    def chained(stacked, x):
        total = 0.0
        for n in range(3):
            x, log_det = residual(
                g, jax.tree.map(lambda leaf, n=n: leaf[n], stacked), x, key=keys[n], estimator=estimator
            )
            total += log_det
        return x, total

    results = [jax.jit(lambda p, x, f=f: flat_value_and_gradient(g, p, x, f))(stacked, x) for f in (scanned, chained)]
    np.testing.assert_allclose(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("estimator", [Exact(), PAPERS, Roulette(), Truncated(3, gradient="autodiff")], ids=str)
def test_float32(estimator):
    """Dtypes are kept in value and gradient, and the float32 result is the float64 one to 1e-4 for the same draws."""
    wide, narrow = dense_net(0.6), dense_net(0.6, dtype=jnp.float32)
    narrow_result = jax.jit(lambda key: estimate(narrow, estimator, key))(jax.random.key(0))
    assert narrow_result.dtype == jnp.float32
    y, log_det = jax.eval_shape(lambda key: residual(*narrow, key=key, estimator=estimator), jax.random.key(0))
    assert y.dtype == log_det.dtype == jnp.float32
    wide_result = jax.jit(lambda key: estimate(wide, estimator, key))(jax.random.key(0))
    np.testing.assert_allclose(narrow_result, wide_result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", [Exact(), Roulette()], ids=str)
def test_integer_leaf_in_params(estimator):
    """A pytree may hold integers: the other gradients are unchanged, and the integer's is JAX's float0."""
    g, params, x = net_named("saturated")
    key = jax.random.key(0)

    def with_count(params, x):
        return g(params["net"], x) / params["count"]

    def loss(params, x):
        y, log_det = residual(with_count, params, x, key=key, estimator=estimator)
        return loss_of(g, params, x, log_det, y)

    gradient = jax.jit(jax.grad(loss, allow_int=True))({"net": params, "count": jnp.asarray(1)}, x)
    assert gradient["count"].dtype == jax.dtypes.float0
    expected = jax.jit(lambda: estimate(net_named("saturated"), estimator, key))()[len(x) : -x.size]
    np.testing.assert_allclose(ravel_pytree(gradient["net"])[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", [Exact(), Roulette(probes=2)], ids=str)
def test_closed_over_arrays(estimator):
    """The gradient in arrays that g closes over, floats and integers among them, is that in the same params."""
    g, params, x = net_named("saturated")
    key = jax.random.key(0)

    @jax.jit
    def gradient(params, x, count):
        def value(params, x):
            return residual(lambda _, x: g(params, x) / count, None, x, key=key, estimator=estimator)

        return flat_value_and_gradient(g, params, x, value)

    expected = jax.jit(lambda: estimate(net_named("saturated"), estimator, key))()
    np.testing.assert_allclose(gradient(params, x, jnp.asarray(1)), expected, rtol=1e-10, atol=1e-10)


def test_old_style_keys():
    """Keys that are arrays of words draw what typed keys of these words draw."""
    g, params, x = dense_net(0.6)
    old, typed = (residual(g, params, x, key=make(3), chunk_size=2)[1] for make in (jax.random.PRNGKey, jax.random.key))
    np.testing.assert_array_equal(old, typed)
