"""Blocks of ordinary residual networks: values against convolutions of XLA, and when their inverse can be relied on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import resflow_jax as rf

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))


def scaled(block, factor):
    """The block with larger or smaller kernels, and with biases that are not zero."""
    for n, (kernel, bias) in enumerate(zip(block.branch.kernels, block.branch.biases, strict=True)):
        kernel[...] = factor * kernel[...]
        bias[...] = bias[...] + jnp.linspace(-0.1, 0.2, bias.size) * (n + 1)
    return block


def unconstrained(factor=1.0, **options):
    return scaled(rf.UnconstrainedBlock((4, 4, 2), 3, rngs=nnx.Rngs(0), **options), factor)


def strided(factor=1.0, channels=5, **options):
    return scaled(rf.StridedBlock((4, 4, 2), channels, 3, rngs=nnx.Rngs(0), **options), factor)


def conv(x, kernel, stride=1):
    ends = [(side // 2, side // 2) for side in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, (stride, stride), ends, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def branch(block, x, phi, preactivation, stride=1):
    """g(x) by convolutions with a stride."""
    for n, (kernel, bias) in enumerate(zip(block.branch.kernels, block.branch.biases, strict=True)):
        x = phi(x) if n or preactivation else x
        x = conv(x, kernel[...], 1 if n else stride) + np.asarray(bias[...]).reshape(1, 1, 1, -1)
    return x


@pytest.mark.parametrize(("activation", "preactivation"), [("elu", True), ("tanh", False)])
def test_values(activation, preactivation):
    """y = x + g(x) and y = S x + g(x), with strides of one and two."""
    phi = {"elu": jax.nn.elu, "tanh": jnp.tanh}[activation]
    options = {"activation": activation, "preactivation": preactivation}
    block = unconstrained(**options)
    np.testing.assert_allclose(block(X), X + branch(block, X, phi, preactivation), rtol=1e-10, atol=1e-12)
    for stride in (1, 2):
        block = strided(stride=stride, **options)
        shortcut = conv(X, block.shortcut[...][None, None], stride)
        y = block(X)
        np.testing.assert_allclose(y, shortcut + branch(block, X, phi, preactivation, stride), rtol=1e-10, atol=1e-12)
        assert y.shape[1:] == block.output_shape((4, 4, 2)) == (4 // stride, 4 // stride, 5)
        assert block.input_shape(y.shape[1:]) == (4, 4, 2)


def test_inverse_of_an_unconstrained_block():
    """With small kernels x comes back; with large ones the status or x is wrong."""
    block = unconstrained(0.3)
    x, status = block.inverse(block(X), return_status=True)
    assert status.converged.shape == (1, 3) and status.converged.all()
    np.testing.assert_allclose(x, X, atol=1e-9)
    block = scaled(block, 20 / 0.3)
    x, status = block.inverse(block(X), solver=rf.Anderson(max_iterations=50), return_status=True)
    assert not (np.asarray(status.converged[0]) & (np.abs(x - X).max(axis=(1, 2, 3)) < 1e-3)).any()


def test_inverse_in_float32():
    """To 1e-5 with small kernels."""
    with jax.enable_x64(False):
        block, x = unconstrained(0.3), X.astype(jnp.float32)
        back, status = block.inverse(block(x), return_status=True)
    assert back.dtype == jnp.float32 and status.converged.all()
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_inverse_of_a_strided_block():
    """Pixels that S keeps come back nearly with a small g, exactly if the others are zero or there are none."""
    block = strided(0.05)
    kept = jnp.zeros_like(X).at[:, ::2, ::2].set(X[:, ::2, ::2])
    x, status = block.inverse(block(kept), return_status=True)
    assert status.converged.shape == (1, 3) and status.converged.all()
    np.testing.assert_allclose(x, kept, atol=1e-10)
    x, status = block.inverse(block(X), return_status=True)
    assert not status.converged.any() and (status.residual_norm >= status.residual).all()
    np.testing.assert_allclose(x[:, ::2, ::2], X[:, ::2, ::2], atol=1e-2)
    assert not x[:, 1::2].any() and not x[:, :, 1::2].any()
    block = strided(0.3, stride=1)
    np.testing.assert_allclose(block.inverse(block(X)), X, atol=1e-10)


@pytest.mark.parametrize("make", [unconstrained, strided])
def test_certificate(make):
    """There is no bound; the text and the error say so."""
    certificate = rf.certify(rf.Flow(make()))
    assert not certificate.is_certified and certificate.bounds.tolist() == [np.inf]
    assert certificate.lipschitz == certificate.inverse_lipschitz == np.inf and not certificate.unproved
    assert "no contraction by the bound: block 0" in repr(certificate)
    assert "Lip(g) <= inf; Lip(f) <= inf" in repr(certificate.blocks[0])
    with pytest.raises(ValueError, match="bound below 1, got none for block 0"):
        certificate.require()
