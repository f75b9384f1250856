"""The pixels that a convolution reads, by loops over pixels and taps: the reference of its formulas."""

import itertools
import math

import numpy as np


def reads(size, sides, padding="zero"):
    """[taps, pixels out, pixels in]: how often a tap carries the second pixel to the first; zero beyond the ends or
    with "periodic" padding the grid again.

    `padding` may also be the factors, one an axis, with which each turn around the grid multiplies what is read.
    """
    factors = {"zero": (0,) * len(size), "periodic": (1,) * len(size)}.get(padding, padding)
    found = np.zeros((*sides, *size, *size))
    for pixel, tap in itertools.product(np.ndindex(*size), np.ndindex(*sides)):
        weight, source = 1.0, []
        for i, t, n, k, factor in zip(pixel, tap, size, sides, factors, strict=True):
            turn, place = divmod(i + t - k // 2, n)
            weight *= factor ** abs(turn)
            source.append(place)
        found[(*tap, *pixel, *source)] += weight
    return found.reshape(math.prod(sides), math.prod(size), math.prod(size))


def convolution_matrix(kernel, size, padding="zero"):
    """The matrix [pixels * O, pixels * I] of the convolution with kernel [*sides, I, O]."""
    *sides, channels_in, channels_out = kernel.shape
    taps = np.asarray(kernel).reshape(-1, channels_in, channels_out)
    matrix = np.einsum("tij,tco->iojc", reads(size, sides, padding), taps)
    return matrix.reshape(math.prod(size) * channels_out, -1)
