"""Flows as files of safetensors come back as they were; other files are refused with what is wrong."""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.interop.flows import make_flow

pytest.importorskip("safetensors", reason="needs the extra safetensors")
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from resflow_jax.interop import safetensors
from resflow_jax.io.config_json import config_from_json, config_to_json


@pytest.fixture(scope="module")
def flow():
    return make_flow()


@pytest.fixture
def path(flow, tmp_path):
    safetensors.save(flow, tmp_path / "flow.safetensors")
    return tmp_path / "flow.safetensors"


def test_round_trip(flow, path):
    """Config, arrays and so z are the same, bit for bit; the file alone is left, readable by others."""
    again = safetensors.load(path)
    assert again.config == flow.config
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(flow))
    x = jnp.asarray([[0.3, -0.2], [1.0, 2.0]])
    np.testing.assert_array_equal(again(x), flow(x))
    assert [file.name for file in path.parent.iterdir()] == ["flow.safetensors"]
    assert all(name.startswith(("params.", "norms.", "constants.")) for name in load_file(path))


def test_every_config_comes_back():
    """Tuples, infinite orders and what is not given; as JSON of the standard."""
    config = rf.ImageFlowConfig(
        (4, 4, 1),
        blocks=(1,),
        data=rf.ImageTransform(logit_alpha=None),
        norms=rf.Norms("12f1"),
        tail=rf.DenseTail(norms=(2, 2.5, 3, 2)),
    )
    text = config_to_json(config)
    assert config_from_json(text) == config
    json.loads(text, parse_constant=pytest.fail)


def test_nothing_is_lost_where_writing_fails(flow, path, monkeypatch):
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        safetensors.save(flow, path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, metadata: metadata.pop("config"), "expected the config of a flow in the metadata, got"),
        (lambda arrays, metadata: metadata.update(config="{"), "config: expected JSON of a config of type"),
        (lambda arrays, metadata: metadata.update(config='{"type": "Other"}'), "config: expected JSON of a config of"),
        (
            lambda arrays, metadata: metadata.update(config='{"type": "VectorFlowConfig", "dim": 2, "depth": 3}'),
            r"config: expected the fields of VectorFlowConfig, got others \(unknown: depth\)",
        ),
        (lambda arrays, metadata: arrays.pop(next(iter(arrays))), "variables: .* arrays missing: "),
        (lambda arrays, metadata: arrays.update({"params.other": np.zeros(2)}), "arrays unknown: params/other"),
    ],
)
def test_bad_files(change, message, path):
    """The error names the file and what is wrong with it."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    change(arrays, metadata)
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(ValueError, match=message) as error:
        safetensors.load(path)
    assert str(path) in str(error.value)


def test_other_files(path):
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected a file of safetensors, could not read it"):
        safetensors.load(path)
    with pytest.raises(FileNotFoundError, match=r"path: expected a file of safetensors, got .*none"):
        safetensors.load(path.with_name("none"))
