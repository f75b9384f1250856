"""The data transform of a flow: padding, mean and standard deviation, the order of z, refused data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.models.flows import CONFIGS, SMALL


@pytest.fixture(scope="module")
def padded_flow():
    config = rf.ImageFlowConfig(
        (4, 4, 1),
        hidden_channels=4,
        kernels=(3, 3),
        blocks=(1,),
        data=rf.ImageTransform(padding=rf.Padding(channels=1, noise="gaussian"), logit_alpha=0.05),
        tail=rf.DenseTail(0),
    )
    return rf.ResidualFlow(config, rngs=nnx.Rngs(0))


def test_padding(padded_flow):
    """z has more elements than x; the noise needs a key, also with the exact log-det; the inverse drops it."""
    flow, x, key = padded_flow, jax.random.uniform(jax.random.key(2), (3, 4, 4, 1)), jax.random.key(3)
    assert (flow.event_shape, flow.dim) == ((4, 4, 1), 32)
    assert flow(x).shape == (3, 32)
    with pytest.raises(ValueError, match="key: expected a PRNG key to draw the padding's noise, got None"):
        flow.log_prob(x, estimator=rf.Exact())
    first, second = (flow.log_prob(x, key=k, estimator=rf.Exact()) for k in jax.random.split(key))
    assert first.shape == (3,) and not np.allclose(first, second)
    z, _ = flow.forward(x, key=key, estimator=rf.Exact())
    np.testing.assert_allclose(flow.inverse(z), x, atol=1e-10)
    assert flow.sample(key, 2).shape == (2, 4, 4, 1)
    with pytest.raises(ValueError, match="flow: expected a flow without padding, because padding leaves"):
        flow.sample_and_log_prob(key, 2)


def test_data_mean_and_deviation():
    """With zero blocks and no ActNorm a flow is its data transform: (x - mean) / std."""
    config = rf.VectorFlowConfig(
        2,
        1,
        (3,),
        data=rf.VectorTransform(mean=[1.0, -2.0], std=[0.5, 4.0]),
        between=rf.BetweenBlocks(actnorm=False),
    )
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    nnx.update(flow, jax.tree.map(jnp.zeros_like, nnx.state(flow, nnx.Param)))
    z, log_det = flow.forward(jnp.asarray([[2.0, 2.0]]), estimator=rf.Exact())
    np.testing.assert_allclose(z, [[2.0, 1.0]], rtol=1e-12)
    np.testing.assert_allclose(log_det, -np.log(2.0), rtol=1e-12)


def test_latent_order():
    """z holds the part factored out first in front, each part flattened in H, W, C order."""
    config = rf.ImageFlowConfig(
        (4, 4, 1), **SMALL, blocks=(1, 1), tail=rf.DenseTail(0), scales=rf.Scales(factor_out=True)
    )
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    # Blocks and ActNorms switched off: z is the squeezed logit of x, cut in two along the channels.
    nnx.update(flow, jax.tree.map(jnp.zeros_like, nnx.state(flow, nnx.Param)))
    x = jax.random.uniform(jax.random.key(0), (2, 4, 4, 1))
    alpha = config.data.logit_alpha
    y = jax.scipy.special.logit(alpha + (1 - 2 * alpha) * x)
    squeezed = y.reshape(2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 2, 2, 4)
    expected = np.concatenate([squeezed[..., 2:].reshape(2, -1), squeezed[..., :2].reshape(2, -1)], axis=1)
    np.testing.assert_allclose(flow(x), expected, rtol=1e-9)


BAD_INPUTS = {
    "rank": (lambda x: x[0], r"x: expected a float array \[B, 4, 4, 1\], got shape \(4, 4, 1\)"),
    "channels": (lambda x: jnp.tile(x, 3), r"x: expected .*\[B, 4, 4, 1\], got shape \(3, 4, 4, 3\)"),
    "size": (lambda x: x[:, :2], r"x: expected .*, got shape \(3, 2, 4, 1\)"),
    "integers": (lambda x: x.astype(int), "x: expected a float array .* got dtype int"),
    "above one": (lambda x: 255 * x, r"x: expected values in \[0, 1\], got \[.*\]"),
    "below zero": (lambda x: x - 1, r"x: expected values in \[0, 1\]"),
    "not finite": (lambda x: x.at[0, 0, 0, 0].set(jnp.nan), "x: expected finite values, got 1 that are not"),
    "no array": (lambda x: 0.5, "x: expected a float array .* got float"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_named(case):
    """forward, log_prob, call and initialize name the argument, what was expected and what came."""
    change, message = BAD_INPUTS[case]
    flow = rf.ResidualFlow(CONFIGS["images"], rngs=nnx.Rngs(1))
    x = change(jax.random.uniform(jax.random.key(0), (3, 4, 4, 1)))
    for method in (flow, flow.initialize, flow.log_prob, lambda x: flow.forward(x, estimator=rf.Exact())):
        with pytest.raises(ValueError, match=message):
            method(x)


def test_initialisation_needs_a_batch(vector_flow):
    """One example has no variance, and none is no batch: errors say so."""
    flow, x = vector_flow
    with pytest.raises(ValueError, match="x: expected at least 2 examples to take statistics over, got 1"):
        flow.initialize(x[:1])
    with pytest.raises(ValueError, match=r"x: expected at least one example, got shape \(0, 3\)"):
        flow.log_prob(x[:0], estimator=rf.Exact())


def test_bad_latents_are_named(vector_flow):
    """The error of inverse names z."""
    flow, _ = vector_flow
    with pytest.raises(ValueError, match=r"z: expected a float array \[B, 3\], got shape \(2, 4\)"):
        flow.inverse(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="z: expected finite values, got 3 that are not"):
        flow.inverse(jnp.full((1, 3), jnp.nan))


def test_vectors_may_leave_the_unit_interval(vector_flow):
    """Only images are confined to [0, 1]; vectors must be finite."""
    flow, x = vector_flow
    assert jnp.isfinite(flow.log_prob(10 * x, estimator=rf.Exact())).all()
    with pytest.raises(ValueError, match="x: expected finite values, got 3 that are not"):
        flow.log_prob(x.at[0].set(np.inf), estimator=rf.Exact())
