"""Lipschitz layers of mixed and learned orders: their norms, whole or row by row, search, and rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.block_certificate import _rescale
from resflow_jax.layers.lipschitz import LipschitzLinear, learned_order, map_linears
from tests.functional.brute_force import brute_force_norm
from tests.functional.contractions import dense_matrix
from tests.layers.blocks import INF, spoil


def linear(domain, codomain, linear_map=None):
    layer = LipschitzLinear(linear_map or DenseMap(3, 4), 0.9, domain=domain, codomain=codomain, rngs=nnx.Rngs(0))
    layer.kernel[...] = 5 * layer.kernel[...]
    return layer


@pytest.mark.parametrize("orders", [(INF, 1.0), (1.0, 2.0), (2.0, INF), (1.5, 3.0), (3.0, 1.5), (2.0, 2.0)])
def test_search_finds_the_norm(orders):
    """From spoilt vectors to the norm of brute force; what is applied then has norm 0.9, and bias as it was."""
    layer = linear(*orders)
    spoil(layer)
    layer.search_norm()
    assert layer.update_norm(1e-10, None, 500).converged
    matrix = dense_matrix(layer.linear_map, layer.kernel[...])
    np.testing.assert_allclose(layer.norm(), brute_force_norm(matrix, *orders), rtol=1e-5)
    weights, bias = layer.weights()
    np.testing.assert_allclose(brute_force_norm(dense_matrix(layer.linear_map, weights), *orders), 0.9, rtol=1e-5)
    np.testing.assert_array_equal(bias, layer.bias[...])
    assert layer.orders() == orders


def test_search_starts_from_the_present_vector_too():
    """With one start the known maximiser is kept, where the first random start would end at 0.64 of the norm."""
    layer = linear(INF, 1.0)
    layer.kernel[...] = jax.random.normal(jax.random.key(2), (3, 4))
    layer.search_norm()
    u, v, norm = layer.u[...], layer.v[...], layer.norm()
    np.testing.assert_allclose(norm, brute_force_norm(np.asarray(layer.kernel[...]).T, INF, 1), rtol=1e-10)
    layer.search_norm(starts=1)
    np.testing.assert_allclose(layer.v[...], v, rtol=1e-12)
    np.testing.assert_allclose(layer.u[...], u, rtol=1e-12)
    np.testing.assert_allclose(layer.norm(), norm, rtol=1e-12)


@pytest.mark.parametrize("linear_map", [DenseMap(3, 4), ConvMap((2, 1), 2, 3)])
@pytest.mark.parametrize("orders", [(2.0, INF), (INF, INF), (1.0, 2.0)])
def test_rows_and_columns_are_limited_by_their_own_norms(orders, linear_map):
    """Those within 0.9 keep their bits, the others have exactly 0.9; the whole is then within it too.

    Rows are output channels, for norms to order inf, and columns input channels, for those from order 1.
    """
    layer = linear(*orders, linear_map)
    by_input = orders[0] == 1
    scales = jnp.asarray([1.0, 0.02]) if by_input else jnp.asarray([1.0, 0.02, 2.0, 0.01])
    channels = jnp.resize(scales, linear_map.kernel_shape[-2 if by_input else -1])
    layer.kernel[...] *= trailing(channels[:, None] if by_input else channels, layer.kernel[...])

    def norms(kernel):
        """The largest norm of every channel, from the dense matrix."""
        matrix = dense_matrix(linear_map, kernel)
        if by_input:
            return np.linalg.norm(matrix, orders[1], axis=0).reshape(-1, len(channels)).max(0)
        dual = {2.0: 2, INF: 1}[orders[0]]
        return np.linalg.norm(matrix, dual, axis=1).reshape(-1, len(channels)).max(0)

    kernel, weights = np.asarray(layer.kernel[...]), np.asarray(layer.weights()[0])
    before, after = norms(kernel), norms(weights)
    within = before <= 0.9
    assert within.any() and not within.all()
    axis = kernel.ndim - 2 if by_input else kernel.ndim - 1
    keep = np.flatnonzero(within)
    np.testing.assert_array_equal(np.take(weights, keep, axis), np.take(kernel, keep, axis))
    np.testing.assert_allclose(after[~within], 0.9, rtol=1e-12)
    np.testing.assert_allclose(after, np.minimum(before, 0.9), rtol=1e-12)
    norm = brute_force_norm(dense_matrix(linear_map, weights), *orders)
    assert 0.89 < norm <= 0.9 * (1 + 1e-12)
    np.testing.assert_allclose(layer.norm(), before.max(), rtol=1e-12)


@pytest.mark.parametrize("linear_map", [DenseMap(3, 4), ConvMap((2, 2), 2, 3, 1)])
def test_rescale(linear_map):
    """The applied kernel, times the factor, is the new one, and is applied as it stands."""
    layer = linear(2.0, 2.0, linear_map)
    layer.update_norm(1e-10, None, 500)
    applied = layer.weights()[0]
    _rescale(layer, applied, 0.5)
    np.testing.assert_allclose(layer.kernel[...], 0.5 * applied, rtol=1e-12)
    np.testing.assert_array_equal(layer.weights()[0], layer.kernel[...])


def test_learned_orders_of_a_stack():
    """Search and update run under vmap with an order a layer, and find each layer's own norm."""

    @nnx.vmap
    def make(rngs):
        return LipschitzLinear(DenseMap(3, 4), 0.9, domain=learned_order(), codomain=learned_order(), rngs=rngs)

    stack = make(nnx.Rngs(0).split(3))
    stack.domain[...] = jnp.asarray([-0.5, 0.0, 0.8])
    stack.codomain[...] = jnp.asarray([0.5, 0.3, -0.2])
    map_linears(stack, lambda layer: layer.search_norm())
    map_linears(stack, lambda layer: layer.update_norm(1e-10, None, 500))
    (norms,) = map_linears(stack, lambda layer: layer.norm())
    graphdef, state = nnx.split(stack)
    for n, norm in enumerate(norms):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], state))
        exact = brute_force_norm(dense_matrix(layer.linear_map, layer.kernel[...]), *layer.orders())
        np.testing.assert_allclose(norm, exact, rtol=1e-4)


def test_the_gradient_of_the_order_loss():
    """d |W v|_q / |v|_p in the raw orders at fixed v, by central differences; none in kernel, bias or vectors."""
    layer = linear(learned_order(), learned_order())
    layer.domain[...] += 0.4
    layer.codomain[...] -= 0.3
    layer.update_norm(1e-10, None, 500)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    gradient = jax.grad(lambda params: nnx.merge(graphdef, params, rest).order_loss())(params)
    matrix, v = dense_matrix(layer.linear_map, layer.kernel[...]), np.asarray(layer.v[...])

    def ratio(name, change):
        layer = nnx.merge(graphdef, params, rest, copy=True)
        getattr(layer, name)[...] += change
        p, q = layer.orders()
        return np.linalg.norm(matrix @ v, q) / np.linalg.norm(v, p)

    np.testing.assert_allclose(layer.order_loss(), ratio("domain", 0.0), rtol=1e-12)
    for name in ("domain", "codomain"):
        slope = (ratio(name, 1e-5) - ratio(name, -1e-5)) / 2e-5
        np.testing.assert_allclose(gradient[name][...], slope, rtol=1e-6)
    assert not gradient["kernel"][...].any() and not gradient["bias"][...].any()
