"""Composed flows for the tests of files."""

import jax.numpy as jnp

import resflow_jax as rf
from tests.moving import add_noise

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
    add_noise(flow, 0.2, seed)
    flow.converge_norms()
    return flow
