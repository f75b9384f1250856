"""Training on eight devices, in three ways, gives the steps of one device, however batch and parameters are divided."""

import dataclasses
from functools import cache

import chex
import jax
import jax.export
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import resflow_jax as rf
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.forms import replicate
from resflow_jax.training.losses import dequantized_bits_per_dim, negative_log_likelihood
from resflow_jax.training.parallel import (
    jit_train_step,
    make_mesh,
    part_of_process,
    pmap_train_step,
    shard_map_train_step,
)
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py, not another platform"
)

CONFIG = rf.ImageFlowConfig(
    (4, 4, 1),
    blocks=(1,),
    hidden_channels=64,
    kernels=(3, 3),
    preactivation="all",
    between=rf.BetweenBlocks(batchnorm=True),
    tail=rf.DenseTail(0),
)
IMAGES = np.random.default_rng(0).integers(0, 3, (3, 2, 16, 4, 4, 1)).astype(np.uint8)  # [update, batch, example, ...]
KEY = jax.random.key(7)
LAYOUTS = {
    "jit": ("jit", {}, "replicated"),
    "shard_map": ("shard_map", {}, "replicated"),
    "pmap": ("pmap", {}, "replicated"),
    "jit, kernels divided": ("jit", {"data": 2, "model": 4}, "model"),
    "jit, all divided": ("jit", {"data": 4, "model": 2}, "full"),
}


def make_trainer(accumulate):
    """Its gradients are clipped, and their sizes differ between devices."""
    flow = rf.ResidualFlow(CONFIG, rngs=nnx.Rngs(0))
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9))
    trainer = Trainer(nnx.split(flow)[0], dequantized_bits_per_dim(4), optimizer, 0.9, accumulate)
    return trainer, trainer.create_state(flow, rf.Roulette())


def batch_of(update, accumulate):
    return IMAGES[update] if accumulate == 2 else IMAGES[update, 0]


