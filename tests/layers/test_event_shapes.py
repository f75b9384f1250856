"""Events that a layer cannot have returned are refused by its inverse, as events that it does not take by its map."""

import jax.numpy as jnp
import pytest
from flax import nnx

import resflow_jax as rf

LAYERS = {
    "actnorm": lambda: rf.ActNorm((6,)),
    "spline": lambda: rf.Spline((6,)),
    "normalization": lambda: rf.Normalization(jnp.zeros(6), jnp.ones(6)),
    "batch norm": lambda: rf.MovingBatchNorm((6,)),
    "linear": lambda: rf.InvertibleLinear(6, rngs=nnx.Rngs(0)),
    "bounded": lambda: rf.Bounded([0.0] * 6, [1.0] * 6),
    "permutation": lambda: rf.Permutation([2, 0, 1, 3, 5, 4]),
    "chain": lambda: rf.Chain([rf.Exp(), rf.ActNorm((6,))]),
    "flatten": lambda: rf.Chain([rf.Flatten((2, 3)), rf.ActNorm((6,))]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(1,), (5,), (7,), ()])
def test_wrong_shapes(name, shape):
    """A number, one element, which would broadcast, one too few and one too many."""
    layer = LAYERS[name]()
    with pytest.raises(ValueError, match=r"y: .*expected"):
        layer.inverse(jnp.full((4, *shape), 0.5))
    with pytest.raises(ValueError, match=r"x: .*expected"):
        rf.Invert(layer).forward(jnp.full((4, *shape), 0.5))
    with pytest.raises(ValueError, match=r"x: .*expected"):
        rf.Chain([rf.Exp(), rf.Invert(layer)]).forward(jnp.full((4, *shape), 0.5))


@pytest.mark.parametrize("name", LAYERS)
def test_right_shapes(name):
    y = jnp.full((4, 6), 0.5)
    layer = LAYERS[name]()
    x, log_det = rf.Invert(layer).forward(y)
    assert jnp.allclose(layer.inverse(y), x) and log_det.shape == (4,)


def test_layers_that_take_many_shapes():
    """Axes in front are free, and squeezes and padding have outputs of another shape."""
    images = jnp.full((2, 4, 4, 3), 0.5)
    assert rf.ActNorm((3,)).inverse(images).shape == images.shape
    chain = rf.Chain([rf.Squeeze((4, 4, 3)), rf.ActNorm((12,)), rf.Invert(rf.Squeeze((4, 4, 3)))])
    assert chain.inverse(chain(images)).shape == images.shape
    padded = rf.Chain([rf.ChannelPadding(1), rf.ActNorm((4,))])
    assert padded.inverse(jnp.ones((2, 4, 4, 4))).shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"y: .*expected"):
        padded.inverse(images)
