"""The contraction of an invertible DenseNet against a transcription of the paper's equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.block_certificate import certify_contraction
from resflow_jax.layers.densenet import normalized_concatenation
from tests.layers.blocks import CONTRACTIONS, apply, make, numpy_activation, numpy_affine


@pytest.mark.parametrize("name", [name for name in CONTRACTIONS if "DenseNet" in name])
def test_the_equations_of_the_paper(name):
    """h_i = c [eta1 h_(i-1), eta2 phi(W_i h_(i-1) + b_i)], with softplus weights on the unit circle."""
    contraction, x = make(name)
    linears, h = list(contraction.linears), np.asarray(x)
    if "after" in name:
        h = numpy_affine(linears.pop(0), h)
    for linear, params, raw in zip(
        linears[:-1], contraction.activation_params, np.asarray(contraction.concatenation[...]), strict=True
    ):
        s1, s2 = np.log1p(np.exp(raw)) + 0.1
        new = numpy_activation(contraction.activation.name, numpy_affine(linear, h), float(params["beta"][...]))
        h = 0.9 * np.concatenate([s1 * h, s2 * new], axis=-1) / np.sqrt(s1**2 + s2**2)
    np.testing.assert_allclose(apply(contraction, x), numpy_affine(linears[-1], h), rtol=1e-7, atol=1e-9)


def test_weights_of_the_concatenation():
    """Positive, of unit length, equal at the start, the larger the raw one; the same from NumPy and from JAX."""
    raw = np.random.default_rng(0).normal(size=(50, 2), scale=20)
    eta = normalized_concatenation(raw)
    np.testing.assert_allclose(np.linalg.norm(eta, axis=1), 1, rtol=1e-12)
    assert (eta > 0).all() and ((eta[:, 0] > eta[:, 1]) == (raw[:, 0] > raw[:, 1])).all()
    np.testing.assert_allclose(normalized_concatenation(jnp.asarray(raw)), eta, rtol=1e-12)
    np.testing.assert_allclose(normalized_concatenation(np.ones(2)), 0.5**0.5, rtol=1e-12)


@pytest.mark.parametrize("slope", [0.3, 1.0])
def test_lipschitz_constant_of_a_concatenation(slope):
    """|[a x, b R x]| of an isometry R scaled by `slope` is exactly sqrt(a^2 + slope^2 b^2) |x|: the bound's formula."""
    contraction, _ = make("DenseNet after a layer")
    raw = np.asarray(contraction.concatenation[...])[0]
    a, b = 0.9 * normalized_concatenation(raw)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    exact = np.linalg.norm(np.concatenate([a * np.eye(3), b * slope * rotation]), 2)
    norm = slope / contraction.activation.lipschitz
    np.testing.assert_allclose(contraction.bound([0.7, norm, 0.6], (2.0,) * 4), 0.7 * exact * 0.6, rtol=1e-12)


def test_dense_layers_keep_their_promise():
    """With every norm at the coefficient the block's bound is below c^(number of layers), strictly."""
    contraction, _ = make("DenseNet")
    assert contraction.bound([0.9] * 3, (2.0,) * 4) < contraction.lipschitz == 0.9**3
    assert isinstance(contraction.linears[0].linear_map, DenseMap)
    assert isinstance(make("convolutional DenseNet")[0].linears[0].linear_map, ConvMap)


def test_a_steep_activation_keeps_the_promise():
    """A slope of two is taken from the dense layers' norms: |dg/dx| at 0, where the slope is two, and the bound."""
    two_tanh = rf.Activation("two_tanh", lambda params, x: 2 * jnp.tanh(x), slopes=(2.0,))
    contraction = rf.DenseNet(2, depth=3, growth=4, activation=two_tanh, rngs=nnx.Rngs(0))
    for linear in contraction.linears:
        linear.kernel[...] *= 4
        linear.bias[...] *= 0
        linear.update_norm()
    assert certify_contraction(contraction).bound <= contraction.lipschitz == 0.98**4
    jacobian = jax.jacobian(lambda x: contraction(x[None])[0])(jnp.zeros(2))
    assert np.linalg.norm(jacobian, 2) <= contraction.lipschitz
