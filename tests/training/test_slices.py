"""A flow that cannot run in a shard_map is divided by the compiler, and other strategies refuse it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.losses import negative_log_likelihood
from resflow_jax.training.slices import whole_layers

pytest.importorskip("diffrax")


@pytest.fixture(scope="module")
def trainer_and_flow():
    config = rf.ContinuousFlowConfig.ffjord((2,), conditioner=rf.MLPConditioner((3,), "tanh", zero=False))
    flow = rf.ContinuousFlow(config, rngs=nnx.Rngs(0))
    return rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9), flow


def test_two_devices_do_what_one_does(trainer_and_flow):
    """The step and the evaluation."""
    trainer, flow = trainer_and_flow
    assert whole_layers(trainer.graphdef) == ["ContinuousBlock"]
    x = jax.random.normal(jax.random.key(0), (8, 2))
    mesh = rf.training.make_mesh(devices=jax.devices()[:2])
    one, alone = trainer.compiled_step()(trainer.create_state(flow, rf.Roulette()), x, jax.random.key(1))
    two, shared = rf.training.jit_train_step(trainer, mesh)(
        trainer.create_state(flow, rf.Roulette()), x, jax.random.key(1)
    )
    np.testing.assert_allclose(shared["loss"], alone["loss"], rtol=1e-9)
    assert shared["diagnostics"].term_norms.shape == (0, 16) and jnp.isfinite(alone["gradient_norm"])
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    data_mesh = rf.training.make_mesh(devices=jax.devices()[:2])
    found = vector_log_prob(flow, np.asarray(x), jax.random.key(0), mesh=data_mesh)
    np.testing.assert_allclose(found, vector_log_prob(flow, np.asarray(x), jax.random.key(0)), rtol=1e-6)


def test_other_strategies(trainer_and_flow):
    trainer, flow = trainer_and_flow
    with pytest.raises(ValueError, match='parallel: expected "jit" for a flow with ContinuousBlock, got "pmap"'):
        rf.training.pmap_train_step(trainer)
    with pytest.raises(ValueError, match='parallel: expected "jit" for a flow with ContinuousBlock, got "shard_map"'):
        rf.training.shard_map_train_step(trainer, rf.training.make_mesh())
    state = trainer.create_state(flow, rf.Roulette())
    with pytest.raises(ValueError, match="state: expected the state of a flow with residual blocks"):
        rf.training.fit_estimator(state, batch_size=8)


@pytest.mark.parametrize("name", ["affine", "mixture", "maf"])
def test_other_layers_run_in_a_shard_map(name):
    """Forward, inverse and gradient on slices are those of the whole batch."""
    network = rf.MLPConditioner((3,), zero=False)
    layer = {
        "affine": lambda: rf.AffineCoupling((2,), network, rngs=nnx.Rngs(0)),
        "mixture": lambda: rf.MixtureCoupling((2,), network, components=2, rngs=nnx.Rngs(0)),
        "maf": lambda: rf.MaskedAutoregressive(2, (3,), rngs=nnx.Rngs(0)),
    }[name]()
    graphdef, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (4, 2))

    def values(state, x):
        layer = nnx.merge(graphdef, state)
        y, log_det = layer.transform(x)
        return layer.invert(y), log_det, jax.grad(lambda x: jnp.sum(layer.invert(x) ** 2))(x)

    mesh = rf.training.make_mesh(devices=jax.devices()[:2])
    whole, slices = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    shared = jax.jit(jax.shard_map(values, mesh=mesh, in_specs=(whole, slices), out_specs=slices))(state, x)
    for a, b in zip(shared, jax.jit(values)(state, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
