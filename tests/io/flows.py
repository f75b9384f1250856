"""Composed flows for the tests of files."""

import jax
import jax.numpy as jnp
from flax import nnx

import resflow_jax as rf

CONDITION = jnp.asarray([0.3, -0.7])


def contraction(rngs, dim=3, condition_dim=None, coefficient=0.8):
    """A chain of two layers."""
    options = {"condition_dim": condition_dim, "coefficient": coefficient, "activation": "tanh"}
    return rf.LipschitzMLP(dim, (4,), **options, rngs=rngs)


def conditional_flow(rngs, coefficient=0.8):
    """ActNorm, a conditional block, the inverse of another, and a stack, on R^3."""

    def step(rngs):
        return rf.Chain([rf.InvertibleLinear(3, rngs=rngs), rf.ActNorm((3,))])

    return rf.Flow(
        rf.Chain(
            [
                rf.ActNorm((3,)),
                rf.ResidualBlock(contraction(rngs, condition_dim=2, coefficient=coefficient)),
                rf.Invert(rf.ResidualBlock(contraction(rngs)), rf.FixedPoint(tolerance=1e-13)),
                rf.ResidualStack(
                    lambda rngs: rf.Chain([rf.InvertibleLinear(3, rngs=rngs), rf.ActNorm((3,))]), 2, rngs=rngs
                ),
                rf.Normalization([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]),
            ]
        )
    )


def perturbed(flow, seed=0):
    """The flow with parameters far from their start, in place."""
    params = nnx.state(flow, nnx.Param)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(flow, jax.tree.unflatten(treedef, leaves))
    flow.converge_norms()
    return flow
