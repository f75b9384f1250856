"""Flows of images and vectors: samples, the edges of the domain, norms, and training on one device and two."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.training.examples import Examples
from resflow_jax.training.losses import dequantized_bits_per_dim
from resflow_jax.training.parallel import make_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer

IMAGES = np.random.default_rng(0).integers(0, 4, (8, 4, 4, 1)).astype(np.uint8)
CONFIG = rf.ImageFlowConfig(
    (4, 4, 1),
    blocks=(1,),
    hidden_channels=8,
    kernels=(3, 3),
    preactivation="all",
    between=rf.BetweenBlocks(first_actnorm=False),
    tail=rf.DenseTail(0),
)


@pytest.fixture(scope="module")
def flow():
    """A flow of images, initialised, with kernels at their bounds."""
    flow = rf.ResidualFlow(CONFIG, rngs=nnx.Rngs(0))
    flow.initialize(jax.random.uniform(jax.random.key(0), (64, 4, 4, 1)))
    params = nnx.state(flow, nnx.Param)
    nnx.update(flow, jax.tree_util.tree_map_with_path(lambda p, v: 5 * v if "kernel" in str(p) else v, params))
    flow.converge_norms()
    return flow


@pytest.fixture(scope="module")
def log_prob(flow):
    """log p of 64 images, compiled."""
    return jax.jit(lambda x, key: flow.log_prob(x, key=key))


def test_settings():
    """These tests run with two devices, float32, and no other settings that change results."""
    assert jax.device_count() == 2 and not jax.config.jax_enable_x64
    assert not jax.config.read("jax_disable_most_optimizations") and "XLA_FLAGS" not in os.environ


def test_norms(flow):
    """Every layer's norm, as applied, is at its coefficient within a part in a thousand; tightened all is certified."""
    norms = rf.certify(flow).norms
    coefficients = [layer.coefficient for block in rf.certify(flow).blocks for layer in block.layers]
    np.testing.assert_allclose(norms, coefficients, rtol=2e-3)
    tightened = nnx.clone(flow)
    tightened.tighten()
    certificate = rf.certify(tightened)
    assert certificate.is_certified and all(block.bound <= block.target_bound for block in certificate.blocks)


def test_samples_have_a_density(flow, log_prob):
    """Images of the flow itself, compiled; the round trip of both ways."""
    x, status = jax.jit(lambda key: flow.sample(key, 64, return_status=True))(jax.random.key(1))
    assert status.converged.all() and x.min() >= 0 and x.max() <= 1
    assert np.isfinite(log_prob(x, jax.random.key(2))).all()
    inner = jnp.clip(x, 0.01, 0.99)
    back = jax.jit(lambda x: flow.inverse(flow(x)))(inner)
    np.testing.assert_allclose(back, inner, atol=1e-5)


def test_edges_of_the_unit_interval(flow, log_prob):
    """log p and its gradient are finite at 0 and 1 and beside them, compiled as eagerly, and alike."""
    one = np.float32(1)
    values = np.array([0, 1e-45, 1e-7, np.nextafter(one, np.float32(0)), one], np.float32)
    x = jnp.asarray(np.resize(values, (64, 4, 4, 1)))
    x = x.at[0].set(0).at[1].set(1)
    key = jax.random.key(3)
    compiled = log_prob(x, key)
    assert np.isfinite(compiled).all()
    np.testing.assert_allclose(compiled, flow.log_prob(x, key=key), rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: flow.log_prob(x, key=key).sum()))(x)
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def one_device(flow):
    """A trainer of clipped gradients and two updates on one device: the states, the metrics."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    trainer = Trainer(nnx.split(flow)[0], dequantized_bits_per_dim(4), optimizer, 0.9)
    states, metrics, step = [trainer.create_state(flow, rf.Roulette())], [], jax.jit(trainer.step)
    for _ in range(2):
        state, found = step(states[-1], IMAGES, jax.random.key(4))
        states.append(state)
        metrics.append(found)
    return trainer, states, metrics


def test_two_devices_take_the_steps_of_one(one_device):
    """State and metrics to rounding."""
    trainer, states, metrics = one_device
    assert np.isfinite(metrics[1]["loss"]) and metrics[0]["loss"] != metrics[1]["loss"]
    placement = Placement(trainer, make_mesh(), "jit")
    state = placement.place(states[0])
    for expected, after in zip(metrics, states[1:], strict=True):
        state, found = placement.step(state, placement.place_batch(IMAGES), jax.random.key(4))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(placement.to_host(state.params)), jax.tree.leaves(after.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_vectors():
    """A flow of vectors: its samples' density by both ways, and a step of README's kind that lowers the loss."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=2, hidden=(8,)), rngs=nnx.Rngs(1))
    data = jax.random.normal(jax.random.key(5), (64, 3))
    data = (data + 4 * jnp.sign(data)) * jnp.array([1.0, 10.0, 0.1]) + 3
    flow.initialize(data)
    x, log_prob = flow.sample_and_log_prob(jax.random.key(6), 16, estimator=rf.Exact())
    np.testing.assert_allclose(log_prob, flow.log_prob(x, estimator=rf.Exact()), rtol=1e-4, atol=1e-4)
    optimizer = nnx.Optimizer(flow, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(flow, optimizer, key):
        loss, grads = nnx.value_and_grad(lambda flow: -flow.log_prob(data, key=key).mean())(flow)
        optimizer.update(flow, grads)
        flow.update_norms()
        return loss

    losses = [float(train_step(flow, optimizer, jax.random.key(n))) for n in range(160)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_examples_whose_differences_float32_loses():
    """A fit to float64 examples far from zero warns; near zero it is silent."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(40, 2))
    assert Examples.of(flow, x, None, None).x.dtype == jnp.float32
    with pytest.warns(UserWarning, match=r"x: float32 rounds x\[:, 1\] to more than 1/4096 of its standard deviation"):
        Examples.of(flow, x + np.asarray([0, 1e6]), None, None)


@pytest.mark.parametrize("std", [1e-42, 1e-46, 1e39])
def test_scales_that_float32_does_not_hold(std):
    """They are refused: zero would divide, and infinity would be no scale."""
    with pytest.raises(ValueError, match="std: expected positive finite numbers, got"):
        rf.Normalization([0.0], [std])
    with pytest.raises(ValueError, match="mean: expected finite numbers, got"):
        rf.Normalization([1e39], [1.0])


def test_gradients_of_a_reversible_flow():
    """Of 16 blocks, in every parameter and in x: those of the flow that keeps its inputs, to 1e-4 of the largest."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(3, 16, (8,)), rngs=nnx.Rngs(0))
    data = jax.random.normal(jax.random.key(1), (32, 3))
    flow.initialize(data)
    flow.converge_norms()

    def gradients():
        graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
        loss = lambda params, x: nnx.merge(graphdef, params, rest).log_prob(x, key=jax.random.key(2)).mean()  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, data))

    expected = gradients()
    rf.make_reversible(flow)
    for a, b in zip(gradients(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
