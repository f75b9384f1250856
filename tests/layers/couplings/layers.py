"""The layers without a Lipschitz bound by name, moved away from their start, and their dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import resflow_jax as rf
from tests.moving import add_noise

IMAGE, GRID = (4, 2, 2), (4, 1)
MLP = rf.MLPConditioner((6,), "tanh")
CNN = rf.CNNConditioner((4,), (3, 1), "elu")
NET = rf.ResNetConditioner(4, 1, 3, "lipswish")
KEEP = jnp.asarray([True, False, False, True, False])


class Network(nnx.Module):
    """A module of a user."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 6, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def stack(rngs):
    def step(rngs):
        layers = [
            rf.AffineCoupling((5,), MLP, flipped=flipped, condition_dim=2, rngs=rngs) for flipped in (False, True)
        ]
        return rf.Chain([rf.InvertibleLinear(5, rngs=rngs), *layers])

    return rf.ResidualStack(step, 2, rngs=rngs)


def stack_on_pixels(rngs):
    def step(rngs):
        layers = [
            rf.AdditiveCoupling(IMAGE, CNN, "checkerboard", condition_dim=2, rngs=rngs),
            rf.SplineCoupling(IMAGE, CNN, bins=3, condition_dim=2, rngs=rngs),
            rf.MixtureCoupling(IMAGE, CNN, flipped=True, components=2, condition_dim=2, rngs=rngs),
        ]
        return rf.Chain(layers)

    return rf.ResidualStack(step, 2, rngs=rngs)


# name: (constructor from rngs, shape of one example)
LAYERS = {
    "additive": (lambda rngs: rf.AdditiveCoupling((5,), MLP, rngs=rngs), (5,)),
    "affine on a module": (lambda rngs: rf.AffineCoupling((5,), Network(rngs)), (5,)),
    "affine of two elements": (lambda rngs: rf.AffineCoupling((2,), MLP, flipped=True, rngs=rngs), (2,)),
    "affine by an array": (lambda rngs: rf.AffineCoupling((5,), MLP, KEEP, condition_dim=2, rngs=rngs), (5,)),
    "affine by parity": (lambda rngs: rf.AffineCoupling((5,), MLP, "checkerboard", scale="sigmoid", rngs=rngs), (5,)),
    "affine on channels": (lambda rngs: rf.AffineCoupling(IMAGE, CNN, condition_dim=3, rngs=rngs), IMAGE),
    "affine on pixels": (
        lambda rngs: rf.AffineCoupling(IMAGE, NET, "checkerboard", True, condition_dim=(4, 2, 3), rngs=rngs),
        IMAGE,
    ),
    "affine of an image by a dense network": (lambda rngs: rf.AffineCoupling(IMAGE, MLP, rngs=rngs), IMAGE),
    "affine on a line": (lambda rngs: rf.AffineCoupling(GRID, CNN, "checkerboard", rngs=rngs), GRID),
    "spline": (lambda rngs: rf.SplineCoupling((5,), MLP, bins=4, condition_dim=2, rngs=rngs), (5,)),
    "spline on pixels": (lambda rngs: rf.SplineCoupling(IMAGE, CNN, "checkerboard", bins=3, rngs=rngs), IMAGE),
    "mixture": (lambda rngs: rf.MixtureCoupling((5,), MLP, components=3, condition_dim=2, rngs=rngs), (5,)),
    "mixture on channels": (
        lambda rngs: rf.MixtureCoupling(IMAGE, NET, components=2, condition_dim=2, rngs=rngs),
        IMAGE,
    ),
    "stack": (stack, (5,)),
    "stack of all on pixels": (stack_on_pixels, IMAGE),
}


def made(name, layers=LAYERS):
    """A layer with parameters away from their start, x [3, ...] and a condition or None."""
    make, shape = layers[name]
    layer = make(nnx.Rngs(1))
    rng = np.random.default_rng(3)
    add_noise(layer, 0.25)
    x, own = jnp.asarray(2 * rng.normal(size=(3, *shape))), layer.condition_shape
    condition = None if own is None else jnp.asarray(rng.normal(size=(3, *own)))
    return layer, x, condition


def dense_jacobians(layer, x, condition):
    """The Jacobians of a layer at the examples of a batch, [B, D, D]."""

    @jax.jit
    def jacobians(x, condition):
        def at(e, c):
            return jax.jacfwd(lambda e: layer(e[None], None if c is None else c[None])[0].ravel())(e)

        return jax.vmap(at, in_axes=(0, None if condition is None else 0))(x, condition)

    return jacobians(x, condition).reshape(len(x), x[0].size, x[0].size)
