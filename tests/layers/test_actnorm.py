"""ActNorm: its initialisation in any unit, what is trained, and that training is the same whatever the unit of x."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.batch_axes import standardization
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Constant
from resflow_jax.training.step import optax_promotion

SCALES = (1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e20, 1e37)


def data(dtype, number=500):
    """[number, 3] with means and deviations of (-3, 0, 5) and (1, 2, 0.1)."""
    x = np.random.default_rng(0).normal(size=(number, 3)) * [1.0, 2.0, 0.1] + [-3.0, 0.0, 5.0]
    return x.astype(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_initialisation_in_any_unit(dtype, scale):
    """Mean zero and unit variance; the log-det is that of the dense Jacobian; x is found again in its unit."""
    with jax.enable_x64(dtype == "float64"):
        layer, x = ActNorm((3,)), data(dtype) * np.dtype(dtype).type(scale)
        rounding = 20 * np.finfo(dtype).eps
        y = layer.initialize(jnp.asarray(x))
        wide = x.astype(np.longdouble)
        expected = (wide - wide.mean(0)) / wide.std(0)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, expected.astype(float), atol=50 * rounding)  # 5 +- 0.1 has lost digits
        np.testing.assert_allclose(layer.std[...], wide.std(0).astype(float), rtol=10 * rounding)
        layer.log_scale[...] = jnp.asarray([0.5, -1.0, 0.25], dtype)
        layer.shift[...] = jnp.asarray([1.0, -2.0, 0.5], dtype)
        y, log_det = layer.forward(jnp.asarray(x))
        slopes = np.exp(np.asarray([0.5, -1.0, 0.25], np.longdouble)) / wide.std(0)
        np.testing.assert_allclose(
            y, (expected * wide.std(0) * slopes + [1.0, -2.0, 0.5]).astype(float), atol=100 * rounding
        )
        np.testing.assert_allclose(log_det, np.full(500, float(np.log(slopes).sum())), rtol=rounding, atol=rounding)
        jacobian = jax.jacobian(lambda row: layer(row[None])[0])(jnp.asarray(x[0]))
        np.testing.assert_allclose(jacobian, np.diag(slopes.astype(float)), rtol=10 * rounding)
        back = layer.inverse(y)
        assert np.abs(back - x).max() <= rounding * 8 * scale
        bounds = layer.lipschitz_bounds()
        np.testing.assert_allclose(bounds, [float(slopes.max()), float(1 / slopes.min())], rtol=10 * rounding)


def test_what_is_trained():
    """A scale and a shift, from zero; center and std are constants, without a derivative into the batch."""
    layer = ActNorm((3,))
    assert set(nnx.state(layer, nnx.Param)) == {"log_scale", "shift"}
    assert set(nnx.state(layer, Constant)) == {"center", "std"}
    x = jnp.asarray(data("float64"))
    np.testing.assert_array_equal(layer(x), x)
    layer.log_scale[...], layer.shift[...] = jnp.ones(3), jnp.ones(3)
    layer.initialize(x)
    assert all(not leaf.any() for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    gradient = jax.grad(lambda x: sum(jnp.sum(part) for part in standardization(x, (0,))))(x)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_constant_channels(dtype):
    """A deviation within rounding is replaced by the size of the values, so that the unit does not matter."""
    with jax.enable_x64(dtype == "float64"):
        eps = np.finfo(dtype).eps
        constant = np.full((1000, 4), 0.1) * [1.0, -1e6, 1e-12, 0.0]
        constant[::2, 0] *= 1 + eps  # the last digit of a channel that is computed
        center, std = standardization(jnp.asarray(constant.astype(dtype)), (0,))
        np.testing.assert_allclose(center, constant[1], rtol=2 * eps)
        np.testing.assert_allclose(std, [0.1, 1e5, 1e-13, 1.0], rtol=1e-5)
        layer = ActNorm((4,))
        layer.initialize(jnp.asarray(constant.astype(dtype)))
        y, log_det = layer.forward(jnp.asarray(2 * constant.astype(dtype)), estimator=rf.Exact())
        np.testing.assert_allclose(y, np.tile([1.0, -1.0, 1.0, 0.0], (1000, 1)), rtol=1e-5)
        assert jnp.isfinite(log_det).all()
        # One value of many that differs is a deviation.
        one = np.zeros((1000, 1))
        one[3] = 1e-25
        center, std = standardization(jnp.asarray(one.astype(dtype)), (0,))
        np.testing.assert_allclose((center[0], std[0]), (one.mean(), one.std()), rtol=1e-5)


def test_values_that_no_statistics_hold_are_refused():
    """Where differences or their statistics overflow the dtype: by name, and the flow is left as it was."""
    with jax.enable_x64(False):
        for config, x in (
            (rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), [[3e38, 0], [3e38, 1], [-3e38, 2]]),
            (
                rf.VectorFlowConfig(2, blocks=1, hidden=(4,), between=rf.BetweenBlocks(actnorm=False, batchnorm=True)),
                [[1e25, 0], [-1e25, 1]],
            ),
        ):
            flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
            before = jax.tree.leaves(nnx.state(flow))
            with pytest.raises(ValueError, match="x: expected values whose statistics are finite in float32, got"):
                flow.initialize(jnp.asarray(x, jnp.float32))
            for old, new in zip(before, jax.tree.leaves(nnx.state(flow)), strict=True):
                np.testing.assert_array_equal(old, new)


def test_set_constants_keeps_the_map():
    """Other centers and deviations, and the same y, log-det and inverse."""
    layer, x = ActNorm((3,)), jnp.asarray(data("float64"))
    layer.initialize(x)
    layer.log_scale[...], layer.shift[...] = jnp.asarray([0.5, -1.0, 0.25]), jnp.asarray([1.0, -2.0, 0.5])
    y, log_det = layer.forward(x, estimator=rf.Exact())
    layer.set_constants(jnp.asarray([10.0, 0.0, -1.0]), jnp.asarray([0.1, 3.0, 1.0]))
    again, log_det_again = layer.forward(x, estimator=rf.Exact())
    np.testing.assert_allclose(again, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(log_det_again, log_det, rtol=1e-12)
    np.testing.assert_array_equal(layer.center[...], [10.0, 0.0, -1.0])


OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)


@partial(jax.jit, static_argnums=0)
def train(graphdef, x, params, rest, keys):
    """The loss before each of some Adam steps with weight decay."""

    def step(carry, key):
        params, rest, state = carry

        def loss(params):
            return -nnx.merge(graphdef, params, rest).log_prob(x, key=key).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        with optax_promotion():
            updates, state = OPTIMIZER.update(gradient, state, params)
        flow = nnx.merge(graphdef, optax.apply_updates(params, updates), rest, copy=True)
        flow.update_norms()
        return (*nnx.split(flow, nnx.Param, ...)[1:], state), value

    return jax.lax.scan(step, (params, rest, OPTIMIZER.init(params)), keys)[1]


def losses(dtype, scale, steps=30):
    """Losses of training without the constant that the unit adds to the loss."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=2, hidden=(8,)), rngs=nnx.Rngs(0))
    a, b, c = np.random.default_rng(0).normal(size=(3, 256))
    x = jnp.asarray(np.stack([a, a**2 + 0.3 * b, 0.1 * c - 2], axis=1).astype(dtype) * np.dtype(dtype).type(scale))
    flow.initialize(x)
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
    found = train(graphdef, x, params, rest, jax.random.split(jax.random.key(0), steps))
    return np.asarray(found, float) - 3 * np.log(scale)


@pytest.mark.parametrize(
    ("dtype", "scales", "tolerance"),
    [
        ("float64", (1e-20, 1e-6, 1e6, 1e20), 1e-9),
        ("float32", (2.0**-66, 2.0**20, 2.0**66), 1e-4),  # rounds like 1; log(scale) has fewer digits after the point
        ("float32", (1e-20, 1e-6, 1e20), 2e-2),  # Adam's first steps go by the sign of gradients that are rounding
    ],
)
def test_training_does_not_depend_on_the_unit_of_the_data(dtype, scales, tolerance):
    """The loss is shifted by D log(scale), and falls by the same, to rounding, at every one of 30 steps."""
    with jax.enable_x64(dtype == "float64"):
        expected = losses(dtype, 1.0)
        assert expected[-1] < expected[0] - 0.4
        for scale in scales:
            np.testing.assert_allclose(losses(dtype, scale), expected, atol=tolerance)
