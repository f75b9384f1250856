"""Bounds on operator norms are never below the norm, and close to it: against dense matrices, LAPACK, brute force."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional import norm_bounds as certificate
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.norm_bounds import gram_iteration_bound, induced_norm_bound, spectral_norm_bound
from tests.functional.grids import convolution_matrix

CHANNELS = [(1, 1), (2, 3), (3, 2)]
SIZES = [(3, 3), (4, 7), (16, 3), (8, 8), (5, 9), (1, 6), (2, 9), (2, 2), (1, 1)]
MAPS = [
    DenseMap(7, 4),
    DenseMap(3, 6),
    ConvMap((5, 4), 2, 3),
    ConvMap((2, 6), 3, 2, 5),
    ConvMap((2, 3), 3, 2, 1),
    ConvMap((6,), 2, 3, 5),
    ConvMap((3, 2, 4), 2, 1),
    ConvMap((5, 4), 2, 3, padding="periodic"),
    ConvMap((2, 3), 3, 2, (5, 3), padding="periodic"),
]
PERIODIC = [
    ((7,), (2, 3), 3),
    ((8,), (3, 2), 5),
    ((4,), (1, 2), 7),
    ((2,), (2, 2), 5),
    ((3, 4), (2, 3), 3),
    ((6, 5), (3, 2), (5, 1)),
    ((1, 4), (1, 1), 3),
    ((2, 3), (2, 1), 5),
    ((3, 3), (2, 3), 1),
    ((2, 3, 4), (2, 2), 3),
    ((4, 1, 3), (1, 2), (3, 3, 5)),
    ((2, 2, 2), (2, 1), 1),
]


def random_kernel(linear_map, seed=0):
    return np.random.default_rng(seed).normal(size=linear_map.kernel_shape)


def stencils(k):
    """One-channel kernels that are hard for a bound: smooth, high-pass, oscillating, lopsided, degenerate."""
    x = np.arange(k) - k // 2
    corner = np.zeros((k, k))
    corner[0, -1] = 1.0
    difference = np.zeros((k, k))
    difference[k // 2, [0, -1]] = -1.0, 1.0
    gauss = np.exp(-(x**2) / 2.0)
    return {
        "ones": np.ones((k, k)),
        "alternating": (-1.0) ** (x[:, None] + x),
        "wave": np.cos(1.1 * x[:, None] + 0.6 * x),
        "standing wave": np.cos(0.7 * x[:, None]) * np.cos(1.9 * x),
        "lopsided": np.exp(0.8 * x[:, None] - 0.4 * x),
        "corner tap": corner,
        "difference": difference,
        "two differences": np.outer(difference[k // 2], difference[k // 2]),
        "low-pass": gauss[:, None] * gauss + 0.02 * np.random.default_rng(1).normal(size=(k, k)),
    }


def kernels(k, channels_in, channels_out):
    rng = np.random.default_rng(k + 10 * channels_in + channels_out)
    mixing = {
        name: s[:, :, None, None] * rng.normal(size=(channels_in, channels_out)) for name, s in stencils(k).items()
    }
    return mixing | {
        "random": rng.normal(size=(k, k, channels_in, channels_out)),
        "all ones": np.ones((k, k, channels_in, channels_out)),
    }


def matrix_of(linear_map, kernel):
    """The matrix of the map on whole inputs, [elements out, elements in]."""
    if isinstance(linear_map, DenseMap):
        return kernel.T
    return convolution_matrix(kernel, linear_map.size, linear_map.padding)


def norm(matrix):
    return np.linalg.norm(matrix, 2)


def torus_bounds(linear_map, kernel):
    """The bounds of all tori, smallest torus first."""
    return np.sqrt(certificate._torus_gram_norms(*certificate._canonical(linear_map, kernel)))


@pytest.mark.parametrize("linear_map", MAPS, ids=str)
def test_matrices_of_these_tests(linear_map):
    """The matrices that the tests compare with are those of the maps, applied to basis inputs."""
    kernel = random_kernel(linear_map)
    matrix = matrix_of(linear_map, kernel)
    shape = (
        (linear_map.features_in,) if isinstance(linear_map, DenseMap) else (*linear_map.size, linear_map.channels_in)
    )
    basis = jnp.eye(matrix.shape[1]).reshape(-1, *shape)
    np.testing.assert_allclose(linear_map(jnp.asarray(kernel), basis).reshape(len(basis), -1).T, matrix, atol=1e-14)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_spectral_norm_of_small_convolutions(size, k):
    """Never below LAPACK's norm of the dense matrix and within 1e-7 of it; the torus bound alone never below."""
    for channels in CHANNELS:
        linear_map = ConvMap(size, *channels, k)
        for name, kernel in kernels(k, *channels).items():
            true, bound = norm(convolution_matrix(kernel, size)), spectral_norm_bound(linear_map, kernel)
            assert true <= bound <= (1 + 1e-7) * true, (name, channels, bound / true)
            assert true <= min(torus_bounds(linear_map, kernel)), (name, channels)