def check_shardings(state, placement):
    """Every array has the expected sharding."""

    def check(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    jax.tree.map(check, state, placement.shardings(state))


@cache
def on_one_device(accumulate):
    """Three updates on one device: the trainer, the states before and after, and all metrics."""
    trainer, start = make_trainer(accumulate)
    step, state, metrics = jax.jit(trainer.step), start, []
    for update in range(3):
        state, found = step(state, batch_of(update, accumulate), KEY)
        metrics.append(found)
    assert metrics[0]["gradient_norm"] > 0.2, "the gradient is clipped"
    return trainer, start, state, metrics


# One device does not accumulate for layouts with sizes. The others without: "jit" in `test_exact_log_dets`, "pmap" in
# `test_a_research_script`, "shard_map" in `test_class_losses`.
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_steps_of_one_device(layout):
    """State and metrics after three updates, running statistics and power iterations included; nothing else moves."""
    strategy, sizes, parameters = LAYOUTS[layout]
    trainer, start, expected, metrics = on_one_device(1 if sizes else 2)
    before = jax.tree.map(np.array, start)
    placement = Placement(trainer, make_mesh(**sizes), strategy, parameters)
    state = placement.place(start)
    for update in range(3):
        batch = placement.place_batch(batch_of(update, trainer.accumulate))
        state, found = placement.step(state, batch, KEY)
        chex.assert_trees_all_close(found, metrics[update], rtol=1e-7, atol=1e-9)
    if strategy != "pmap":
        assert placement.step._cache_size() == 1, "the state that a step gives back needs no other program"
    saved = placement.to_checkpoint(state)
    check_shardings(saved, placement)
    chex.assert_trees_all_close(placement.to_host(saved), expected, rtol=1e-7, atol=1e-9)
    chex.assert_trees_all_equal(start, before)
    lies = {leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(saved.params) if leaf.ndim == 5}
    assert (
        lies
        == {
            "replicated": {(1, 3, 3, 1, 64), (1, 3, 3, 64, 1)},
            "model": {(1, 3, 3, 1, 16), (1, 3, 3, 64, 1)},
            "full": {(1, 3, 3, 1, 8), (1, 3, 3, 8, 1)},
        }[parameters]
    )


def test_a_research_script_with_pmap():
    """A replicated state and an array [devices, per-device batch, ...], as `jax.pmap` takes them."""
    trainer, start, _, metrics = on_one_device(1)
    step = pmap_train_step(trainer)
    batch = batch_of(0, trainer.accumulate)
    batch = batch.reshape(*batch.shape[:-4], 8, 2, 4, 4, 1)
    state, found = step(replicate(start), np.moveaxis(batch, -5, 0), KEY)
    np.testing.assert_allclose(found["loss"], metrics[0]["loss"], rtol=1e-9)
    assert state.step.tolist() == [trainer.accumulate] * 8


def test_checkpoints_go_from_layout_to_layout(tmp_path):
    """Written where parameters are divided by eight, restored divided by four, by pmap, and on one device."""
    trainer, _, end, _ = on_one_device(1)
    eight = Placement(trainer, make_mesh(4, 2), "jit", "full")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(eight.to_checkpoint(eight.place(end)), 1.0)
        checkpoints.wait()
        for other in (
            Placement(trainer, make_mesh(2, 2, jax.devices()[:4]), "jit", "model"),
            Placement(trainer, make_mesh(devices=jax.devices()[:3]), "pmap"),
        ):
            restored = checkpoints.restore(int(end.step), end, other.shardings(end))
            check_shardings(restored, other)
            chex.assert_trees_all_equal(other.to_host(other.to_checkpoint(other.place(restored))), end)
        chex.assert_trees_all_equal(checkpoints.restore(int(end.step), end), end)


@pytest.mark.parametrize("strategy", ["shard_map", "pmap", "jit"])
def test_initialisation_by_shares(strategy):
    """ActNorm and running statistics are set from the whole batch, which is divided among the devices."""
    flow = rf.ResidualFlow(dataclasses.replace(CONFIG, hidden_channels=4), rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(1), (16, 4, 4, 1)) ** 2
    graphdef, state = nnx.split(flow)

    def initialized(state, x):
        flow = nnx.merge(graphdef, state, copy=True)
        flow.initialize(x)
        return nnx.state(flow)

    expected = initialized(state, x)
    if strategy == "shard_map":
        whole, shares = PartitionSpec(), PartitionSpec("data")
        apply = jax.jit(jax.shard_map(initialized, mesh=make_mesh(), in_specs=(whole, shares), out_specs=whole))
        found = apply(state, x)
    elif strategy == "pmap":

        def of_device(state, x):
            with rf.batch_axes("data"):
                return initialized(state, x)

        found = jax.pmap(of_device, "data", in_axes=(None, 0), out_axes=None)(state, x.reshape(8, 2, 4, 4, 1))
    else:
        shares = NamedSharding(make_mesh(), PartitionSpec("data"))
        found = jax.jit(initialized)(state, jax.device_put(x, shares))
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)


