"""`update_norms` follows the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf


def test_update_norms_follows_the_parameters():
    """After a large change of the kernels the old vectors underestimate; updating restores the bound."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=2, hidden=(8,)), rngs=nnx.Rngs(0))

    def scramble(param):
        noise = 5 * jax.random.normal(jax.random.key(param.size), param.shape)
        return param + noise if param.ndim > 1 else param

    nnx.update(flow, jax.tree.map(scramble, nnx.state(flow, nnx.Param)))
    assert rf.certify(flow).norms.max() > 1.05
    graphdef, state = nnx.split(flow)
    in_jit = nnx.jit(lambda flow: flow.update_norms(tolerance=1e-8, max_iterations=5000))
    status = in_jit(flow)
    assert status.converged and status.iterations > 1
    np.testing.assert_allclose(rf.certify(flow).norms.max(), 0.98, rtol=1e-4)
    again = nnx.merge(graphdef, state)
    again.update_norms(tolerance=1e-8, max_iterations=5000)
    x = jnp.ones((1, 3))
    np.testing.assert_allclose(again(x), flow(x), rtol=1e-10)


class HalfPlane(NamedTuple):
    """A base without a normaliser, whose support has infinite ends."""

    low: jax.Array
    high: jax.Array

    def log_prob(self, z):
        is_inside = ((z >= self.low[None]) & (z <= self.high[None])).all(axis=1)
        return jnp.where(is_inside, -(z**2).sum(axis=1) / 2, -jnp.inf)

    def sample(self, key, num_samples):
        return jnp.clip(jax.random.normal(key, (num_samples, 2)), self.low[None], self.high[None])


def test_initialize_with_infinite_constants():
    """Constants of a base may be infinite; statistics may not."""
    base = HalfPlane(jnp.array([0.0, -jnp.inf]), jnp.full(2, jnp.inf))
    flow = rf.Flow(rf.ActNorm((2,)), base, event_shape=(2,))
    x = np.random.default_rng(0).normal(size=(50, 2))
    flow.initialize(x)
    np.testing.assert_allclose(flow(x).mean(axis=0), 0, atol=1e-10)
    flow = rf.Flow(rf.MovingBatchNorm((2,)), base, event_shape=(2,))
    with pytest.raises(ValueError, match="x: expected values whose statistics are finite"):
        flow.initialize(1e200 * x)


def test_the_loss_of_orders_in_programs_that_close_over_the_flow():
    """It changes nothing, so that any program may hold the flow."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(2, 2, (4,), norms=rf.Norms(learned=True)), rngs=nnx.Rngs(0))
    expected = flow.order_loss()
    np.testing.assert_allclose(jax.jit(lambda: flow.order_loss())(), expected)
    np.testing.assert_allclose(jax.grad(lambda a: a * flow.order_loss())(1.0), expected)
    np.testing.assert_allclose(jax.vmap(lambda a: a * flow.order_loss())(jnp.arange(2.0)), [0, expected])
