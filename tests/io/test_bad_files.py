"""Files that are damaged, of another kind or of another flow are refused, with what is wrong."""

import json

import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.interop.flows import make_flow
from tests.io.flows import conditional_flow
from tests.io.rewriting import BASE, restructure, rewrite


def test_a_flow_unlike_that_of_the_file(composed_path):
    """The error names what differs."""
    with pytest.raises(ValueError, match=r"contraction.coefficient: expected 0.8, got 0.7$"):
        rf.load(composed_path, like=conditional_flow(nnx.Rngs(0), coefficient=0.7))
    with pytest.raises(ValueError, match=r"like: expected .* ResidualFlow, for which the metadata have no config$"):
        rf.load(composed_path, like=make_flow())
    with pytest.raises(ValueError, match=r"like: .*bijector: expected Chain, got ActNorm$"):
        rf.load(composed_path, like=rf.Flow(rf.ActNorm((3,)), BASE))


def test_a_flow_of_another_config(path, flow):
    other = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,), coefficient=0.7), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"like: .*coefficient: expected 0.8, got 0.7$"):
        rf.load(path, like=other)
    with pytest.raises(
        ValueError, match=r"like: expected a flow like that of the file, got Flow, for which .* structure"
    ):
        rf.load(path, like=rf.Flow(rf.ActNorm((3,)), BASE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, metadata: metadata.pop("format"), "format: expected 'resflow_jax' in the metadata, got None"),
        (
            lambda arrays, metadata: metadata.update(format_version="3", version="7.1"),
            "format_version: expected at most 2, which version .* reads, got 3, written by version 7.1",
        ),
        (lambda arrays, metadata: metadata.update(format_version="x"), "format_version: expected an integer, got 'x'"),
        (lambda arrays, metadata: metadata.pop("config"), "expected the config or the structure of a flow in the meta"),
        (lambda arrays, metadata: metadata.update(config="{"), "config: expected JSON of a config of type"),
        (lambda arrays, metadata: metadata.update(config='{"type": "Other"}'), "config: expected JSON of a config of"),
        (
            lambda arrays, metadata: metadata.update(config='{"type": "VectorFlowConfig", "dim": 2, "depth": 3}'),
            r"config: expected the fields of VectorFlowConfig, got others \(unknown: depth\)",
        ),
        (lambda arrays, metadata: arrays.pop(next(iter(arrays))), "arrays: .* arrays missing: "),
        (lambda arrays, metadata: arrays.update({"params.other": np.zeros(2)}), "arrays unknown: params/other"),
        (
            lambda arrays, metadata: arrays.update({"params.bijector.bijectors.0.shift": np.zeros(3)}),
            r"params/bijector/bijectors/0/shift of shape \(2,\), got \(3,\)",
        ),
        (
            lambda arrays, metadata: arrays.update({"params.bijector.bijectors.0.shift": np.zeros(2, int)}),
            r"params/bijector/bijectors/0/shift of a dtype like float64, got int64",
        ),
    ],
)
def test_bad_files(change, message, path):
    """The error names the file and what is wrong with it."""
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as error:
        rf.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layers: layers[0].update(type="Sabotage"),
            r"bijectors\[0\]: expected a class of resflow_jax, got 'Sab",
        ),
        (
            lambda layers: layers[0].update(type=["os"]),
            r"bijectors\[0\]: expected a class of resflow_jax, got \['os'",
        ),
        (lambda layers: layers[0].update(type="os.system"), r"expected a class of resflow_jax, got 'os.system'"),
        (lambda layers: layers[0]["arguments"].update(size=3), r"\[0\]: expected arguments of ActNorm, got size"),
        (lambda layers: layers[0]["arguments"].clear(), r"\[0\]: expected arguments that ActNorm takes, got others: "),
        (lambda layers: layers[0]["arguments"].update(shape="abc"), r"\[0\]: expected arguments that ActNorm takes"),
        (
            lambda layers: layers[0].pop("arguments"),
            r"\[0\]: expected the type and the arguments of a layer, got",
        ),
        (
            lambda layers: layers[3]["arguments"].pop("depth"),
            r"\[3\]: expected the arguments step and depth, got none",
        ),
        (lambda layers: layers[3]["arguments"]["step"].update(type="Other"), r"\[3\].step: expected a class of"),
        (
            lambda layers: layers.pop(),
            r"arrays unknown: constants/bijector/bijectors/4/mean, .*/4/std;",
        ),
        (lambda layers: layers.__setitem__(0, 3), r"bijectors\[0\]: expected Bijector, got int"),
    ],
)
def test_bad_structures(change, message, composed_path):
    """The error names the file, the place and what is wrong there."""
    restructure(composed_path, change)
    with pytest.raises(ValueError, match=message) as error:
        rf.load(composed_path)
    assert str(composed_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "structure: expected JSON, got"),
        ("[" * 100_000, "structure: expected"),
        (json.dumps({"type": "ActNorm", "arguments": {"shape": [3]}}), "structure: expected Flow, got ActNorm"),
    ],
)
def test_a_structure_that_is_none(text, message, composed_path):
    rewrite(composed_path, lambda arrays, metadata: metadata.update(structure=text))
    with pytest.raises(ValueError, match=message):
        rf.load(composed_path)


def test_layers_nested_without_end(composed_path):
    nested = {"type": "ActNorm", "arguments": {"shape": [3]}}
    for _ in range(400):
        nested = {"type": "Invert", "arguments": {"bijector": nested}}
    text = json.dumps({"type": "Flow", "arguments": {"bijector": nested}})
    rewrite(composed_path, lambda arrays, metadata: metadata.update(structure=text))
    with pytest.raises(ValueError):
        rf.load(composed_path)


def test_other_files(path):
    whole = path.read_bytes()
    for part in (b"", whole[:100], whole[:-8], b"\xff" * 300):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="expected a file of safetensors, could not read it"):
            rf.load(path)
    with pytest.raises(FileNotFoundError, match=r"path: expected a file of safetensors, got .*none"):
        rf.load(path.with_name("none"))


def test_what_is_no_flow(tmp_path):
    with pytest.raises(ValueError, match="flow: expected Flow, got ActNorm"):
        rf.save(tmp_path / "flow.safetensors", rf.ActNorm((3,)))
    with pytest.raises(ValueError, match=r"like: expected Flow, got int"):
        rf.load(tmp_path / "flow.safetensors", like=3)
