"""Bounds on spectral norms are never below the norm, and close to it: against dense matrices and LAPACK."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional import norm_bounds as certificate
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.norm_bounds import gram_iteration_bound, induced_norm_bound, spectral_norm_bound
from tests.functional.grids import convolution_matrix
from tests.functional.kernels import MAPS, matrix_of, norm, random_kernel, stencils, torus_bounds

CHANNELS = [(1, 1), (2, 3), (3, 2)]
SIZES = [(3, 3), (4, 7), (16, 3), (8, 8), (5, 9), (1, 6), (2, 9), (2, 2), (1, 1)]
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


def kernels(k, channels_in, channels_out):
    rng = np.random.default_rng(k + 10 * channels_in + channels_out)
    mixing = {
        name: s[:, :, None, None] * rng.normal(size=(channels_in, channels_out)) for name, s in stencils(k).items()
    }
    return mixing | {
        "random": rng.normal(size=(k, k, channels_in, channels_out)),
        "all ones": np.ones((k, k, channels_in, channels_out)),
    }


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
