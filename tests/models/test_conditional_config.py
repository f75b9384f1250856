"""Flows of configs with a `condition_dim`: the log-density of p(x | c) against whole Jacobians, and where c enters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.layers.contraction_block import ContractionBlock

CONFIGS = {
    "vectors": rf.VectorFlowConfig(dim=3, blocks=2, hidden=(4,), coefficient=0.8, condition_dim=2),
    "vectors, DenseNets": rf.VectorFlowConfig(
        dim=3, blocks=1, activation="clipswish", condition_dim=2, densenet=rf.DenseNetBlocks(depth=1, growth=4)
    ),
    "vectors, monotone": rf.VectorFlowConfig(dim=3, blocks=2, hidden=(4,), condition_dim=2, block="monotone"),
    "vectors, implicit": rf.VectorFlowConfig(dim=3, blocks=2, hidden=(4,), condition_dim=2, block="implicit"),
    "images": rf.ImageFlowConfig(
        (2, 2, 1),
        blocks=(1, 1),
        hidden_channels=4,
        kernels=(3, 3),
        preactivation="all",
        condition_dim=2,
        data=rf.ImageTransform(logit_alpha=0.05),
        tail=rf.DenseTail(1, hidden=4, layers=2),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_log_prob_given_a_condition(name):
    """log N(z) + slogdet dz/dx at fixed c, for a c of each example; another c gives another density."""
    flow = rf.ResidualFlow(CONFIGS[name], rngs=nnx.Rngs(0))
    assert flow.condition_shape == (2,)
    x = jax.random.uniform(jax.random.key(1), (3, *flow.event_shape), minval=0.1, maxval=0.9)
    c = jax.random.normal(jax.random.key(2), (3, 2))

    def z_of(x, c):
        return flow(x[None], condition=c[None])[0]

    z = flow(x, condition=c)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(z_of)))(x, c).reshape(3, flow.dim, flow.dim)
    expected = jax.scipy.stats.norm.logpdf(z).sum(-1) + np.linalg.slogdet(np.asarray(jacobians))[1]
    log_prob = flow.log_prob(x, condition=c, estimator=rf.Exact())
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9)
    others = flow.log_prob(x, condition=c[::-1], estimator=rf.Exact())
    np.testing.assert_allclose(others[1], log_prob[1], rtol=1e-9)
    assert np.abs(others - log_prob)[[0, 2]].min() > 1e-3
    np.testing.assert_allclose(flow.inverse(z, condition=c), x, atol=1e-6)
    with pytest.raises(ValueError, match=r"condition: expected floats .*got None"):
        flow.log_prob(x, estimator=rf.Exact())
    with pytest.raises(ValueError, match=r"condition: expected .*got shape \(3, 1\)"):
        flow.log_prob(x, condition=c[:, :1], estimator=rf.Exact())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("condition_dim", [None, 5])
def test_every_block_takes_the_condition(name, condition_dim):
    """Or none, without `condition_dim`: as shapes alone."""
    config = replace(CONFIGS[name], condition_dim=condition_dim)
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
    shapes = [block.condition_shape for _, block in nnx.iter_modules(flow) if isinstance(block, ContractionBlock)]
    assert set(shapes) == {condition_dim and (condition_dim,)} and len(shapes) >= 1


def test_an_unexpected_condition():
    """A flow without `condition_dim` takes none."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(2,)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="condition: expected None"):
        flow(jnp.zeros((1, 2)), condition=jnp.zeros((1, 2)))
