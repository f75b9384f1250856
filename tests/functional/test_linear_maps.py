"""Linear maps against the dense matrices that loops over pixels and taps make."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.linear_maps import ConvMap, DenseMap, folded_kernel
from tests.functional.contractions import dense_matrix
from tests.functional.grids import convolution_matrix

CONVS = [
    ConvMap((4, 5), 2, 4),
    ConvMap((4, 5), 4, 2),
    ConvMap((4, 5), 3, 2, 1),
    ConvMap((3, 6), 2, 3, 5),
    *(
        ConvMap(*arguments, padding=padding)
        for padding in ("zero", "periodic")
        for arguments in [
            ((5,), 2, 3),
            ((3,), 2, 1, 5),
            ((6,), 2, 3, 1),
            ((3, 4), 2, 3, (1, 3)),
            ((2, 2), 1, 2, 5),
            ((2, 3, 2), 2, 1),
            ((1, 2, 3), 1, 2, (3, 5, 1)),
            ((2, 1, 3), 3, 2, 1),
        ]
    ),
]


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


@pytest.mark.parametrize("linear_map", [DenseMap(5, 3), *CONVS], ids=str)
def test_transpose_is_the_adjoint(linear_map):
    """<W v, u> = <v, W^T u>; rmatvec is JAX's own transpose; the batched call is matvec of every example."""
    kernel, v, u = arrays(linear_map.kernel_shape, linear_map.input_shape, linear_map.output_shape)

    @jax.jit
    def products(kernel, v, u):
        (transposed,) = jax.linear_transpose(lambda v: linear_map.matvec(kernel, v), v)(u)
        return linear_map.matvec(kernel, v), linear_map.rmatvec(kernel, u), transposed

    w_v, wt_u, transposed = products(kernel, v, u)
    assert w_v.shape == linear_map.output_shape and wt_u.shape == linear_map.input_shape
    np.testing.assert_allclose(jnp.vdot(w_v, u), jnp.vdot(v, wt_u), rtol=1e-12)
    np.testing.assert_allclose(wt_u, transposed, rtol=1e-12, atol=1e-12)
    batch = jnp.stack([v, 2 * v])
    if linear_map.copies > 1:  # the same matrix at every pixel
        ones = [1] * len(linear_map.size)
        batch = jnp.broadcast_to(batch.reshape(2, *ones, -1), (2, *linear_map.size, linear_map.channels_in))
    expected = jnp.broadcast_to(w_v, (*batch.shape[1:-1], w_v.shape[-1]))
    assert expected.shape == linear_map.example_shape
    np.testing.assert_allclose(linear_map(kernel, batch)[1], 2 * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_matrices_of_convolutions(conv):
    """A convolution is its matrix by loops; one of a single tap holds that of a pixel `copies` times."""
    (kernel,) = arrays(conv.kernel_shape)
    matrix, pixels = dense_matrix(conv, kernel), math.prod(conv.size)
    assert conv.copies == (pixels if math.prod(conv.kernel_shape[:-2]) == 1 else 1)
    whole = np.kron(np.eye(conv.copies), matrix)
    np.testing.assert_allclose(whole, convolution_matrix(kernel, conv.size, conv.padding), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("side", "size"), [(3, 5), (3, 2), (5, 2), (7, 3), (3, 1)])
def test_folded_kernel(side, size):
    """Sums of the taps at equal places modulo the grid, for arrays of NumPy and of JAX."""
    (kernel,) = arrays((side, 3, 2, 1))
    expected = np.stack([np.asarray(kernel)[n::size].sum(0) for n in range(min(side, size))])
    folded = folded_kernel(np.asarray(kernel), (size, 4))
    assert isinstance(folded, np.ndarray)
    np.testing.assert_allclose(folded, expected, rtol=1e-14)
    np.testing.assert_allclose(folded_kernel(kernel, (size, 4)), expected, rtol=1e-14)


@pytest.mark.parametrize("matmul_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3, 2, 1, 2)], ids=str)
def test_dense_map_on_leading_axes(matmul_dtype, leading):
    """Every vector of the last axis alone is multiplied; gradients are those of the rows together."""
    dense = DenseMap(3, 2, matmul_dtype)
    x, kernel = (array.astype(jnp.float32) for array in arrays((*leading, 3), (3, 2)))
    y, pullback = jax.vjp(lambda kernel, x: dense(kernel, x), kernel, x)
    rows, pull_rows = jax.vjp(lambda kernel, x: dense(kernel, x), kernel, x.reshape(-1, 3))
    assert y.shape == (*leading, 2)
    np.testing.assert_allclose(y.reshape(-1, 2), rows, rtol=1e-6)
    if matmul_dtype is None:
        np.testing.assert_allclose(rows, np.asarray(x).reshape(-1, 3) @ np.asarray(kernel), rtol=1e-5, atol=1e-6)
    for found, expected in zip(pullback(jnp.sin(y)), pull_rows(jnp.sin(rows)), strict=True):
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": ()}, r"size: expected a tuple of one, two or three sides, got \(\)"),
        ({"size": (2, 2, 2, 2)}, r"size: expected a tuple of one, two or three sides"),
        ({"size": [4]}, r"size: expected a tuple of one, two or three sides, got \[4\]"),
        ({"kernel_size": 2}, r"kernel_size: expected odd sides, got 2"),
        ({"kernel_size": (3, 4)}, r"kernel_size: expected odd sides, got \(3, 4\)"),
        ({"kernel_size": (3,)}, r"kernel_size: expected a number or 2 of them.*\(4, 3\), got \(3,\)"),
        ({"kernel_size": (3, 0)}, r"kernel_size: expected"),
        ({"padding": "same"}, r"padding: expected one of zero, periodic; got 'same'"),
        ({"matmul_dtype": "int8"}, r"matmul_dtype: expected one of None, bfloat16; got 'int8'"),
    ],
)
def test_bad_convolutions(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ConvMap(**{"size": (4, 3), "channels_in": 1, "channels_out": 1, **changes})


def test_inputs_of_another_shape():
    """The norm is that of one grid: an input of another is refused."""
    conv, dense = ConvMap((4, 3), 2, 1), DenseMap(3, 2)
    for shape in ((1, 3, 4, 2), (4, 3, 2), (1, 4, 3, 1), (1, 4, 3, 2, 2)):
        with pytest.raises(ValueError, match=r"^x: expected \[B, 4, 3, 2\], got shape"):
            conv(jnp.zeros(conv.kernel_shape), jnp.zeros(shape))
    for shape in ((), (2, 4)):
        with pytest.raises(ValueError, match=r"^x: expected \[\.\.\., 3\], got shape"):
            dense(jnp.zeros(dense.kernel_shape), jnp.zeros(shape))
