"""conv2d: one bilinear map, whichever of its lowerings computes it; the linear maps built on it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.convolution import conv2d, conv2d_lax, conv2d_matmul, correlate_lax, correlate_matmul
from resflow_jax.functional.linear_maps import ConvMap, DenseMap

# input channels, output channels, kernel sides, height, width
CASES = [
    (2, 5, (3, 3), 4, 6),
    (5, 2, (3, 3), 6, 4),
    (3, 3, (1, 1), 5, 4),
    (4, 2, (1, 1), 3, 3),
    (2, 3, (5, 5), 6, 7),
    (3, 2, (1, 5), 4, 3),
    (2, 1, (5, 5), 1, 2),  # the kernel is larger than the image
]


def random_case(channels_in, channels_out, sides, height, width, batch=2):
    rng = np.random.default_rng(0)
    shapes = (
        (batch, height, width, channels_in),
        (*sides, channels_in, channels_out),
        (batch, height, width, channels_out),
    )
    return [jnp.asarray(rng.normal(size=s)) for s in shapes]


@pytest.mark.parametrize("case", CASES)
def test_lowerings_agree_to_second_order(case):
    """Both lowerings, and conv2d itself, have the same values, gradients and gradients of a jvp."""
    x, kernel, cotangent = random_case(*case)
    tangents = 0.5 * x + 1, jnp.cos(kernel)

    def derivatives(conv):
        def value_and_slope(x, kernel):
            return jax.jvp(lambda x, k: jnp.tanh(conv(x, k)), (x, kernel), tangents)

        @jax.jit
        def value_slope_and_gradients(x, kernel):
            primals, pullback = jax.vjp(value_and_slope, x, kernel)
            return primals, pullback((cotangent, 1 / (2 + cotangent)))

        return value_slope_and_gradients(x, kernel)

    expected = derivatives(conv2d_lax)
    for conv in (conv2d_matmul, conv2d):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), derivatives(conv), expected)


@pytest.mark.parametrize("sides", [(3, 5), (1, 1)])
def test_formula(sides):
    """out[b, i, j] = sum_{di, dj} x[b, i + di - kh//2, j + dj - kw//2] @ kernel[di, dj], zero outside."""
    x, kernel, _ = random_case(2, 3, sides, 4, 5)
    (kh, kw), (height, width) = sides, x.shape[1:3]
    expected = np.zeros((*x.shape[:3], 3))
    for i, j, di, dj in np.ndindex(height, width, kh, kw):
        row, column = i + di - kh // 2, j + dj - kw // 2
        if 0 <= row < height and 0 <= column < width:
            expected[:, i, j] += np.asarray(x)[:, row, column] @ np.asarray(kernel)[di, dj]
    for conv in (conv2d, conv2d_lax, conv2d_matmul):
        np.testing.assert_allclose(conv(x, kernel), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_vmap(in_axes):
    """vmap over images, over kernels and over both equals a loop, also for the gradient."""
    x, kernel, _ = random_case(2, 3, (3, 3), 4, 3)
    xs = jnp.stack([x, x + 1, x * x]) if in_axes[0] == 0 else x
    kernels = jnp.stack([kernel, kernel - 1, 2 * kernel]) if in_axes[1] == 0 else kernel

    def value_and_gradient(x, kernel):
        return jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(conv2d(x, k))), (0, 1))(x, kernel)

    result = jax.jit(jax.vmap(value_and_gradient, in_axes))(xs, kernels)
    one = jax.jit(value_and_gradient)
    for n in range(3):
        expected = one(xs[n] if in_axes[0] == 0 else x, kernels[n] if in_axes[1] == 0 else kernel)
        nth = jax.tree.map(lambda leaf, n=n: leaf[n], result)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), nth, expected)


@pytest.mark.parametrize(
    "linear_map",
    [DenseMap(5, 3), ConvMap((4, 5), 2, 4), ConvMap((4, 5), 4, 2), ConvMap((4, 5), 3, 2, 1), ConvMap((3, 6), 2, 3, 5)],
    ids=str,
)
def test_transpose_is_the_adjoint(linear_map):
    """<W v, u> = <v, W^T u>; rmatvec is JAX's own transpose; the batched call is matvec of every example."""
    rng = np.random.default_rng(0)
    shapes = linear_map.kernel_shape, linear_map.input_shape, linear_map.output_shape
    kernel, v, u = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)

    @jax.jit
    def products(kernel, v, u):
        (transposed,) = jax.linear_transpose(lambda v: linear_map.matvec(kernel, v), v)(u)
        return linear_map.matvec(kernel, v), linear_map.rmatvec(kernel, u), transposed

    w_v, wt_u, transposed = products(kernel, v, u)
    assert w_v.shape == linear_map.output_shape and wt_u.shape == linear_map.input_shape
    np.testing.assert_allclose(jnp.vdot(w_v, u), jnp.vdot(v, wt_u), rtol=1e-12)
    np.testing.assert_allclose(wt_u, transposed, rtol=1e-12, atol=1e-12)
    batch = jnp.stack([v, 2 * v])
    if isinstance(linear_map, ConvMap) and linear_map.kernel_size == 1:  # the same matrix at every pixel
        batch = jnp.broadcast_to(batch[:, None, None], (2, *linear_map.size, linear_map.channels_in))
    expected = jnp.broadcast_to(w_v, (*batch.shape[1:-1], w_v.shape[-1]))
    np.testing.assert_allclose(linear_map(kernel, batch)[1], 2 * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [(2, 3), (3, 2)])
