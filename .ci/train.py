"""Trains, certifies, saves and loads a small flow by what `pip install resflow_jax` brings, and nothing else."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import resflow_jax as rf

flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=2, hidden=(16,)), rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (256, 2)) * jnp.array([3.0, 0.2]) + 1
flow.initialize(x)
optimizer = nnx.Optimizer(flow, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(flow, optimizer, key):
    """One step on all of x."""
    loss, gradient = nnx.value_and_grad(lambda flow: -flow.log_prob(x, key=key).mean())(flow)
    optimizer.update(flow, gradient)
    flow.update_norms()
    return loss


losses = [float(train_step(flow, optimizer, jax.random.key(n))) for n in range(50)]
assert losses[-1] < losses[0], losses
flow.tighten()
assert rf.certify(flow).is_certified
rf.save("flow.safetensors", flow)
same = rf.load("flow.safetensors")
assert (same.sample(jax.random.key(1), 4) == flow.sample(jax.random.key(1), 4)).all()
print(
    f"jax {jax.__version__}, resflow_jax {rf.__version__} from {rf.__file__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}"
)
