"""Axes of meshes: what varies over an axis of a `jax.shard_map`, and explicit axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import resflow_jax as rf

X = jax.random.normal(jax.random.key(0), (3, 2))
CONDITIONS = jax.random.normal(jax.random.key(1), (2, 3, 3))


def stack(rngs):
    def step(rngs):
        return rf.ResidualBlock(rf.LipschitzMLP(2, (4,), condition_dim=3, rngs=rngs))

    return rf.ResidualStack(step, 2, rngs=rngs)


LAYERS = {
    "residual stack": stack,
    "autoregressive": lambda rngs: rf.MaskedAutoregressive(2, (4,), condition_dim=3, rngs=rngs),
}


def outputs(graphdef, state, condition):
    """The map, its log-det, and the inverse, for a batch that is the same on all devices."""
    layer = nnx.merge(graphdef, state)
    y, log_det = layer.forward(X, condition=condition, estimator=rf.Exact())
    return y, log_det, layer.inverse(X, condition=condition)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("what", ["parameters", "condition"])
def test_what_varies(name, what):
    """Parameters or a condition may vary over an axis that the batch does not vary over."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("part",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    pairs = [nnx.split(LAYERS[name](nnx.Rngs(seed))) for seed in range(2)]
    graphdef, part, whole = pairs[0][0], PartitionSpec("part"), PartitionSpec()
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in pairs))

    def of_part(state, condition):
        state = jax.tree.map(lambda leaf: leaf[0], state) if what == "parameters" else pairs[0][1]
        condition = CONDITIONS[0] if what == "parameters" else condition[0]
        return jax.tree.map(lambda leaf: leaf[None], outputs(graphdef, state, condition))

    specs = (part, whole) if what == "parameters" else (whole, part)
    found = jax.jit(jax.shard_map(of_part, mesh=mesh, in_specs=specs, out_specs=part))(states, CONDITIONS)
    for n in range(2):
        one = (pairs[n][1], CONDITIONS[0]) if what == "parameters" else (pairs[0][1], CONDITIONS[n])
        for leaf, expected in zip(found, jax.jit(outputs, static_argnums=0)(graphdef, *one), strict=True):
            np.testing.assert_allclose(leaf[n], expected, atol=1e-9)


@pytest.mark.parametrize("call", ["forward", "inverse", "jit"])
def test_explicit_axes_are_refused(call):
    """They are the default of `jax.make_mesh`; loops over a batch would fail with an error about some inner array."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    x = jax.device_put(jnp.ones((4, 2)), jax.NamedSharding(mesh, PartitionSpec("data")))
    block = rf.ResidualBlock(rf.LipschitzMLP(2, (4,), rngs=nnx.Rngs(0)))
    estimate = {"estimator": rf.Exact()}
    calls = {"forward": lambda: block.forward(x, **estimate), "inverse": lambda: block.inverse(x)}
    calls["jit"] = lambda: jax.jit(lambda x: block.forward(x, **estimate))(x)
    with pytest.raises(
        ValueError, match=r"^[xy]: expected an array whose mesh has automatic axes, got .* 'data'; make"
    ):
        calls[call]()
    whole = jax.device_put(jnp.ones((4, 2)), jax.NamedSharding(mesh, PartitionSpec()))
    assert np.isfinite(block.forward(whole, **estimate)[1]).all()