def test_exact_log_dets_divided_by_the_compiler():
    """LU decompositions of a batch that is divided, in value and gradient."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(5, blocks=1, hidden=(6,)), rngs=nnx.Rngs(0))
    trainer = Trainer(nnx.split(flow)[0], negative_log_likelihood(), optax.sgd(0.1), 0.9)
    start, x = trainer.create_state(flow, rf.Exact()), np.random.default_rng(0).normal(size=(16, 5))
    expected, metrics = jax.jit(trainer.step)(start, x, KEY)
    placement = Placement(trainer, make_mesh())
    state, found = placement.step(placement.place(start), placement.place_batch(x), KEY)
    chex.assert_trees_all_close((placement.to_host(state), found), (expected, metrics), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("make_step", [jit_train_step, shard_map_train_step])
def test_steps_of_eight_devices_lower_for_accelerators(platform, make_step):
    """With convolution instructions on TPUs and no host callback, and a sum over devices for each array of gradients.

    So sums may begin while the backward pass of others goes on, where XLA schedules them so. A GPU takes products for
    convolutions between one and many channels.
    """
    trainer, state = make_trainer(1)
    mesh = make_mesh()
    exported = jax.export.export(make_step(trainer, mesh), platforms=[platform])(state, IMAGES[0, 0], KEY)
    assert exported.nr_devices == 8
    text = exported.mlir_module()
    assert ("stablehlo.convolution" in text) == (platform == "tpu") and "callback" not in text
    assert text.count('"stablehlo.all_reduce"') >= len(jax.tree.leaves(state.params))


def test_parts_of_a_batch_by_process():
    """Contiguous rows of devices make one part; others are refused."""

    class Device:
        def __init__(self, process):
            self.process_index = process

    def part(processes):
        mesh = type("Mesh", (), {"devices": np.vectorize(Device, otypes=[object])(np.asarray(processes))})
        mesh.shape = {"data": len(processes)}
        return part_of_process(mesh)

    assert part([[0], [0], [1], [1]]) == (0, 2) and part([[1], [1], [0], [0]]) == (1, 2)
    assert part([[1, 1], [0, 1]]) == (1, 2) and part([[0, 1], [0, 1]]) == (0, 1)
    assert part([[0], [1], [0], [1]]) is None and part([[1], [0], [0], [1]]) is None and part([[1]]) is None


@pytest.mark.parametrize("strategy", ["jit", "shard_map", "pmap"])
def test_a_mesh_of_data_alone(strategy):
    """It is as one of `make_mesh` with one device along "model"; other meshes are refused."""
    trainer, start, _, _ = on_one_device(2)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    placement, usual = Placement(trainer, mesh, strategy), Placement(trainer, make_mesh(), strategy)
    assert (placement.part, placement.parts) == (usual.part, usual.parts)
    for own, expected in zip(*(jax.tree.leaves(p.shardings(start)) for p in (placement, usual)), strict=True):
        assert own.is_equivalent_to(expected, 0)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    for other in (Mesh(np.array(jax.devices()), ("x",)), explicit):
        with pytest.raises(ValueError, match=r'mesh: expected a mesh from training.make_mesh, .* "data"; got Mesh'):
            Placement(trainer, other, strategy)


def test_bad_layouts_are_named(monkeypatch):
    """Sizes that do not fit, and settings that a strategy does not support."""
    trainer, start, _, _ = on_one_device(2)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"mesh: expected .* each process an equal slice"),
    ):
        patch.setattr("resflow_jax.training.placement.part_of_process", lambda mesh: None)
        Placement(trainer, make_mesh())
    for sizes, message in [
        ({"data": 3}, "mesh: expected sizes whose product is 8, the number of devices, got data 3 . model 1 = 3"),
        ({"data": 4, "model": 3}, "mesh: .* got data 4 . model 3 = 12"),
        ({"model": 3}, "mesh.model: expected a divisor of 8, the number of devices, got 3"),
        ({"data": 0}, "mesh.data: expected an integer of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_mesh(**sizes)
    for arguments, message in [
        (("threads",), "strategy: expected one of jit, shard_map, pmap; got 'threads'"),
        (("jit", "halved"), "parameters: expected one of replicated, model, full; got 'halved'"),
        (("pmap", "full"), 'mesh.parameters: expected "replicated" with pmap, got "full"'),
    ]:
        with pytest.raises(ValueError, match=message):
            Placement(trainer, make_mesh(), *arguments)
    for strategy in ("shard_map", "pmap"):
        with pytest.raises(
            ValueError, match=f'parallel: expected "jit" with 2 devices along "model", got "{strategy}"'
        ):
            Placement(trainer, make_mesh(4, 2), strategy)
    message = "batch_size: expected a multiple of 8, the number of devices that share a batch, got 12"
    with pytest.raises(ValueError, match=message):
        Placement(trainer, make_mesh()).check_batch_size(12)
    batch = IMAGES[0][:, :12]
    with pytest.raises(ValueError, match=message):
        jit_train_step(trainer, make_mesh())(start, batch, KEY)
