"""Flows come back from files as they were, bit for bit; other files are refused with what is wrong."""

import json
import math
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import resflow_jax as rf
from resflow_jax.io import files
from resflow_jax.io.structure import build, describe
from tests.interop.flows import make_flow
from tests.io.flows import CONDITION, conditional_flow, perturbed

X = jnp.asarray([[0.3, -0.2, 0.5], [1.0, 2.0, -1.0]])
BASE = rf.StandardNormal((3,))


@pytest.fixture(scope="module")
def flow():
    return make_flow()


@pytest.fixture(scope="module")
def composed():
    return perturbed(conditional_flow(nnx.Rngs(0)))


@pytest.fixture
def path(flow, tmp_path):
    rf.save(tmp_path / "flow.safetensors", flow)
    return tmp_path / "flow.safetensors"


@pytest.fixture
def composed_path(composed, tmp_path):
    rf.save(tmp_path / "flow.safetensors", composed)
    return tmp_path / "flow.safetensors"


def rewrite(path, change):
    """Changes the arrays and the metadata of a file by change(arrays, metadata)."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    change(arrays, metadata)
    save_file(arrays, path, metadata=metadata)


def restructure(path, change):
    """Changes the layers of the chain of a file by change(list of descriptions)."""

    def of_metadata(arrays, metadata):
        structure = json.loads(metadata["structure"])
        change(structure["arguments"]["bijector"]["arguments"]["bijectors"])
        metadata["structure"] = json.dumps(structure)

    rewrite(path, of_metadata)


@pytest.mark.parametrize("with_like", [False, True])
def test_files_of_version_1(composed, composed_path, with_like):
    """Standard deviations, of ActNorms in stacks too and among a layer's arguments, were called `deviation`."""

    def former(arrays, metadata):
        for name in [name for name in arrays if name.endswith(".std")]:
            arrays[name.removesuffix("std") + "deviation"] = arrays.pop(name)
        metadata["structure"] = metadata["structure"].replace('"std"', '"deviation"')
        metadata["format_version"] = "1"
        assert sum(name.endswith(".deviation") for name in arrays) == 3 and '"deviation"' in metadata["structure"]

    rewrite(composed_path, former)
    again = rf.load(composed_path, like=composed if with_like else None)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(composed))
    np.testing.assert_array_equal(again(X, CONDITION), composed(X, CONDITION))


def test_a_flow_of_a_config_comes_back(flow, path):
    """Config, arrays and so z are the same, bit for bit; the file alone is left, readable by others."""
    again = rf.load(path)
    assert again.config == flow.config
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(flow))
    np.testing.assert_array_equal(again(X[:, :2]), flow(X[:, :2]))
    assert [file.name for file in path.parent.iterdir()] == ["flow.safetensors"]
    assert all(name.startswith(("params.", "norms.", "constants.")) for name in load_file(path))


def test_a_composed_flow_comes_back(composed, composed_path):
    """Structure and arrays; a fresh process gives the same bits, and so does `like`."""
    again = rf.load(composed_path)
    assert nnx.graphdef(again) == nnx.graphdef(composed)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(composed))
    expected = composed.log_prob(X, condition=CONDITION, estimator=rf.Exact())
    code = """if True:
        import jax, sys, numpy as np
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_disable_most_optimizations", True)
        import resflow_jax as rf
        x, condition, expected = np.load(sys.argv[2]).values()
        found = rf.load(sys.argv[1]).log_prob(x, condition=condition, estimator=rf.Exact())
        np.testing.assert_array_equal(found, expected)
    """
    np.savez(composed_path.with_suffix(".npz"), x=X, condition=CONDITION, expected=expected)
    arguments = [sys.executable, "-c", code, composed_path, composed_path.with_suffix(".npz")]
    subprocess.run(list(map(str, arguments)), check=True)
    other = conditional_flow(nnx.Rngs(1))
    before = jax.tree.map(jnp.copy, nnx.state(other))
    chex.assert_trees_all_equal(nnx.state(rf.load(composed_path, like=other)), nnx.state(composed))
    chex.assert_trees_all_equal(nnx.state(other), before)


def test_nothing_is_computed(composed_path, monkeypatch):
    """Neither parameters nor norms of a loaded flow are made first."""
    monkeypatch.setattr("resflow_jax.layers.lipschitz.advance", None)
    monkeypatch.setattr("resflow_jax.functional.norms.power_iteration", None)
    rf.load(composed_path)


class Sine(nnx.Module):
    """A user's own contraction."""

    def __init__(self):
        self.scale = nnx.Param(jnp.full(3, 0.4))

    def __call__(self, x):
        return self.scale[...] * jnp.sin(x)


class Shift(rf.Bijector):
    """A user's own layer."""

    def __init__(self, size):
        self.size = size
        self.shift = nnx.Param(jnp.full(size, 0.4))

    def transform(self, x, condition=None):
        return x + self.shift[...][None], jnp.zeros(x.shape[0], x.dtype)

    def invert(self, y, condition=None):
        return y - self.shift[...][None]


