"""The averaged flow of a state on eight devices: that of one device, with nothing else of the state brought."""

import dataclasses
import gc
from functools import cache

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from experiments.runs.judging import judged
from resflow_jax.training.forms import mesh_of
from resflow_jax.training.losses import dequantized_bits_per_dim
from resflow_jax.training.parallel import make_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer
from tests.training.test_parallel import CONFIG

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py, not another platform"
)

WIDE = dataclasses.replace(CONFIG, kernels=(1, 1, 1), between=rf.BetweenBlocks())
IMAGES = np.random.default_rng(0).integers(0, 4, (20, 4, 4, 1))
ARGUMENTS = {"levels": 4, "estimator": rf.Roulette(), "batch_size": 16, "draws": 2}
LAYOUTS = {
    "jit": {},
    "pmap": {"strategy": "pmap"},
    "full": {"parameters": "full", "sizes": (4, 2)},
    "model": {"parameters": "model", "sizes": (2, 4)},
}


@cache
def on_one_device():
    """A trainer, a state whose averaged kernels are too large, the tightened flow of these, its score."""
    flow = rf.ResidualFlow(WIDE, rngs=nnx.Rngs(0))
    trainer = Trainer(nnx.split(flow)[0], dequantized_bits_per_dim(4), optax.adam(0.1), 0.9)
    state = trainer.create_state(flow, rf.Roulette())
    grown = jax.tree.map(lambda leaf: 0.3 * leaf, state.params)  # 3 times it, after the correction for one step
    state = state._replace(ema=optax.EmaState(state.ema.count + 1, grown))
    flow = trainer.averaged_flow(state)
    flow.tighten()
    return trainer, state, flow, rf.evaluate_bits_per_dim(flow, IMAGES, jax.random.key(1), mesh=mesh(), **ARGUMENTS)


def mesh():
    return make_mesh(8, 1)


def placed(layout):
    """The placement and the state on its mesh."""
    trainer, state, _, _ = on_one_device()
    options = dict(LAYOUTS[layout])
    placement = Placement(trainer, make_mesh(*options.pop("sizes", ())), **options)
    return placement, placement.to_checkpoint(placement.place(state))


def bytes_on(device, arrays):
    """The bytes of all buffers of arrays on a device, each counted once."""
    shards = [shard.data for leaf in arrays for shard in leaf.addressable_shards if shard.device == device]
    return sum({part.unsafe_buffer_pointer(): part.nbytes for part in shards if part.nbytes}.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_flow_of_one_device(layout):
    """Parameters, certificate and score, though neither parameters nor optimiser of the state are there any more."""
    _, _, expected, score = on_one_device()
    placement, state = placed(layout)
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        leaf.delete()
    found = judged(placement, state)
    assert (mesh_of(found.flow) is None) == (layout != "model")
    chex.assert_trees_all_close(nnx.state(found.flow, nnx.Param), nnx.state(expected, nnx.Param), rtol=1e-8)
    np.testing.assert_allclose(found.certificate.bounds, rf.certify(expected).bounds, rtol=1e-8)
    result = rf.evaluate_bits_per_dim(found.flow, IMAGES, jax.random.key(1), mesh=mesh(), **ARGUMENTS)
    np.testing.assert_allclose(result, score, rtol=1e-8)
    z, _ = found.drawn.forward(IMAGES[:4] / 4.0, key=jax.random.key(2))
    np.testing.assert_allclose(z, expected.forward(IMAGES[:4] / 4.0, key=jax.random.key(2))[0], rtol=1e-8)


@pytest.mark.parametrize("layout", [None, "jit", "model"])
def test_before_the_first_update(layout):
    """The averaged flow is then that of the parameters, on one device (also traced) and on many."""
    trainer, start, _, _ = on_one_device()
    start = start._replace(ema=optax.EmaState(0 * start.ema.count, jax.tree.map(np.zeros_like, start.params)))
    if layout is None:
        found = [nnx.state(trainer.averaged_flow(start)), jax.jit(lambda s: nnx.state(trainer.averaged_flow(s)))(start)]
    else:
        placement, _ = placed(layout)
        found = [nnx.state(placement.averaged_flow(placement.to_checkpoint(placement.place(start))))]
    for state in found:
        chex.assert_trees_all_equal(nnx.filter_state(state, nnx.Param), start.params)


@pytest.mark.parametrize("layout", ["full", "model"])
def test_devices_keep_their_shares(layout):
    """Only the first device, which acts as the host, holds more than before, or more than its share of the flow."""
    placement, state = placed(layout)
    others = jax.devices()[1:]
    before = [bytes_on(device, jax.live_arrays()) for device in others]
    found = judged(placement, state)
    gc.collect()  # the flow before it was tightened
    arrays = jax.tree.leaves(nnx.state(found.flow))
    whole = sum(leaf.nbytes for leaf in arrays)
    for device, size in zip(others, before, strict=True):
        share = bytes_on(device, arrays)
        assert share < whole / 3
        assert bytes_on(device, jax.live_arrays()) - size <= share + 100, "a few scalars"
    kernel = max(jax.tree.leaves(state.ema.ema), key=lambda leaf: leaf.size)
    assert not kernel.is_fully_replicated