def test_lowering_per_platform(channels):
    """No convolution in the CPU's program, gradient included; one in that of GPUs and TPUs."""
    x, kernel, _ = random_case(*channels, (3, 3), 4, 4)

    @jax.jit
    def loss_and_gradient(x, kernel):
        return jax.value_and_grad(lambda x, k: jnp.sum(conv2d(x, k) ** 2), (0, 1))(x, kernel)

    on_cpu = loss_and_gradient.trace(x, kernel).lower(lowering_platforms=("cpu",))
    assert "stablehlo.convolution" not in on_cpu.as_text() and "stablehlo.dot_general" in on_cpu.as_text()
    if jax.default_backend() == "cpu":
        compiled = jax.jit(conv2d).lower(x, kernel).compile().as_text()
        assert " convolution(" not in compiled and " dot(" in compiled
    for platform in ("cuda", "tpu"):
        exported = jax.export.export(loss_and_gradient, platforms=[platform])(x, kernel).mlir_module()
        assert exported.count("stablehlo.convolution") >= 3  # the value and two gradients
        assert "stablehlo.dot_general" not in exported


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lowering", [conv2d_matmul, conv2d_lax])
def test_bfloat16_products(case, lowering):
    """Every product, those of the derivatives included, has factors rounded to 8 bits and sums that are not."""
    x, kernel, cotangent = (array.astype(jnp.float32) for array in random_case(*case))

    def rounded(array):
        return array.astype(jnp.bfloat16).astype(jnp.float32)

    out, pullback = jax.vjp(lambda x, k: conv2d(x, k, matmul_dtype="bfloat16"), x, kernel)
    expected, exact = jax.vjp(conv2d, rounded(x), rounded(kernel))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lowering(x, kernel, matmul_dtype="bfloat16"), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(pullback(cotangent), exact(rounded(cotangent)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(out - conv2d(x, kernel)).max() > 1e-4


@pytest.mark.parametrize("sides", [(3, 3), (1, 1)])
@pytest.mark.parametrize("channels", [(2, 5), (5, 2)])
def test_both_lowerings_of_the_primitives(sides, channels):
    """The transposed convolution and the derivative in the kernel: on accelerators the same as on a CPU."""
    x, kernel, y = random_case(*channels, sides, 4, 6)
    for options in ({}, {"matmul_dtype": "bfloat16"}):
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if options else {"rtol": 1e-12, "atol": 1e-12}
        found, expected = (f(x, y, sides=sides, **options) for f in (correlate_matmul, correlate_lax))
        np.testing.assert_allclose(found, expected, **tolerance)
        found, expected = (f(y, kernel, reflected=True, **options) for f in (conv2d_matmul, conv2d_lax))
        np.testing.assert_allclose(found, expected, **tolerance)


def test_float32():
    """The dtype is kept on both paths."""
    x, kernel, _ = random_case(2, 3, (3, 3), 4, 4)
    assert conv2d(x.astype(jnp.float32), kernel.astype(jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "message"),
    [
        ((4, 4, 2), (3, 3, 2, 2), r"x: expected rank 4 .*\(4, 4, 2\)"),
        ((1, 4, 4, 2), (3, 3, 2), r"kernel: .*\(3, 3, 2\)"),
        ((1, 4, 4, 2), (2, 3, 2, 2), r"kernel: .*odd.*\(2, 3, 2, 2\)"),
        ((1, 4, 4, 2), (3, 4, 2, 2), r"kernel: .*odd.*\(3, 4, 2, 2\)"),
        ((1, 4, 4, 2), (3, 3, 5, 2), r"kernel: expected 2 input channels.*got 5"),
    ],
)
def test_bad_shapes(x_shape, kernel_shape, message):
    """Errors name the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        conv2d(jnp.zeros(x_shape), jnp.zeros(kernel_shape))


def test_bad_matmul_dtype():
    """None or bfloat16."""
    with pytest.raises(ValueError, match="matmul_dtype: expected one of None, bfloat16; got 'float16'"):
        conv2d(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2)), matmul_dtype="float16")
