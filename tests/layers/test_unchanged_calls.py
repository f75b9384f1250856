"""Networks whose state a call changes are refused: their output is no function of one example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

X = jax.random.normal(jax.random.key(0), (6, 4), jnp.float32)


def network(kind, inputs):
    rngs = nnx.Rngs(0)
    random = nnx.Dropout(0.5, rngs=rngs) if kind == "dropout" else nnx.BatchNorm(8, rngs=rngs)
    return nnx.Sequential(nnx.Linear(inputs, 8, rngs=rngs), random, nnx.Linear(8, 4, rngs=rngs))


class Field(nnx.Module):
    def __init__(self, inside):
        self.inside = inside

    def __call__(self, t, x):
        return self.inside(x)


LAYERS = {
    "coupling": ("conditioner", lambda kind: rf.AffineCoupling((4,), network(kind, 2))),
    "field": ("field", lambda kind: rf.ContinuousBlock(Field(network(kind, 4)))),
}


@pytest.mark.parametrize("kind", ["dropout", "batch statistics"])
@pytest.mark.parametrize("name", LAYERS)
def test_networks_in_train_mode(name, kind):
    argument, make = LAYERS[name]
    layer = make(kind)
    layer.train()
    with pytest.raises(ValueError, match=f"^{argument}: expected a call of .* not to change its state, got .*eval"):
        layer.inverse(X)
    layer.eval()
    np.testing.assert_allclose(layer.inverse(layer(X)), X, atol=1e-3)
    np.testing.assert_allclose(layer(X)[:1], layer(X[:1]), atol=1e-4)
    assert jnp.isfinite(jax.jit(layer.inverse)(X)).all()
