"""Bounds on norms between any two orders: never below a search, exact where a closed form is known, zero for zero."""

import itertools
import math
from functools import partial

import numpy as np
import pytest

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.norm_bounds import induced_norm_bound
from tests.functional.kernels import matrix_of, norm, random_kernel


def test_taps_that_cancel_on_a_periodic_grid():
    """On two pixels the taps (1, 0, -1) fall on one: the map is zero, and its bounds no more than rounding."""
    conv, kernel = ConvMap((2,), 1, 1, padding="periodic"), np.array([1.0, 0.0, -1.0]).reshape(3, 1, 1)
    for p, q in ((2, 2), (1, 1), (1, 3), (math.inf, math.inf), (3, 1.5)):
        assert 0 <= induced_norm_bound(conv, kernel, p, q) < 1e-6


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


@pytest.mark.parametrize("order", [0.9, math.nan, -math.inf, "2"])
def test_bad_orders(order):
    """Orders below 1 are no norms."""
    kernel = np.eye(2)
    with pytest.raises(ValueError, match=r"^domain: expected an order of at least 1"):
        induced_norm_bound(DenseMap(2, 2), kernel, order, 2)
    with pytest.raises(ValueError, match=r"^codomain: expected an order of at least 1"):
        induced_norm_bound(DenseMap(2, 2), kernel, 2, order)
