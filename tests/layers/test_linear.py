"""The invertible linear layer; its inverse, log-det and Lipschitz bounds are checked in test_layers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.linear import InvertibleLinear


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_starts_as_an_orthogonal_matrix(dim):
    """W W^T = I, the log-det is zero, and the layer keeps lengths."""
    layer = InvertibleLinear(dim, rngs=nnx.Rngs(0))
    weight = layer.weight()
    np.testing.assert_allclose(weight @ weight.T, np.eye(dim), atol=1e-13)
    x = jax.random.normal(jax.random.key(0), (4, dim))
    y, log_det, diagnostics = layer.forward(x, return_diagnostics=True)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-12)
    np.testing.assert_allclose(log_det, 0, atol=1e-12)
    assert diagnostics.length.shape == (0,)
    np.testing.assert_allclose(layer.lipschitz_bounds(), 1, rtol=1e-12)


def test_acts_on_the_last_axis():
    """y[b, h, w] = x[b, h, w] W at every pixel: the 1x1 convolution."""
    layer = InvertibleLinear(3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    expected = jax.lax.conv_general_dilated(
        x, layer.weight()[None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-13)


def test_learns_all_but_the_permutation_and_the_signs():
    """The parameters are L, U and log_scale, dim^2 of them free; no step of theirs flips the sign of det W."""
    layer = InvertibleLinear(4, rngs=nnx.Rngs(0))
    params = nnx.state(layer, nnx.Param)
    assert set(params) == {"lower", "upper", "log_scale"}
    jacobian = jax.jacobian(lambda params: nnx.merge(nnx.graphdef(layer), params, rest).weight())
    _, _, rest = nnx.split(layer, nnx.Param, ...)
    columns = [np.asarray(leaf).reshape(16, -1) for leaf in jax.tree.leaves(jacobian(params))]
    assert np.linalg.matrix_rank(np.concatenate(columns, axis=1)) == 16
    sign = np.linalg.slogdet(layer.weight())[0]
    nnx.update(layer, jax.tree.map(lambda leaf: leaf - 3.0, params))
    assert np.linalg.slogdet(layer.weight())[0] == sign


@pytest.mark.parametrize("dim", [0, 2.5, None])
def test_rejects_dim(dim):
    """No matrix of that size."""
    with pytest.raises(ValueError, match="dim: expected an integer of at least 1, got"):
        InvertibleLinear(dim, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_events_of_lower_precision_come_back(dtype):
    """The map and its inverse promote x to the dtype of the parameters."""
    with jax.numpy_dtype_promotion("standard"):
        layer = InvertibleLinear(3, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (2, 3)).astype(dtype)
        y = layer(x)
        back = layer.inverse(y), layer.inverse(y.astype(dtype))
    assert y.dtype == back[0].dtype == back[1].dtype == "float64"
    np.testing.assert_allclose(back[0], x.astype("float64"), atol=1e-12)
    np.testing.assert_allclose(back[1], x.astype("float64"), atol=0.05)


@pytest.mark.parametrize("make", [lambda: InvertibleLinear(4, rngs=nnx.Rngs(0)), lambda: ActNorm((4,))])
def test_parameters_of_lower_precision(make):
    """With bfloat16 parameters, float32 events have the log-det of the same numbers in float32, and come back."""
    layer = make()
    layer.log_scale[...] += 0.13
    graphdef, state = nnx.split(layer)
    coarse = jax.tree.map(lambda leaf: leaf.astype("bfloat16") if leaf.dtype == "float64" else leaf, state)
    fine = jax.tree.map(lambda leaf: leaf.astype("float32") if leaf.dtype == "bfloat16" else leaf, coarse)
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 4), "float32")
    with jax.numpy_dtype_promotion("standard"):
        (y, log_det), (expected, wanted) = (nnx.merge(graphdef, part).forward(x) for part in (coarse, fine))
        back = nnx.merge(graphdef, coarse).inverse(y)
    assert y.dtype == log_det.dtype == back.dtype == "float32"
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(log_det, wanted, rtol=1e-6)
    np.testing.assert_allclose(back, x, atol=1e-5)
