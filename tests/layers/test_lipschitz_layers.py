"""The public affine layers: their norms, what they are applied to, and the arguments that they keep."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.layers.lipschitz import LipschitzLinear
from tests.functional.grids import convolution_matrix


def conv(size, channels_in, channels_out, kernel_size=3, **options):
    return rf.LipschitzConv(size, channels_in, channels_out, kernel_size, rngs=nnx.Rngs(0), **options)


def applied_norm(layer):
    """The largest singular value of the map on the whole grid, by LAPACK."""
    return np.linalg.norm(convolution_matrix(layer.weights()[0], layer.size, layer.padding), 2)


LAPLACE = np.array([-1.0, 2.0, -1.0])
STENCILS = {  # name: (size, kernel [*sides, 1, 1], the norm with periodic padding)
    "ones": ((5,), np.ones(3), 3.0),
    "laplace": ((6,), LAPLACE, 4.0),
    "difference": ((8,), np.array([-1.0, 0.0, 1.0]), 2.0),
    "images": ((4, 6), np.outer(LAPLACE, LAPLACE), 16.0),
    "across": ((2, 8), np.outer([0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]), 2.0),
    "fields": ((2, 4, 2), np.multiply.outer(np.outer(LAPLACE, np.ones(3)), LAPLACE), 48.0),
}


@pytest.mark.parametrize("padding", ["zero", "periodic"])
@pytest.mark.parametrize("name", STENCILS)
def test_kernels_with_symmetry(name, padding):
    """From a constant v, which a periodic convolution never leaves, to the norm; what is applied then has 0.98."""
    size, stencil, norm = STENCILS[name]
    layer = conv(size, 1, 1, padding=padding)
    layer.kernel[...] = jnp.asarray(stencil)[..., None, None]
    layer.v[...] = jnp.ones(layer.v.shape)
    assert layer.update_norm(1e-12, 1e-7, 3000).converged
    exact = np.linalg.norm(convolution_matrix(layer.kernel[...], size, padding), 2)
    if padding == "periodic":
        np.testing.assert_allclose(exact, norm, rtol=1e-12)
    np.testing.assert_allclose(layer.norm(), exact, rtol=1e-9)
    np.testing.assert_allclose(applied_norm(layer), 0.98, rtol=1e-9)


@pytest.mark.parametrize(("size", "side"), [((6,), 3), ((3,), 5), ((3, 4), (3, 5)), ((2, 3, 2), 3)], ids=str)
def test_power_iteration_finds_the_norm_by_fourier_transform(size, side):
    """u^T W v is the largest singular value of the kernel's transform, which the certificate gives too."""
    layer = conv(size, 2, 3, side, padding="periodic")
    layer.kernel[...] = jnp.asarray(np.random.default_rng(0).normal(size=layer.kernel.shape))
    layer.update_norm(1e-13, 1e-7, 3000)
    kernel, axes = np.asarray(layer.kernel[...]), tuple(range(len(size)))
    taps = np.zeros((*size, 2, 3))
    for tap in np.ndindex(*kernel.shape[:-2]):
        taps[tuple(np.mod(tap, size))] += kernel[tap]
    exact = np.linalg.svd(np.fft.fftn(taps, axes=axes), compute_uv=False).max()
    np.testing.assert_allclose(layer.norm(), exact, rtol=1e-9)
    np.testing.assert_allclose(rf.spectral_norm_bound(layer.linear_map, kernel), exact, rtol=1e-10)
    np.testing.assert_allclose(applied_norm(layer), 0.98, rtol=1e-9)


@pytest.mark.parametrize("padding", ["zero", "periodic"])
@pytest.mark.parametrize("orders", [(2.0, math.inf), (1.0, 2.0)])
def test_other_orders(orders, padding):
    """Rows or columns of the matrix of what is applied are within the coefficient, and the largest has it."""
    layer = conv((2, 3), 2, 2, 5, coefficient=0.5, padding=padding, domain=orders[0], codomain=orders[1])
    layer.kernel[...] = 5 * layer.kernel[...]
    matrix = convolution_matrix(layer.weights()[0], (2, 3), padding)
    np.testing.assert_allclose(np.linalg.norm(matrix, 2, axis=1 if orders[0] == 2 else 0).max(), 0.5, rtol=1e-12)


