"""Lipschitz layers of mixed and learned orders: their norms, and what search and rescaling do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
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


@pytest.mark.parametrize("linear_map", [DenseMap(3, 4), ConvMap((2, 2), 2, 3, 1)])
def test_rescale(linear_map):
    """The applied kernel, times the factor, is the new one, and is applied as it stands."""
    layer = linear(2.0, 2.0, linear_map)
    layer.update_norm(1e-10, None, 500)
    applied = layer.weights()[0]
    layer.rescale(0.5)
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
