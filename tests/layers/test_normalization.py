"""Normalising layers: their statistics. Inverse, log-det and Lipschitz bounds are checked in test_layers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.linear_maps import DenseMap
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.contraction import Layered
from resflow_jax.layers.normalization import MovingBatchNorm, MovingCentering, Normalization
from resflow_jax.layers.residual import ResidualBlock, ResidualStack

IMAGE = (4, 4, 2)


def batch(shape, seed=0):
    noise = jax.random.normal(jax.random.key(seed), (50, *shape))
    return 3 + 2 * noise * trailing(jnp.asarray([1.0, 5.0]), noise)


@pytest.mark.parametrize("shape", [(2,), IMAGE])
def test_initialize_takes_the_statistics_of_a_batch(shape):
    """Mean zero and variance v / (v + epsilon) for every channel (or feature)."""
    layer, x = MovingBatchNorm(shape, epsilon=0.5), batch(IMAGE)
    y = layer.initialize(x)
    axes = tuple(range(4 - len(shape)))
    variance = np.var(x, axes)
    np.testing.assert_allclose(jnp.mean(y, axes), 0, atol=1e-12)
    np.testing.assert_allclose(jnp.var(y, axes), variance / (variance + 0.5), rtol=1e-12)
    np.testing.assert_allclose(layer(x), y, rtol=1e-12)


def test_update_moves_statistics_by_decay():
    """new = (1 - decay) old + decay batch's, for mean and variance; the output is that of the updated layer."""
    layer, first, second = MovingBatchNorm((2,), decay=0.3), batch(IMAGE), batch(IMAGE, seed=1) ** 2
    layer.initialize(first)
    y = layer.update_statistics(second)
    axes = (0, 1, 2)
    mean = np.asarray(0.7 * np.mean(first, axes) + 0.3 * np.mean(second, axes))
    variance = 0.7 * np.var(first, axes) + 0.3 * np.var(second, axes)
    np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-12)
    np.testing.assert_allclose(layer.variance[...], variance, rtol=1e-12)
    np.testing.assert_allclose(y, (np.asarray(second) - mean) / np.sqrt(variance + 1e-4), rtol=1e-10)
    np.testing.assert_allclose(layer(second), y, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2,), IMAGE])
def test_centering_moves_its_mean(shape):
    """`initialize` takes a batch's mean, `update_statistics` the share `decay` of it; y = x - mean + bias."""
    layer, first, second = MovingCentering(shape, decay=0.3), batch(IMAGE), batch(IMAGE, seed=1) ** 2
    bias = np.linspace(-1, 1, layer.bias.size).reshape(shape)
    layer.bias[...] = jnp.asarray(bias)
    axes = tuple(range(4 - len(shape)))
    np.testing.assert_allclose(jnp.mean(layer.initialize(first), axes), bias, atol=1e-12)
    np.testing.assert_allclose(layer.mean[...], np.mean(first, axes), rtol=1e-12)
    y = layer.update_statistics(second)
    mean = np.asarray(0.7 * np.mean(first, axes) + 0.3 * np.mean(second, axes))
    np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-12)
    np.testing.assert_allclose(y, np.asarray(second) - mean + bias, rtol=1e-10)
    z, log_det, diagnostics = layer.forward(second, return_diagnostics=True)
    np.testing.assert_array_equal(z, y)
    np.testing.assert_array_equal(log_det, np.zeros(50))
    np.testing.assert_allclose(layer.inverse(y), second, rtol=1e-12, atol=1e-12)
    assert diagnostics.length.shape == (0,) and layer.lipschitz_bounds() == (1, 1)


def test_updates_converge_to_the_statistics_of_the_data():
    """After hundreds of updates the initial statistics have no effect."""
    layer, x = MovingBatchNorm((2,)), batch((2,))
    for _ in range(300):
        layer.update_statistics(x)
    np.testing.assert_allclose(layer.mean[...], jnp.mean(x, 0), rtol=1e-10)
    np.testing.assert_allclose(layer.variance[...], jnp.var(x, 0), rtol=1e-10)


def test_statistics_are_no_parameters_and_take_no_gradient():
    """dy/dx of an update is that of the updated layer with its statistics held."""
    layer, x = MovingBatchNorm((2,)), batch((2,))
    assert set(nnx.state(layer, nnx.Param)) == {"bias", "log_scale"}
    assert set(nnx.state(layer, nnx.BatchStat)) == {"mean", "variance"}
    graphdef, state = nnx.split(layer)
    gradient = jax.grad(lambda x: jnp.sum(nnx.merge(graphdef, state, copy=True).update_statistics(x) ** 2))(x)
    layer.update_statistics(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x), rtol=1e-12)


