"""Small flows and a bent density in the plane, for the tests of every library."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import resflow_jax as rf

SOLVER = rf.FixedPoint(tolerance=1e-13)  # fewer operations to compile than the default has


def make_flow(config=None, seed=0):
    """A flow whose blocks are far from the identity."""
    config = rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,), coefficient=0.8) if config is None else config
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(seed))
    enlarge = jax.jit(lambda params: jax.tree.map(lambda leaf: 3 * leaf + 0.1, params))
    nnx.update(flow, enlarge(nnx.state(flow, nnx.Param)))
    flow.converge_norms()
    return flow


def make_image_flow():
    """A flow on images of 2x2 pixels with a logit of large alpha, which extends far beyond [0, 1]."""
    config = rf.ImageFlowConfig(
        (2, 2, 1),
        blocks=(1,),
        hidden_channels=2,
        kernels=(1, 1),
        coefficient=0.8,
        data=rf.ImageTransform(logit_alpha=0.05),
        tail=rf.DenseTail(0),
    )
    return make_flow(config)


def change(flow):
    """Another map, in place: parameters and vectors."""
    nnx.update(flow, jax.tree.map(lambda leaf: 1.5 * leaf, nnx.state(flow, nnx.Param)))
    flow.update_norms()


def bent(number, seed=0):
    """Points [number, 2] along a parabola."""
    first, second = jax.random.normal(jax.random.key(seed), (2, number))
    return jnp.stack([1.5 * first, 0.4 * second + 0.5 * first**2], axis=1)


def train(loss, flow, x, steps):
    """`steps` steps of Adam in one program, on loss(flow, x, key); updates the flow."""
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
    optimizer = optax.adam(0.03)

    def step(carry, key):
        params, rest, state = carry
        gradient = jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest), x, key))(params)
        updates, state = optimizer.update(gradient, state)
        flow = nnx.merge(graphdef, optax.apply_updates(params, updates), rest, copy=True)
        flow.update_norms()
        return (*nnx.split(flow, nnx.Param, ...)[1:], state), None

    keys = jax.random.split(jax.random.key(0), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    params, rest, _ = run((params, rest, optimizer.init(params)))
    nnx.update(flow, params, rest)
    flow.converge_norms()
