"""Flows come back from files as they were, bit for bit, those of a user's classes with `like`."""

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
from safetensors.numpy import load_file

import resflow_jax as rf
from resflow_jax.io import files
from resflow_jax.io.structure import build, describe
from resflow_jax.io.whole_files import whole_file
from tests.io.flows import CONDITION, conditional_flow, perturbed
from tests.io.rewriting import BASE, X, restructure


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
    monkeypatch.setattr("resflow_jax.functional.power_iteration.power_iteration", None)
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
    """A file stores shared arrays once, without their uses, so loading is refused; the error names the remedy."""
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


def test_arguments_that_a_file_does_not_have_take_their_default(tmp_path):
    """A file from before an argument was added is loaded with its default."""
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


@pytest.mark.parametrize("directory", ["missing", "file"])
def test_a_place_that_cannot_be_written(directory, flow, tmp_path):
    """The error is that of the documentation, and names the path; a missing directory is not made."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"path: could not write .*{directory}/flow\.safetensors: .*irectory"):
        rf.save(tmp_path / directory / "flow.safetensors", flow)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match=f"{directory}/text"), whole_file(tmp_path / directory / "text") as temporary:
        temporary.write_text("new")


def test_two_writers_of_one_path(tmp_path):
    """The one that ends last replaces the other's file; each writes its own, and none of the user's is touched."""
    path, own = tmp_path / "flow", tmp_path / "flow.tmp"
    own.write_text("mine")
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and own.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [path, own]


def test_numbers_of_numpy_in_a_config(tmp_path):
    """The statistics of float32 data, and sizes, as NumPy gives them."""
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    data = rf.VectorTransform(mean=x.mean(0), std=x.std(0))
    config = rf.VectorFlowConfig(dim=np.int64(2), blocks=np.int32(1), hidden=(np.int64(4),), data=data)
    saved = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    rf.save(tmp_path / "flow.safetensors", saved)
    found = rf.load(tmp_path / "flow.safetensors")
    np.testing.assert_array_equal(found(x), saved(x))
    assert found.config.dim == 2 and found.config.data.mean == tuple(map(float, x.mean(0)))


class Logistic(rf.Base):
    """A base without arrays."""

    event_shape = (2,)

    def log_prob(self, z, condition=None):
        return jnp.sum(-jax.nn.softplus(z) - jax.nn.softplus(-z), axis=1)


@pytest.mark.parametrize("what", ["base", "bijector"])
def test_a_part_that_the_config_does_not_describe(what, tmp_path):
    """Is refused, and nothing is written; a composed flow of the same parts can be saved."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
    setattr(flow, what, Logistic() if what == "base" else rf.Chain([rf.Permutation((1, 0)), flow.bijector]))
    path = tmp_path / "flow.safetensors"
    with pytest.raises(ValueError, match=f"flow: expected the {what} that its config describes"):
        rf.save(path, flow)
    assert not path.exists()
    composed = rf.Flow(flow.bijector, flow.base)
    rf.save(path, composed)
    assert rf.load(path, like=composed).base.event_shape == (2,)
    if what == "base":
        with pytest.raises(ValueError, match="flow: expected the base N"):
            rf.save_torch_checkpoint(flow, tmp_path / "flow.pth")


def test_settings_that_a_config_does_not_describe(tmp_path):
    """A solver or a head set anew is refused; the file would have the one of the config."""
    path = tmp_path / "flow.safetensors"
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,), block="monotone"), rngs=nnx.Rngs(0))
    (block,) = (module for _, module in nnx.iter_modules(flow) if isinstance(module, rf.MonotoneBlock))
    block.solver = rf.Anderson(on_failure="warn")
    with pytest.raises(ValueError, match=r"got one with another solver of MonotoneBlock; save rf\.Flow"):
        rf.save(path, flow)
    config = rf.ClassifierConfig((4, 4, 1), 3, blocks=(1,), hidden_channels=(4,), padding=0)
    network = rf.ResNetClassifier(config, rngs=nnx.Rngs(0))
    network.head = rf.PooledHead(network.latent_shape, 3, activation="relu", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"flow: expected the head .* another activation of PooledHead; save rf\.Cl"):
        rf.save(path, network)
    assert not path.exists()
    composed = rf.Classifier(network.bijector, network.head, network.base)
    rf.save(path, composed)
    assert rf.load(path).head.activation == network.head.activation
    rf.make_reversible(flow := rf.ResidualFlow(rf.VectorFlowConfig(2, 2, (4,)), rngs=nnx.Rngs(0)))
    rf.save(path, flow)


@pytest.mark.parametrize("x64", [False, True])
def test_a_flow_made_in_another_mode(x64, tmp_path):
    """The default dtype is no setting of a flow: it may differ when the flow is saved."""
    with jax.enable_x64(x64):
        flow = rf.ResidualFlow(rf.VectorFlowConfig(2, 1, (4,), condition_dim=3), rngs=nnx.Rngs(0))
    with jax.enable_x64(not x64):
        rf.save(tmp_path / "flow.safetensors", flow)
        assert rf.load(tmp_path / "flow.safetensors").config == flow.config


class WithScales(rf.Flow):
    """A flow of the user's with an array of the name that flows had before they were compositions."""

    def __init__(self, bijector):
        super().__init__(bijector, event_shape=(2,))
        self.scales = nnx.Param(jnp.arange(2.0))


def test_an_attribute_with_an_old_name(tmp_path):
    """Its file is not taken for one of an earlier version."""
    flow = WithScales(rf.ActNorm((2,)))
    rf.save(tmp_path / "flow.safetensors", flow)
    flow.scales[...] = jnp.zeros(2)
    np.testing.assert_array_equal(rf.load(tmp_path / "flow.safetensors", like=flow).scales[...], [0.0, 1.0])


class Named(rf.Bijector):
    """A layer of a user with parameters in a dict."""

    def __init__(self, names):
        self.scales = nnx.Dict({name: nnx.Param(jnp.full(2, n + 2.0)) for n, name in enumerate(names)})

    def transform(self, x, condition=None):
        scale = jnp.prod(jnp.stack([scale[...] for scale in self.scales.values()]), axis=0)
        return scale[None] * x, jnp.full(x.shape[0], jnp.sum(jnp.log(scale)))


def test_names_with_points(tmp_path):
    """Such an array comes back; two arrays that a file could not tell apart are refused."""
    flow = rf.Flow(Named(["fc.1", "fc"]), rf.StandardNormal((2,)))
    rf.save(tmp_path / "flow.safetensors", flow)
    like = rf.Flow(Named(["fc.1", "fc"]), rf.StandardNormal((2,)))
    like.bijector.scales["fc.1"][...] = jnp.zeros(2)
    np.testing.assert_array_equal(rf.load(tmp_path / "flow.safetensors", like=like)(jnp.ones((1, 2))), [[6.0, 6.0]])
    nested = Named(["a.b"])
    nested.scales["a"] = nnx.Dict({"b": nnx.Param(jnp.ones(2))})
    with pytest.raises(ValueError, match=r"flow: expected arrays of different names, got two of the name params.*a\.b"):
        rf.save(tmp_path / "other.safetensors", rf.Flow(nested, rf.StandardNormal((2,))))