def test_no_gradient_flows_into_the_statistics():
    """Of a batch norm, for the whole state: its map, its log-det and its inverse."""
    layer = MovingBatchNorm((2,))
    layer.initialize(batch((2,)))
    graphdef, state = nnx.split(layer)

    def loss(state):
        layer = nnx.merge(graphdef, state)
        y, log_det = layer.forward(batch((2,), seed=1))
        return jnp.sum(y**2) + jnp.sum(log_det) + jnp.sum(layer.inverse(y) ** 3)

    gradient = jax.grad(loss)(state)
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(gradient[name][...], 0)
    assert np.all(gradient["log_scale"][...] != 0) and np.all(gradient["bias"][...] != 0)


def test_the_mean_of_a_centering_is_no_parameter_and_takes_no_gradient():
    """The bias alone is trained; an update is differentiated with the mean held, in which there is no gradient."""
    layer, x = MovingCentering((2,)), batch((2,))
    assert set(nnx.state(layer, nnx.Param)) == {"bias"}
    assert set(nnx.state(layer, nnx.BatchStat)) == {"mean"}
    graphdef, params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def loss(params, statistics, x):
        return jnp.sum(nnx.merge(graphdef, params, statistics, copy=True).update_statistics(x) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(params, statistics, x)
    y = layer.update_statistics(x)
    np.testing.assert_allclose(gradients[0]["bias"][...], 2 * jnp.sum(y, 0), rtol=1e-12)
    np.testing.assert_allclose(gradients[2], 2 * y, rtol=1e-12)
    # A mean that were not held would have the gradient -2 * 0.9 * sum(y).
    np.testing.assert_array_equal(gradients[1]["mean"][...], 0)


def test_chain_updates_in_sequence():
    """The second layer sees what the first, already updated, puts out; initialize does likewise."""
    first, second, x = MovingBatchNorm((2,), decay=0.5), MovingBatchNorm((2,), decay=0.5), batch((2,))
    Chain([first, Normalization([0.0, 0.0], [1.0, 2.0]), second]).update_statistics(x)
    np.testing.assert_allclose(second.mean[...], 0.5 * jnp.mean(first(x), 0) / jnp.asarray([1.0, 2.0]), rtol=1e-12)


@pytest.mark.parametrize("method", ["initialize", "update_statistics"])
def test_stack_updates_in_sequence(method):
    """A stack, under jit, does what its steps do one after the other, and changes statistics only.

    Those inside its contractions, which are centred, too.
    """

    def step(rngs):
        maps = [DenseMap(2, 4), DenseMap(4, 2)]
        g = Layered(maps, get_activation("elu"), 0.9, preactivation=False, centering=True, rngs=rngs)
        return Chain([ResidualBlock(g), MovingBatchNorm((2,))])

    stack, x = ResidualStack(step, 3, rngs=nnx.Rngs(0)), batch((2,))
    graphdef, stacked = nnx.split(stack.steps)
    expected, norms, centers = x, [], []
    for n in range(3):
        alone = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], stacked))
        expected = getattr(alone, method)(expected)
        norms.append(alone.bijectors[1])
        centers.append(alone.bijectors[0].contraction.centers)

    @jax.jit
    def update(state, x):
        stack_ = nnx.merge(nnx.graphdef(stack), state)
        return getattr(stack_, method)(x), nnx.state(stack_)

    y, state = update(nnx.state(stack), x)
    nnx.update(stack, state)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        stack.steps.bijectors[1].mean[...], [norm.mean[...] for norm in norms], rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(
        stack.steps.bijectors[1].variance[...], [norm.variance[...] for norm in norms], rtol=1e-12
    )
    for n, center in enumerate(stack.steps.bijectors[0].contraction.centers):
        means = np.asarray([center[n].mean[...] for center in centers])
        np.testing.assert_allclose(center.mean[...], means, rtol=1e-12, atol=1e-14)
        assert means.all(), "every mean has moved"
    np.testing.assert_array_equal(stack.steps.bijectors[0].contraction.linears[0].kernel[...], stacked_kernel(stacked))


def stacked_kernel(stacked):
    return stacked["bijectors"][0]["contraction"]["linears"][0]["kernel"][...]


def test_normalization_normalises():
    """By the data's own mean and deviation, to mean zero and unit variance; it holds no parameters."""
    x = batch(IMAGE)
    layer = Normalization(np.mean(x, (0, 1, 2)), np.std(x, (0, 1, 2)))
    y = layer(x)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(jnp.std(y, (0, 1, 2)), 1, rtol=1e-12)
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MovingBatchNorm((2,), decay=0.0), r"decay: expected a number in \(0, 1\), got 0.0"),
        (lambda: MovingBatchNorm((2,), epsilon=0.0), "epsilon: expected a positive number, got 0.0"),
        (lambda: MovingCentering((2,), decay=1.0), r"decay: expected a number in \(0, 1\), got 1.0"),
        (lambda: Normalization([np.nan], [1.0]), "mean: expected finite numbers, got"),
        (lambda: Normalization([0.0, 0.0], [1.0]), r"std: expected the shape \(2,\) of mean, got \(1,\)"),
        (lambda: Normalization([0.0, 0.0], [1.0, 0.0]), "std: expected positive finite numbers, got"),
    ],
)
def test_bad_input(make, message):
    """The error names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        make()
