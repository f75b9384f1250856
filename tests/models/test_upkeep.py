"""`update_norms` follows the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
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
