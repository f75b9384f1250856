"""Linear maps, kernels that are hard for a bound on their norm, and the dense matrices of both."""

import numpy as np

from resflow_jax.functional import norm_bounds as certificate
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from tests.functional.grids import convolution_matrix

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
