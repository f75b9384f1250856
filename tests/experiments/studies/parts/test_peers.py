"""A flow rebuilt in normflows: the same map, samples to its own tolerance, log-densities within its noise."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax import BetweenBlocks, DenseTail, Exact, ImageFlowConfig, ResidualFlow, VectorFlowConfig
from resflow_jax.models.bases import standard_normal_log_prob

pytest.importorskip("torch", reason="needs the extra bench: torch and normflows")
pytest.importorskip("normflows", reason="needs the extra bench: torch and normflows")

import torch

from experiments.studies.parts.peers import normflows_from

SMALL = {"kernels": (3, 1), "hidden_channels": 4}
SCALES = ImageFlowConfig((4, 4, 1), **SMALL, blocks=(2, 1), tail=DenseTail(1, hidden=4, layers=2))
CONVOLUTIONS = ImageFlowConfig((2, 4, 2), **SMALL, blocks=(1,), tail=DenseTail(0))


def make(config):
    """A flow with random parameters of all kinds, some of whose kernels are rescaled, and its peer."""
    flow, rng = ResidualFlow(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    params = nnx.state(flow, nnx.Param)
    nnx.update(flow, jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape), params))
    flow.converge_norms()
    return flow, normflows_from(flow)


@pytest.fixture(scope="module")
def example():
    """A peer, images, their z and exact log p."""
    flow, peer = make(SCALES)
    x = np.random.default_rng(1).uniform(size=(3, *flow.event_shape))
    z, log_det = flow.forward(jnp.asarray(x), estimator=Exact())
    return peer, x, z, standard_normal_log_prob(z) + log_det


def test_the_map_is_the_same(example):
    """In float64, to rounding: kernels, order of channels and of z, ActNorm, logit."""
    peer, x, z, _ = example
    found = peer.forward(x)
    assert found.dtype == z.dtype
    np.testing.assert_allclose(found, z, rtol=1e-10, atol=1e-10)


def test_without_dense_blocks():
    """z in our order, and back, where the flow itself flattens nothing."""
    flow, peer = make(CONVOLUTIONS)
    x = np.random.default_rng(1).uniform(size=(3, *flow.event_shape))
    z = peer.forward(x)
    np.testing.assert_allclose(z, flow(jnp.asarray(x)), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(peer.samples(z), x, atol=3e-3)


def test_kernels_are_left_as_they_are(example):
    """Its normalisation does not change the kernels."""
    layers = [module for module in example[0].model.modules() if hasattr(module, "compute_weight")]
    assert layers
    for layer in layers:
        assert torch.equal(layer.compute_weight(update=False), layer.weight)


def test_samples_to_its_own_tolerance(example):
    """Near x, but not to rounding: its last step may be 3e-3."""
    peer, x, z, _ = example
    found = peer.samples(z)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert 1e-9 < np.abs(found - x).max() < 3e-3


def test_log_densities_within_their_noise(example):
    """The mean of 512 estimates of each is the exact log-density of x, up to 4 standard errors."""
    peer, x, z, log_prob = example
    torch.manual_seed(0)
    np.random.seed(0)
    samples, estimates = peer.samples_and_log_prob(np.repeat(z, 512, axis=0))
    estimates = estimates.reshape(len(x), -1)
    stderr = estimates.std(1) / estimates.shape[1] ** 0.5
    assert (np.abs(estimates.mean(1) - log_prob) < 4 * stderr).all() and (stderr < 0.1).all()
    np.testing.assert_allclose(samples[::512], x, atol=3e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VectorFlowConfig(3, blocks=1, hidden=(4,)), "flow: expected one of images without factor_out, got Vector"),
        (replace(CONVOLUTIONS, activation="elu"), "flow: expected chains of layers with lipswish between.*got elu"),
        (
            replace(CONVOLUTIONS, between=BetweenBlocks(actnorm=False, batchnorm=True)),
            "flow: expected only Logit, .* got MovingBatchNorm",
        ),
    ],
)
def test_other_flows_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        normflows_from(ResidualFlow(config, rngs=nnx.Rngs(0)))


def test_the_papers_setting_is_the_same_map():
    """With the kernels before normalisation too, dense ones included, once their norms are known; and it trains."""
    flow, _ = make(SCALES)
    peer = normflows_from(flow, papers=True)
    x = np.random.default_rng(1).uniform(size=(3, *flow.event_shape))
    np.testing.assert_allclose(peer.forward(x), flow(jnp.asarray(x)), rtol=1e-3, atol=1e-3)
    peer.start_training(1e-2, 1.0)
    losses = [peer.train_step(x) for _ in range(20)]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])
