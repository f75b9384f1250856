"""Convolutions: bilinear maps, whichever of the lowerings computes them, against sums over pixels and taps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.primitives.convolution import (
    conv2d,
    convolve,
    convolve_lax,
    convolve_matmul,
    correlate_lax,
    correlate_matmul,
    reflected_kernel,
)
from tests.functional.grids import reads

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

    expected = derivatives(convolve_lax)
    for conv in (convolve_matmul, conv2d):
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
    for conv in (conv2d, convolve_lax, convolve_matmul):
        np.testing.assert_allclose(conv(x, kernel), expected, rtol=1e-12, atol=1e-12)


# size, sides of the kernel: of one tap, within the grid, larger than it, and larger than three of it
GRIDS = [
    ((5,), (1,)),
    ((5,), (3,)),
    ((4,), (5,)),
    ((2,), (7,)),
    ((3, 4), (3, 3)),
    ((2, 3), (5, 5)),
    ((1, 3), (3, 1)),
    ((2, 3, 4), (3, 3, 3)),
    ((1, 2, 3), (5, 3, 1)),
]


@pytest.mark.parametrize("channels", [(1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("padding", ["zero", "periodic"])
@pytest.mark.parametrize(("size", "sides"), GRIDS, ids=str)
def test_every_derivative_is_a_sum_over_pixels_and_taps(size, sides, padding, channels):
    """Value, both gradients, and their slopes along another point, for more channels out than in and for fewer.

    Both lowerings of both primitives are such sums too, as is the transposed convolution.
    """
    taken = reads(size, sides, padding)
    channels_in, channels_out = channels
    rng = np.random.default_rng(0)
    shapes = (2, *size, channels_in), (*sides, channels_in, channels_out), (2, *size, channels_out)
    x, kernel, y = (rng.normal(size=shape) for shape in shapes)
    dx, dkernel = np.cos(x), np.sin(3 * kernel)

    @jax.jit
    def results(x, kernel, y, dx, dkernel):
        def gradients(x, kernel):
            return jax.vjp(partial(convolve, padding=padding), x, kernel)[1](y)

        first, slopes = jax.jvp(gradients, (x, kernel), (dx, dkernel))
        second = jax.vjp(gradients, x, kernel)[1]((dx, dkernel))
        values = [f(x, kernel, padding=padding) for f in (convolve, convolve_matmul, convolve_lax)]
        back = [f(y, kernel, padding=padding, reflected=True) for f in (convolve_matmul, convolve_lax)]
        kernels = [f(x, y, padding=padding, sides=sides) for f in (correlate_matmul, correlate_lax)]
        back += [first[0], convolve(y, reflected_kernel(kernel), padding=padding)]
        return values, back, [*kernels, first[1]], slopes, second

    def forward(x, kernel):
        taps, pixels = kernel.reshape(len(taken), channels_in, channels_out), x.reshape(2, -1, channels_in)
        return np.einsum("tij,bjc,tco->bio", taken, pixels, taps).reshape(y.shape)

    def backward(y, kernel):
        taps, pixels = kernel.reshape(len(taken), channels_in, channels_out), y.reshape(2, -1, channels_out)
        return np.einsum("tij,bio,tco->bjc", taken, pixels, taps).reshape(x.shape)

    def correlated(x, y):
        x, y = x.reshape(2, -1, channels_in), y.reshape(2, -1, channels_out)
        return np.einsum("tij,bjc,bio->tco", taken, x, y).reshape(kernel.shape)

    values, back, kernels, slopes, second = results(x, kernel, y, dx, dkernel)
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    for value in values:
        close(value, forward(x, kernel))
    for value in back:
        close(value, backward(y, kernel))
    for value in kernels:
        close(value, correlated(x, y))
    # the gradients (backward(y, kernel), correlated(x, y)) are linear in kernel and in x
    for found in (slopes, second):
        close(found[0], backward(y, dkernel))
        close(found[1], correlated(dx, y))


@pytest.mark.parametrize("size", [(4,), (2, 2, 3)], ids=str)
def test_vmap_on_any_grid(size):
    """vmap over x, over kernels and over both equals a loop, with periodic padding, gradients included."""
    rng = np.random.default_rng(0)
    sides = (3,) * len(size)
    xs, kernels = jnp.asarray(rng.normal(size=(3, 2, *size, 2))), jnp.asarray(rng.normal(size=(3, *sides, 2, 3)))

    def value_and_gradient(x, kernel):
        return jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(convolve(x, k, padding="periodic"))), (0, 1))(x, kernel)

    @jax.jit
    def all_of_them(xs, kernels):
        axes = {(0, 0): (xs, kernels), (0, None): (xs, kernels[0]), (None, 0): (xs[0], kernels)}
        mapped = [jax.vmap(value_and_gradient, pair)(*arguments) for pair, arguments in axes.items()]
        return mapped, jax.lax.map(lambda xs: jax.lax.map(lambda k: value_and_gradient(xs, k), kernels), xs)

    mapped, one = all_of_them(xs, kernels)
    for n in range(3):
        for found, pair in zip(mapped, ((n, n), (n, 0), (0, n)), strict=True):
            expected = jax.tree.map(lambda leaf, pair=pair: leaf[pair], one)
            nth = jax.tree.map(lambda leaf, n=n: leaf[n], found)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), nth, expected)


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


@pytest.mark.parametrize(("size", "padding"), [((5,), "zero"), ((3, 4), "periodic"), ((2, 3, 2), "periodic")], ids=str)
def test_lowering_of_any_grid_per_platform(size, padding):
    """The same rule in one and three dimensions and with periodic padding."""
    x, kernel = jnp.ones((2, *size, 2)), jnp.ones((*(3 for _ in size), 2, 3))

    @jax.jit
    def loss_and_gradient(x, kernel):
        return jax.value_and_grad(lambda x, k: jnp.sum(convolve(x, k, padding=padding) ** 2), (0, 1))(x, kernel)

    on_cpu = loss_and_gradient.trace(x, kernel).lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" not in on_cpu and "stablehlo.dot_general" in on_cpu
    for platform in ("cuda", "tpu"):
        exported = jax.export.export(loss_and_gradient, platforms=[platform])(x, kernel).mlir_module()
        assert exported.count("stablehlo.convolution") >= 3 and "stablehlo.dot_general" not in exported


@pytest.mark.parametrize(("channels", "convolutions"), [((2, 18), 0), ((18, 2), 0), ((2, 17), 3), ((4, 4), 3)])
def test_a_gpu_takes_products_for_thin_sides(channels, convolutions):
    """If all taps of one side are no more channels than the other has; else value and gradients are convolutions."""
    x, kernel = jnp.ones((1, 4, 4, channels[0])), jnp.ones((3, 3, *channels))
    loss = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(conv2d(x, kernel) ** 2), (0, 1)))
    text = loss.trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_kernel_for_each_example_gives_products(platform):
    """vmap over kernels lowers to no grouped convolution on any platform."""
    x, kernels = jnp.ones((2, 1, 4, 4, 3)), jnp.ones((2, 3, 3, 3, 3))
    loss = jax.jit(jax.grad(lambda x, kernels: jnp.sum(jax.vmap(conv2d)(x, kernels) ** 2), (0, 1)))
    assert "stablehlo.convolution" not in loss.trace(x, kernels).lower(lowering_platforms=(platform,)).as_text()


def test_without_jit():
    """Eager calls under jax.disable_jit, and with a watch for leaked tracers."""
    x, kernel = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1))), jnp.ones((5, 1, 1))
    with jax.disable_jit(), jax.checking_leaks():
        found = convolve(x, kernel, padding="periodic")
    np.testing.assert_allclose(found[0, :, 0], [np.sum(x[0, (np.arange(5) + i - 2) % 3, 0]) for i in range(3)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lowering", [convolve_matmul, convolve_lax])
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
        found, expected = (f(y, kernel, reflected=True, **options) for f in (convolve_matmul, convolve_lax))
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


def test_periodic_bfloat16_products():
    """With periodic padding too the factors are rounded to 8 bits, and the sums are not."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 2), (3, 2, 3)))
    expected = convolve(*(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, kernel)), padding="periodic")
    for function in (convolve, convolve_lax, convolve_matmul):
        found = function(x, kernel, padding="periodic", matmul_dtype="bfloat16")
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "message"),
    [
        ((4, 2), (3, 2, 2), r"x: expected rank 3, 4 or 5 .*\(4, 2\)"),
        ((1, 2, 2, 2, 2, 1), (3, 3, 3, 3, 1, 1), r"x: expected rank 3, 4 or 5"),
        ((1, 4, 2), (3, 3, 2, 2), r"kernel: expected \[k, I, O\].*\(3, 3, 2, 2\)"),
        ((1, 2, 2, 2, 2), (3, 3, 2, 2, 2), r"kernel: .*odd kd, kh, kw.*\(3, 3, 2, 2, 2\)"),
        ((1, 4, 2), (3, 5, 2), r"kernel: expected 2 input channels.*got 5"),
    ],
)
def test_bad_shapes_of_any_grid(x_shape, kernel_shape, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        convolve(jnp.zeros(x_shape), jnp.zeros(kernel_shape))


def test_bad_padding():
    with pytest.raises(ValueError, match=r"^padding: expected one of zero, periodic; got 'SAME'"):
        convolve(jnp.zeros((1, 4, 2)), jnp.zeros((3, 2, 2)), padding="SAME")


def test_bad_matmul_dtype():
    """None or bfloat16."""
    with pytest.raises(ValueError, match="matmul_dtype: expected one of None, bfloat16; got 'float16'"):
        conv2d(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2)), matmul_dtype="float16")