@pytest.mark.parametrize(("size", "channels", "k"), PERIODIC, ids=str)
def test_spectral_norm_of_periodic_convolutions(size, channels, k):
    """The norm of the dense matrix: not below it, and equal to ten digits, also for kernels larger than the grid."""
    conv = ConvMap(size, *channels, k, padding="periodic")
    for kernel in (
        random_kernel(conv),
        np.ones(conv.kernel_shape),
        random_kernel(conv) - random_kernel(conv, 1).mean(),
    ):
        true, bound = norm(convolution_matrix(kernel, size, "periodic")), spectral_norm_bound(conv, kernel)
        assert true * (1 - 1e-14) <= bound <= (1 + 1e-10) * true
    kernel = np.zeros(conv.kernel_shape)
    kernel[(*(side // 2 for side in conv.sides), 0, 0)] = 3.0
    np.testing.assert_allclose(spectral_norm_bound(conv, kernel), 3, rtol=1e-10)


def test_taps_that_cancel_on_a_periodic_grid():
    """On two pixels the taps (1, 0, -1) fall on one: the map is zero, and its bounds no more than rounding."""
    conv, kernel = ConvMap((2,), 1, 1, padding="periodic"), np.array([1.0, 0.0, -1.0]).reshape(3, 1, 1)
    for p, q in ((2, 2), (1, 1), (1, 3), (math.inf, math.inf), (3, 1.5)):
        assert 0 <= induced_norm_bound(conv, kernel, p, q) < 1e-6


@pytest.mark.parametrize(
    ("size", "k"), [((4,), 3), ((7,), 5), ((2,), 5), ((3, 2, 4), 3), ((1, 3, 2), 3), ((4, 3, 3), (3, 1, 3))], ids=str
)
def test_spectral_norm_in_one_and_three_dimensions(size, k):
    """Exact to 1e-7; no torus is ever below."""
    for channels in CHANNELS:
        conv = ConvMap(size, *channels, k)
        for kernel in (random_kernel(conv), np.ones(conv.kernel_shape)):
            true, bound = norm(convolution_matrix(kernel, size)), spectral_norm_bound(conv, kernel)
            assert true * (1 - 1e-14) <= bound <= (1 + 1e-7) * true
            assert np.all(true <= torus_bounds(conv, kernel))


@pytest.mark.parametrize(("size", "k", "excess"), [((30,), 3, 1e-3), ((40,), 5, 1e-3), ((7, 7, 6), 3, 0.1)], ids=str)
def test_torus_is_close_in_one_and_three_dimensions(size, k, excess, monkeypatch):
    """Beyond the exact sizes: one dimension within a thousandth, three within a tenth from 6 x 7 x 7 pixels."""
    conv = ConvMap(size, 1, 2, k)
    for kernel in (random_kernel(conv), np.ones(conv.kernel_shape)):
        true = spectral_norm_bound(conv, kernel)
        with monkeypatch.context() as patch:
            patch.setattr(certificate, "_EXACT_SIDE", 0)
            bound = spectral_norm_bound(conv, kernel)
        assert (1 - 1e-7) * true <= bound <= (1 + excess) * true


@pytest.mark.parametrize(
    ("size", "k", "excess"), [((8, 8), 3, 0.05), ((9, 16), 3, 0.03), ((16, 16), 3, 0.015), ((14, 14), 5, 0.05)], ids=str
)
def test_torus_is_close_on_images(size, k, excess, monkeypatch):
    """What is used beyond the exact sizes: 3x3 from 8x8 pixels, 5x5 from 14x14, at most 5 per cent above."""
    channels = (1, 2) if math.prod(size) > 144 else (2, 3)
    linear_map = ConvMap(size, *channels, k)
    for name, kernel in kernels(k, *channels).items():
        true = spectral_norm_bound(linear_map, kernel)
        with monkeypatch.context() as patch:
            patch.setattr(certificate, "_EXACT_SIDE", 0)
            bound = spectral_norm_bound(linear_map, kernel)
        assert (1 - 1e-7) * true <= bound <= (1 + excess) * true, (name, bound / true)


def test_beyond_the_exact_size():
    """A convolution of 1125 to 1350 elements takes the torus; a 1x1 kernel stays exact whatever the image."""
    conv = ConvMap((15, 15), 5, 6)
    kernel = random_kernel(conv)
    matrix = convolution_matrix(kernel, conv.size)
    true, bound = math.sqrt(np.linalg.eigvalsh(matrix.T @ matrix)[-1]), spectral_norm_bound(conv, kernel)
    assert (1 + 1e-5) * true <= bound <= 1.02 * true
    pointwise = ConvMap((64, 64), 6, 5, 1)
    kernel = random_kernel(pointwise)
    assert norm(kernel[0, 0]) <= spectral_norm_bound(pointwise, kernel) <= (1 + 1e-9) * norm(kernel[0, 0])


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("size", [(3, 5), (4, 3), (6,), (2, 2, 1)], ids=str)
def test_torus_bound_is_the_norm_on_a_torus(size, k):
    """The least norm of the convolutions on every torus, each axis periodic or antiperiodic, by dense matrices."""
    conv = ConvMap(size, 1, 2, k)
    kernel = random_kernel(conv)
    bounds = iter(torus_bounds(conv, kernel))
    kernel = certificate._reaching_taps(conv, kernel)
    sides = [range(n + p, n + 2 * p + 1) for n, p in zip(size, (side // 2 for side in kernel.shape), strict=False)]
    for torus in itertools.islice(itertools.product(*sides), 1 if len(size) == 3 else None):
        torus = tuple(1 if side == 1 else n for n, side in zip(torus, kernel.shape, strict=False))
        norms = [norm(convolution_matrix(kernel, torus, wrap)) for wrap in itertools.product((1, -1), repeat=len(size))]
        np.testing.assert_allclose(next(bounds), min(norms), rtol=1e-9)
        assert max(norms) > (1 + 1e-3) * min(norms)
    assert next(bounds, None) is None


@pytest.mark.parametrize("size", [(3, 5), (16, 8)], ids=str)
def test_torus_is_exact_for_ones(size):
    """The 3x3 kernel of ones has norm prod_n (1 + 2 cos(pi / (n + 1))), which an antiperiodic torus attains."""
    true = math.prod(1 + 2 * math.cos(math.pi / (n + 1)) for n in size)
    np.testing.assert_allclose(min(torus_bounds(ConvMap(size, 1, 1), np.ones((3, 3, 1, 1)))), true, rtol=1e-10)


def test_batches_of_frequencies(monkeypatch):
    """The bound does not depend on how many frequencies are worked on at a time."""
    conv = ConvMap((6, 7), 3, 4)
    kernel = random_kernel(conv)
    whole = torus_bounds(conv, kernel)
    for numbers in (1, 100, 1000, 10**5):
        monkeypatch.setattr(certificate, "_BATCH_NUMBERS", numbers)
        np.testing.assert_allclose(torus_bounds(conv, kernel), whole, rtol=1e-12)


@pytest.mark.parametrize("linear_map", MAPS, ids=str)
def test_scales(linear_map):
    """Homogeneous to the last bit under powers of two up to the ends of float64's range; zero for zero."""
    kernel = random_kernel(linear_map)
    bound = spectral_norm_bound(linear_map, kernel)
    mixed = induced_norm_bound(linear_map, kernel, 3, 1.5)
    for exponent in (-1000, -600, 600, 1000):
        assert spectral_norm_bound(linear_map, kernel * 2.0**exponent) == bound * 2.0**exponent
        assert induced_norm_bound(linear_map, kernel * 2.0**exponent, 3, 1.5) == mixed * 2.0**exponent
    assert spectral_norm_bound(linear_map, np.full(linear_map.kernel_shape, 1.7e308)) == math.inf
    for p, q in ((2, 2), (1, 3), (4, math.inf), (1.5, 1.7), (math.inf, 1)):
        assert induced_norm_bound(linear_map, 0 * kernel, p, q) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_low_precision_kernels(dtype):
    """The bound is that of exactly the given weights, computed in float64."""
    conv = MAPS[2]
    kernel = jnp.asarray(random_kernel(conv), dtype)
    true, bound = (
        norm(convolution_matrix(np.asarray(kernel).astype(np.float64), conv.size)),
        spectral_norm_bound(conv, kernel),
    )
    assert isinstance(bound, float) and true <= bound <= (1 + 1e-9) * true


def order_norm(x, order):
    """Norms of order p of the rows of x."""
    return np.linalg.norm(x, order, axis=1)


def searched_norm(matrix, p, q, starts=40, steps=60):
    """A lower bound of |A|_{p->q}, most often its value: the nonlinear power method (Boyd 1974) from random starts."""

    def dual(y, order):  # the unit vectors of the dual norm with <x, y> = |y|_order
        if math.isinf(order):
            return np.sign(y) * (np.abs(y) == np.abs(y).max(axis=1, keepdims=True))
        return np.sign(y) * (np.abs(y) / np.abs(y).max(axis=1, keepdims=True)) ** (order - 1)

    p_dual = math.inf if p == 1 else 1 / (1 - 1 / p)
    x = np.random.default_rng(0).normal(size=(starts, matrix.shape[1]))
    for _ in range(steps):
        x = dual(dual(x @ matrix.T, q) @ matrix, p_dual)
    return np.max(order_norm(x @ matrix.T, q) / order_norm(x, p))


def vertex_norm(matrix, q):
    """|A|_{inf->q}: a convex function is largest at a vertex of the cube."""
    vertices = np.array(list(itertools.product((1.0, -1.0), repeat=matrix.shape[1])))
    return order_norm(vertices @ matrix.T, q).max()


SMALL_MAPS = [
    DenseMap(6, 4),
    DenseMap(3, 8),
    ConvMap((2, 3), 1, 2),
    ConvMap((3, 2), 2, 1),
    ConvMap((2, 2), 2, 3, 1),
    ConvMap((1, 5), 2, 2, 5),
    ConvMap((5,), 1, 2),
    ConvMap((2, 2, 2), 1, 1),
    ConvMap((5,), 2, 1, padding="periodic"),
    ConvMap((2, 3), 1, 2, 5, padding="periodic"),
    ConvMap((2, 1, 3), 1, 1, padding="periodic"),
]
ORDERS = [1, 1.2, 1.5, 2, 3, 7, math.inf]


@pytest.mark.parametrize("linear_map", SMALL_MAPS, ids=str)
def test_induced_norms(linear_map):
    """Every pair of orders: not below a search; exact from l1 and to l-infinity; cubes by enumeration of vertices."""
    for seed in range(2):
        kernel = random_kernel(linear_map, seed) + 0.7 * seed
        matrix = matrix_of(linear_map, kernel)
        bound = partial(induced_norm_bound, linear_map, kernel)
        assert bound(2, 2) == pytest.approx(norm(matrix), rel=1e-9)
        for q in ORDERS:
            q_dual = math.inf if q == 1 else 1 / (1 - 1 / q)
            column, row = order_norm(matrix.T, q).max(), order_norm(matrix, q_dual).max()
            assert column * (1 - 1e-15) <= bound(1, q) <= (1 + 1e-11) * column
            assert row * (1 - 1e-15) <= bound(q, math.inf) <= (1 + 1e-11) * row
            assert vertex_norm(matrix, q) * (1 - 1e-14) <= bound(math.inf, q)
            assert vertex_norm(matrix.T, q_dual) * (1 - 1e-14) <= bound(q, 1)
        for p, q in itertools.product(ORDERS, ORDERS):
            found = searched_norm(matrix, p, q)
            assert found * (1 - 1e-13) <= bound(p, q), (p, q)
            assert bound(p, q) <= 3 * found, (p, q)


@pytest.mark.parametrize("linear_map", [DenseMap(5, 5), ConvMap((3, 4), 5, 5, 1)], ids=str)
def test_induced_norms_of_a_permutation(linear_map):
    """A permutation of n elements has norm 1 for p <= q and n^(1/q - 1/p) for p > q: the bounds are attained."""
    kernel = np.eye(5)[[2, 0, 1, 4, 3]].reshape(linear_map.kernel_shape)
    n = 5 if isinstance(linear_map, DenseMap) else 60
    for p, q in itertools.product(ORDERS, ORDERS):
        true = n ** max(1 / q - 1 / p, 0)
        assert induced_norm_bound(linear_map, kernel, p, q) == pytest.approx(true, rel=1e-9)


def test_columns_of_an_image_smaller_than_the_kernel():
    """On 2x2 pixels a column of a 5x5 kernel holds four taps, in one of four windows; the largest decides."""
    kernel = np.zeros((5, 5, 1, 1))
    kernel[1:4, 1:4, 0, 0] = [[1, 1, 5], [1, 4, 6], [1, 1, 1]]
    kernel[0, 0] = kernel[4, 2] = 100  # out of reach
    conv = ConvMap((2, 2), 1, 1, 5)
    assert induced_norm_bound(conv, kernel, 1, 1) == pytest.approx(16, rel=1e-12)
    assert induced_norm_bound(conv, kernel, math.inf, math.inf) == pytest.approx(16, rel=1e-12)
    assert induced_norm_bound(conv, kernel, 1, math.inf) == pytest.approx(6, rel=1e-12)


@partial(jax.jit, static_argnums=(0, 2))
def gram_bounds(linear_map, kernel, counts):
    return jnp.stack([gram_iteration_bound(linear_map, kernel, n) for n in counts])


@pytest.mark.parametrize("linear_map", MAPS, ids=str)
def test_gram_iteration(linear_map):
    """Not below the norm, non-increasing, within c^(1 / 2^(t+2)) of its limit: exact, or the norm on the torus."""
    kernel = random_kernel(linear_map)
    counts = (0, 1, 2, 3, 5, 7, 30)
    bounds = gram_bounds(linear_map, jnp.asarray(kernel), counts)
    limit = torus_bounds(linear_map, kernel)[0]
    true = norm(matrix_of(linear_map, kernel))
    assert limit >= true
    if isinstance(linear_map, DenseMap) or linear_map.padding == "periodic":
        np.testing.assert_allclose(limit, true, rtol=1e-10)
    assert np.all(np.diff(bounds) <= 1e-14 * limit)
    channels = min(linear_map.kernel_shape[-2:])
    guaranteed = np.array([channels ** (1 / 2 ** (n + 2)) for n in counts])
    assert np.all((1 - 1e-9) * limit <= bounds) and np.all(bounds <= (1 + 1e-9) * guaranteed * limit)
    np.testing.assert_allclose(bounds[-1], limit, rtol=1e-8)


@pytest.mark.parametrize("linear_map", [*MAPS[1:4], MAPS[7]], ids=str)
def test_gradient_of_gram_iteration(linear_map):
    """At convergence the gradient is that of the norm, u v^T for a matrix; before, that of the bound itself."""
    kernel, direction = jnp.asarray(random_kernel(linear_map)), random_kernel(linear_map, 1)
    for iterations, function in (
        (2, lambda k: gram_bounds(linear_map, k, (2,))[0]),
        (12, lambda k: torus_bounds(linear_map, np.asarray(k))[0]),
    ):
        gradient = jax.jit(jax.grad(partial(gram_iteration_bound, linear_map, iterations=iterations)))(kernel)
        slope = (function(kernel + 1e-5 * direction) - function(kernel - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-6)
        if isinstance(linear_map, DenseMap) and iterations == 12:
            u, _, vt = np.linalg.svd(kernel)
            np.testing.assert_allclose(gradient, np.outer(u[:, 0], vt[0]), atol=1e-7)


def test_gram_iteration_of_a_stack():
    """vmap gives every kernel what it gets alone, whatever the scales; the zero kernel has a finite gradient."""
    conv = MAPS[2]
    kernel = jnp.asarray(random_kernel(conv))
    stack = kernel[None] * jnp.asarray([1.0, 1e-150, 1e150, 0.0])[:, None, None, None, None]
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(partial(gram_iteration_bound, conv))))(stack)
    np.testing.assert_allclose(values, values[0] * np.array([1, 1e-150, 1e150, 0]), rtol=1e-12)
    np.testing.assert_allclose(
        gradients[1:3], np.broadcast_to(gradients[0], gradients[1:3].shape), rtol=1e-9, atol=1e-12
    )
    assert jnp.all(jnp.isfinite(gradients))


def test_gram_iteration_in_float32():
    """48 channels of an 8x8 scale in float32: the dtype is kept, the value that of float64; a filter with zeros too."""
    conv = ConvMap((8, 8), 48, 64)
    random = random_kernel(conv)
    difference = stencils(3)["difference"][:, :, None, None] * random[0, 0]
    for kernel in (random, difference, 1e-30 * random, 1e30 * random):
        value, gradient = _value_and_grad_32(conv, jnp.asarray(kernel, jnp.float32))
        assert value.dtype == gradient.dtype == jnp.float32 and jnp.all(jnp.isfinite(gradient))
        limit = torus_bounds(conv, kernel / np.abs(kernel).max())[0] * np.abs(kernel).max()
        assert (1 - 1e-5) * limit <= float(value) <= (1 + 1e-5) * 48 ** (1 / 2**9) * limit


@partial(jax.jit, static_argnums=0)
def _value_and_grad_32(linear_map, kernel):
    return jax.value_and_grad(partial(gram_iteration_bound, linear_map))(kernel)


@pytest.mark.parametrize("bound", [spectral_norm_bound, gram_iteration_bound], ids=lambda f: f.__name__)
def test_bad_kernels(bound):
    """A kernel has the map's shape and a float dtype; the error says what came."""
    with pytest.raises(ValueError, match=r"^kernel: expected a float array \(7, 4\), got \(4, 7\)"):
        bound(DenseMap(7, 4), np.zeros((4, 7)))
    with pytest.raises(ValueError, match=r"^kernel: expected a float array \(7, 4\), got int64"):
        bound(DenseMap(7, 4), np.zeros((7, 4), np.int64))
    with pytest.raises(ValueError, match=r"^kernel: expected a float array \(3, 3, 1, 1\), got \(2, 2, 1, 1\)"):
        bound(ConvMap((4, 4), 1, 1), np.zeros((2, 2, 1, 1)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_kernels_that_are_not_finite(value):
    """There is no bound where a weight is not a number."""
    kernel = np.zeros((3, 2))
    kernel[1, 1] = value
    with pytest.raises(ValueError, match=r"^kernel: expected finite weights"):
        spectral_norm_bound(DenseMap(3, 2), kernel)


@pytest.mark.parametrize("order", [0.9, math.nan, -math.inf, "2"])
def test_bad_orders(order):
    """Orders below 1 are no norms."""
    kernel = np.eye(2)
    with pytest.raises(ValueError, match=r"^domain: expected an order of at least 1"):
        induced_norm_bound(DenseMap(2, 2), kernel, order, 2)
    with pytest.raises(ValueError, match=r"^codomain: expected an order of at least 1"):
        induced_norm_bound(DenseMap(2, 2), kernel, 2, order)


def test_bad_iterations():
    with pytest.raises(ValueError, match=r"^iterations: expected"):
        gram_iteration_bound(DenseMap(2, 2), jnp.eye(2), iterations=-1)
