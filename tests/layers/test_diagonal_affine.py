"""Affine layers that depend on a condition, and permutations: values, Jacobians, bounds for every condition, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.moving import add_noise


@pytest.fixture(scope="module")
def layer():
    """Conditional, with parameters away from their start."""
    layer = rf.Affine((2, 2), condition_dim=3, rngs=nnx.Rngs(0))
    add_noise(layer, 0.3)
    return layer


@pytest.mark.parametrize("size", [1.0, -30.0])
def test_conditional(layer, size):
    """Values by NumPy from the weights, log-det of the dense Jacobian, inverse, singular values within the bounds."""
    x = jax.random.normal(jax.random.key(2), (4, 2, 2))
    c = size * jax.random.normal(jax.random.key(3), (4, 3))
    h = np.asarray(c) @ np.asarray(layer.network.hidden.kernel[...]) + np.asarray(layer.network.hidden.bias[...])
    out = (h / (1 + np.exp(-h))) @ np.asarray(layer.network.out[...])
    s = np.asarray(layer.log_scale[...]) + 4 * np.tanh(out[:, :4].reshape(4, 2, 2) / 4)
    t = np.asarray(layer.shift[...]) + out[:, 4:].reshape(4, 2, 2)
    y, log_det = layer.forward(x, condition=c)
    np.testing.assert_allclose(y, np.asarray(x) * np.exp(s) + t, rtol=1e-10)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x, c: layer(x[None], c[None])[0])))(x, c).reshape(4, 4, 4)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(layer.inverse(y, condition=c), x, atol=1e-9)
    forward, inverse = layer.lipschitz_bounds()
    singular_values = np.linalg.svd(jacobians, compute_uv=False)
    assert singular_values.max() <= forward and 1 / singular_values.min() <= inverse < np.inf
    # One condition for all examples.
    np.testing.assert_allclose(layer.forward(x, condition=c[0])[0][0], y[0], rtol=1e-12)


def test_gradient_in_the_condition(layer):
    """The gradient in c equals finite differences."""
    x, c = jax.random.normal(jax.random.key(2), (1, 2, 2)), jax.random.normal(jax.random.key(3), (1, 3))

    @jax.jit
    def function(c):
        y, log_det = layer.forward(x, condition=c)
        return y.sum() + 2 * log_det[0]

    gradient = jax.grad(function)(c)
    for n in range(3):
        step = 1e-6 * jnp.eye(3)[n][None]
        expected = (function(c + step) - function(c - step)) / 2e-6
        np.testing.assert_allclose(gradient[0, n], expected, rtol=1e-6)


def test_affine_starts_as_the_identity():
    x = jax.random.normal(jax.random.key(2), (4, 3))
    for layer, c in ((rf.Affine((3,)), None), (rf.Affine((3,), condition_dim=2, rngs=nnx.Rngs(0)), jnp.ones((4, 2)))):
        y, log_det = layer.forward(x, condition=c)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(log_det, 0)


def test_permutation_orders_elements():
    """y[i] = x[order[i]] along its axis, counted from either end of the event."""
    x = jnp.arange(24.0).reshape(2, 3, 2, 2)
    order = [2, 0, 1]
    for axis in (0, -3):
        layer = rf.Permutation(np.asarray(order), axis)
        y = layer(x)
        for i, j in enumerate(order):
            np.testing.assert_array_equal(y[:, i], x[:, j])
        np.testing.assert_array_equal(layer.inverse(y), x)
        assert (layer.order, layer.axis) == ((2, 0, 1), axis)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rf.Permutation([0, 2]), r"order: expected every index from 0 to 1 once, got \[0, 2\]"),
        (lambda: rf.Permutation([1, 1, 0]), r"order: expected every index from 0 to 2 once"),
        (lambda: rf.Permutation([-1, 0]), r"order: expected every index from 0 to 1 once, got \[-1, 0\]"),
        (lambda: rf.Permutation([]), "order: expected the indices 0 to n - 1 in some order, got"),
        (lambda: rf.Permutation([0.0, 1.0]), "order: expected the indices 0 to n - 1 in some order, got"),
        (lambda: rf.Permutation(3), "order: expected the indices 0 to n - 1 in some order, got 3"),
        (lambda: rf.Permutation([1, 0], axis=1.5), "axis: expected an axis of the event, as -1, got 1.5"),
        (
            lambda: rf.Flow(rf.Permutation([1, 0]), rf.StandardNormal((3,))),
            r"expected events with 2 elements along axis -1, got events of shape \(3,\)",
        ),
        (
            lambda: rf.Flow(rf.Permutation([1, 0], axis=1), rf.StandardNormal((2,))),
            r"expected events with 2 elements along axis 1, got events of shape \(2,\)",
        ),
        (lambda: rf.Affine(3), r"event_shape: expected a tuple of sizes, such as \(3,\), got 3"),
        (lambda: rf.Affine((3,), condition_dim=2), "rngs: expected nnx.Rngs with condition_dim, got NoneType"),
        (lambda: rf.Flatten(3), r"shape: expected a tuple of sizes, such as \(3,\), got 3"),
        (lambda: rf.Reshape((2, 3), (7,)), r"new_shape: expected as many elements as \(2, 3\) has, got \(7,\)"),
        (lambda: rf.Reshape((2, 3), 6), r"new_shape: expected a tuple of sizes, such as \(3,\), got 6"),
        (lambda: rf.Squeeze((2, -2, 1)), "shape: expected an integer of at least 1, got -2"),
        (lambda: rf.Squeeze(4), r"shape: expected \(H, W, C\), got 4"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_condition():
    layer = rf.Affine((3,), condition_dim=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"condition: expected floats \[4, 2\].* got None"):
        layer.forward(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"condition: expected floats \[4, 2\].* got shape \(4, 3\)"):
        layer.inverse(jnp.ones((4, 3)), condition=jnp.ones((4, 3)))
