"""Collectives read from compiled programs, and what a training step sends: the gradients once, and scalars."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

import resflow_jax as rf
from experiments.studies import weak_scaling
from experiments.studies.parts.collectives import Collective, collectives
from experiments.studies.parts.competitors import Case
from experiments.studies.weak_scaling import WeakScalingConfig, estimate
from resflow_jax.training.losses import negative_log_likelihood
from resflow_jax.training.parallel import make_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py, not another platform"
)
TINY = Case(rf.ImageFlowConfig((8, 8, 1), blocks=(1,), hidden_channels=32, kernels=(3, 3), tail=rf.DenseTail(0)), 2)


def compiled(function, *args):
    spec = PartitionSpec("data")
    mapped = jax.shard_map(function, mesh=make_mesh(), in_specs=spec, out_specs=spec)
    return collectives(jax.jit(mapped).lower(*args).compile().as_text())


def test_collectives_of_known_programs():
    """Bytes of the results are counted once per loop iteration; infinitely often in loops of unknown length."""
    x = jnp.ones((8, 3, 5), jnp.float32)
    assert compiled(lambda x: x + lax.psum(x, "data"), x) == [Collective("all-reduce", 60, 1)]
    assert compiled(lambda x: lax.all_gather(x, "data")[:1, 0] + x, x) == [Collective("all-gather", 480, 1)]

    def nested(x):
        inner = lambda y, _: (lax.pcast(lax.psum(jnp.sin(y), "data"), "data", to="varying"), None)  # noqa: E731
        return lax.scan(lambda y, _: (lax.scan(inner, y, length=3)[0] + 1, None), x, length=5)[0]

    (found,) = compiled(nested, x)
    assert found == Collective("all-reduce", 60, 15)

    def endless(x):
        more = lambda y: lax.psum(jnp.max(y), "data") < 100  # noqa: E731
        return lax.while_loop(more, lambda y: 2 * y, x)

    assert math.inf in [one.times for one in compiled(endless, x)]
    assert compiled(lambda x: 2 * x, x) == []


def test_what_is_sent_in_a_step(tmp_path, capsys):
    """With each strategy a step has one all-reduce, of only the gradients and the scalars of the metrics."""
    config = WeakScalingConfig(devices=(2,), per_device=2, steps=1, workdir=tmp_path)
    result = weak_scaling.run(config, TINY)
    assert json.loads((tmp_path / "weak_scaling.json").read_text()) == result
    *replicated, full, model = result["measured"]
    assert [row["strategy"] for row in replicated] == ["jit", "shard_map", "pmap"]
    for row in replicated:
        assert row["kinds"] == ["all-reduce"] and row["number"] == 1
        assert row["gradient_bytes"] <= row["bytes"] <= row["gradient_bytes"] + row["scalar_bytes"]
        assert row["scalar_bytes"] <= 8 * (2 + 19), "loss and the diagnostics of one block"
    assert full["parameters"] == "full" and "all-gather" in full["kinds"]
    assert math.isfinite(full["bytes"]), "nothing is gathered within a loop of unknown length"
    assert model["parameters"] == "model" and model["devices"] == 2
    printed = capsys.readouterr().out
    assert "pmap" in printed and "TPU v5p" in printed


@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_accumulated_gradients_are_sent_once(strategy):
    """An update of three batches has one all-reduce of the mean gradient."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(4, blocks=1, hidden=(16,)), rngs=nnx.Rngs(0))
    trainer = Trainer(nnx.split(flow)[0], negative_log_likelihood(), optax.sgd(0.1), 0.9, accumulate=3)
    placement = Placement(trainer, make_mesh(), strategy)
    start = trainer.create_state(flow, rf.Roulette())
    args = placement.place(start), placement.place_batch(np.zeros((3, 16, 4))), jax.random.key(0)
    found = collectives(placement.step.lower(*args).compile().as_text())
    assert sum(one.times for one in found) == 1
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(start.params))
    assert gradients <= sum(one.nbytes for one in found) <= gradients + 8 * 21


def test_estimates():
    """A ring sends no bytes on one device, and nearly twice all bytes on many, at the speed of the slower network."""
    size = 4 * 25_174_129  # parameters of the papers' flow
    nvlink, cards, open_torus = (estimate(*args, images=8) for args in (("H100", 8), ("H100", 512), ("TPU v5p", 8)))
    assert estimate("H100", 1, 8)["all_reduce"] == 0
    assert nvlink["all_reduce"] == pytest.approx(2 * 7 / 8 * size / 450e9, rel=1e-3)
    assert cards["all_reduce"] == pytest.approx(2 * 511 / 512 * size / 400e9, rel=1e-3)
    assert open_torus["all_reduce"] == pytest.approx(2 * 7 / 8 * size / 300e9, rel=1e-3)
    assert nvlink["products"] == pytest.approx(8 * 154e9 / (0.3 * 495e12), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": ()}, "devices: expected one number or more, got none"),
        ({"per_device": 0}, "per_device: expected an integer of at least 1, got 0"),
        ({"accelerators": (8, 0)}, "accelerators: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    """Each is refused before anything is compiled."""
    with pytest.raises(ValueError, match=message):
        WeakScalingConfig(**settings)