@pytest.mark.parametrize("layer", [lambda: rf.ResidualBlock(Sine(), lipschitz=0.5), lambda: Shift(3)])
def test_classes_of_the_user_need_a_flow_like_it(layer, tmp_path):
    """The file has their arrays; the error names the class and the remedy."""
    path = tmp_path / "flow.safetensors"
    flow = perturbed(rf.Flow(rf.Chain([rf.ActNorm((3,)), layer()]), BASE))
    rf.save(path, flow)
    with pytest.raises(ValueError, match=r"flow.safetensors: structure.bijector.bijectors\[1\].*(Sine|Shift)") as error:
        rf.load(path)
    assert "rf.load(path, like=flow)" in str(error.value)
    again = rf.load(path, like=rf.Flow(rf.Chain([rf.ActNorm((3,)), layer()]), BASE))
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(flow))


def test_a_layer_that_is_used_twice(tmp_path):
    """The file has its arrays once, and does not tell of both uses; the error names the remedy."""
    path = tmp_path / "flow.safetensors"

    def make():
        norm = rf.ActNorm((3,))
        return rf.Flow(rf.Chain([norm, rf.Permutation([2, 0, 1]), norm]), BASE)

    flow = perturbed(make())
    rf.save(path, flow)
    with pytest.raises(
        ValueError,
        match=r"bijectors/2/shift; a file does not tell which layers share arrays.* like=flow",
    ):
        rf.load(path)
    again = rf.load(path, like=make())
    np.testing.assert_array_equal(again(X), flow(X))
    assert again.bijector.bijectors[0] is again.bijector.bijectors[2]


def test_a_class_of_flows_of_the_user(tmp_path):
    """A subclass of a flow of a config has its own name in the file."""

    class Mine(rf.ResidualFlow):
        pass

    path = tmp_path / "flow.safetensors"
    flow = Mine(rf.VectorFlowConfig(2, 1, (3,)), rngs=nnx.Rngs(0))
    rf.save(path, flow)
    with pytest.raises(ValueError, match=r"structure: expected a class of resflow_jax, got .*Mine; rf.load"):
        rf.load(path)
    again = rf.load(path, like=Mine(flow.config, rngs=nnx.Rngs(1)))
    assert type(again) is Mine and again.config == flow.config
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(flow))


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


def test_arguments_that_a_file_does_not_have_take_their_default(tmp_path):
    """As of a file that was written before an argument was added."""
    path = tmp_path / "flow.safetensors"
    rf.save(path, rf.Flow(rf.Chain([rf.ActNorm((3,)), rf.MovingBatchNorm((3,), decay=0.2, epsilon=1e-3)]), BASE))
    restructure(path, lambda layers: layers[1]["arguments"].pop("epsilon"))
    (_, norm) = rf.load(path).bijector.bijectors
    assert (norm.decay, norm.epsilon) == (0.2, 1e-4)


def test_arguments_of_all_kinds():
    """Infinite numbers too, which JSON of the standard has none of; arrays keep their dtype."""
    array = np.asarray([[0.1, np.inf], [-np.inf, np.nan]], np.float32)
    solver = rf.Broyden(tolerance=1e-7, memory=3)
    values = [None, True, 3, 0.1, math.inf, "a", ..., (1, (2,)), np.float32(0.5), array, nnx.Param(jnp.ones(2)), solver]
    values.append(rf.ACTIVATIONS["maxmin"])
    text = json.dumps(describe(values), allow_nan=False)
    found = build(json.loads(text), nnx.Rngs(0))
    assert found[:9] == (None, True, 3, 0.1, math.inf, "a", ..., (1, (2,)), 0.5) and found[11:] == tuple(values[11:])
    np.testing.assert_array_equal(found[9], array)
    np.testing.assert_array_equal(found[10], np.ones(2))
    assert (found[9].dtype, found[10].dtype) == (np.float32, np.float64)
    with pytest.raises(ValueError, match=r"^structure: expected inf, -inf or nan, got '1e400'"):
        build({"float": "1e400"}, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^structure: expected the numbers of an array with their dtype"):
        build({"array": ["a"], "dtype": "float32"}, nnx.Rngs(0))


def test_float32_files_load_in_float32(tmp_path):
    """The dtype is that of the file, where JAX has another default."""
    with jax.enable_x64(False):
        flow = conditional_flow(nnx.Rngs(0))
        expected = flow(X.astype(jnp.float32), condition=CONDITION.astype(jnp.float32))
        rf.save(tmp_path / "flow.safetensors", flow)
    again = rf.load(tmp_path / "flow.safetensors")
    assert again.dtype == jnp.float32
    np.testing.assert_allclose(again(X, condition=CONDITION), expected, atol=1e-6)


def test_keys_of_random_numbers(tmp_path):
    """A key inside of a user's module is saved as its data."""

    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

        def __call__(self, x):
            return 0.1 * x

    path = tmp_path / "flow.safetensors"
    block = lambda seed: rf.ResidualBlock(Noisy(nnx.Rngs(seed)), lipschitz=0.5, event_shape=(3,))  # noqa: E731
    solver = rf.Anderson(tolerance=1e-9)
    rf.save(path, rf.Flow(rf.Chain([block(3), rf.Invert(rf.ActNorm((3,)), solver)])))
    again = rf.load(path, like=rf.Flow(rf.Chain([block(4), rf.Invert(rf.ActNorm((3,)), solver)])))
    found, expected = (layer.contraction.module.rngs.default for layer in (again.bijector.bijectors[0], block(3)))
    np.testing.assert_array_equal(jax.random.key_data(found.key[...]), jax.random.key_data(expected.key[...]))
    assert found.count[...] == expected.count[...]


def test_nothing_is_lost_where_writing_fails(flow, path, monkeypatch):
    before = path.read_bytes()

    def fail(arrays, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        rf.save(path, flow)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


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
