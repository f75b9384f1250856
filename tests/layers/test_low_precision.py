"""Layers of 16-bit parameters or data, whose bounds and statistics are computed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bounds_of_a_spline_with_narrow_bins(dtype):
    """They are those of the same knots in float32: positions in 16 bits may coincide."""
    layer = rf.Spline((1,), 32, 13.8)
    theta = (5 * jax.random.normal(jax.random.key(0), layer.theta.shape)).astype(dtype)
    layer.theta = nnx.Param(theta)
    found = layer.lipschitz_bounds()
    layer.theta = nnx.Param(theta.astype(jnp.float32))
    assert np.isfinite(found).all() and found == layer.lipschitz_bounds()


def test_statistics_of_more_numbers_than_float16_has():
    layer = rf.ActNorm((1,))
    nnx.update(layer, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), nnx.state(layer)))
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (128, 28, 28, 1), jnp.float16)
    y = layer.initialize(x)
    np.testing.assert_allclose(np.mean(y, dtype=np.float64), 0, atol=0.01)
    np.testing.assert_allclose(np.std(y, dtype=np.float64), 1, atol=0.01)


def test_a_stack_of_layers_that_promote_their_input():
    """float32 data and float64 parameters give float64, as in a chain of the same layers."""
    stack = rf.ResidualStack(lambda rngs: rf.Affine((2,)), 3, rngs=nnx.Rngs(0))
    stack.steps.log_scale[...] += 0.1
    x = jnp.ones((4, 2), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        found = *stack.forward(x), stack.inverse(x)
        chain = rf.Chain(stack.unstacked())
        expected = *chain.forward(x), chain.inverse(x)
    for leaf, other in zip(found, expected, strict=True):
        assert leaf.dtype == other.dtype == jnp.float64
        np.testing.assert_allclose(leaf, other, rtol=1e-12)