def test_a_periodic_convolution_commutes_with_shifts():
    """The layer of a shifted field is the shifted layer of the field, with the bias in it."""
    layer = conv((3, 4), 2, 3, padding="periodic")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)))
    shifted = layer(jnp.roll(x, (1, 2), (1, 2)))
    np.testing.assert_allclose(shifted, jnp.roll(layer(x), (1, 2), (1, 2)), rtol=1e-12)
    assert np.abs(shifted - layer(x)).max() > 0.1


@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 3, 2)], ids=str)
def test_dense_on_leading_axes(leading):
    """Every vector of the last axis alone goes through W and gets the bias."""
    layer = rf.LipschitzDense(3, 2, 0.7, rngs=nnx.Rngs(0))
    layer.kernel[...] = 5 * layer.kernel[...]
    layer.update_norm(1e-13, 1e-7, 3000)
    x = np.random.default_rng(0).normal(size=(*leading, 3))
    kernel = np.asarray(layer.kernel[...])
    expected = x @ kernel * (0.7 / np.linalg.norm(kernel, 2)) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(jax.jit(nnx.merge(*nnx.split(layer)))(jnp.asarray(x)), expected, rtol=1e-9)


LAYERS = {
    "dense": (rf.LipschitzDense, {"features_in": 3, "features_out": 2}),
    "dense with all": (
        rf.LipschitzDense,
        {
            "features_in": 3,
            "features_out": 2,
            "coefficient": 0.5,
            "domain": 1.0,
            "codomain": 3.0,
            "matmul_dtype": "bfloat16",
        },
    ),
    "conv": (rf.LipschitzConv, {"size": (4,), "channels_in": 1, "channels_out": 2}),
    "conv with all": (
        rf.LipschitzConv,
        {
            "size": (2, 3),
            "channels_in": 1,
            "channels_out": 2,
            "kernel_size": (1, 5),
            "coefficient": 0.5,
            "padding": "periodic",
            "domain": 2.0,
            "codomain": math.inf,
            "matmul_dtype": "bfloat16",
        },
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_arguments_are_kept(name):
    """Each is an attribute of its name, hashable, from which the same layer is built again."""
    cls, arguments = LAYERS[name]
    layer = cls(**arguments, rngs=nnx.Rngs(0))
    assert isinstance(layer, LipschitzLinear)
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name not in ("self", "rngs")}
    kept = {argument: getattr(layer, argument) for argument in defaults}
    assert kept == {**defaults, **arguments} and isinstance(hash(tuple(kept.values())), int)
    again = cls(**kept, rngs=nnx.Rngs(0))
    assert nnx.graphdef(again) == nnx.graphdef(layer)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(layer))


def test_bad_arguments():
    """Errors in arguments of the map are raised by the map, those of the layer by the layer."""
    with pytest.raises(ValueError, match=r"^features_in: expected"):
        rf.LipschitzDense(0, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^coefficient: expected"):
        rf.LipschitzDense(3, 2, 1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^kernel_size: expected odd"):
        conv((4,), 1, 1, 2)
    with pytest.raises(ValueError, match=r"^padding: expected"):
        conv((4,), 1, 1, padding="wrap")
    with pytest.raises(ValueError, match=r"^x: expected \[B, 4, 1\], got shape \(2, 5, 1\)"):
        conv((4,), 1, 1)(jnp.zeros((2, 5, 1)))


def test_tabulate():
    """Flax's summary knows them as any layer, and leaves them as they were."""
    layer = conv((3,), 1, 2)
    x = jnp.ones((1, 3, 1))
    assert "LipschitzConv" in nnx.tabulate(layer, x)
    assert layer(x).shape == (1, 3, 2)
