"""Flows are pickled, copied and tabulated like any module of Flax NNX, and are not changed by it."""

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.activations import Activation
from resflow_jax.layers.module import Module
from tests.modes.calls import KEY, PIXELS, VECTORS, X, images, vectors

INPUTS = {**dict.fromkeys(VECTORS, X), "images": PIXELS}
WAYS = {"pickle": lambda flow: pickle.loads(pickle.dumps(flow)), "deepcopy": copy.deepcopy, "clone": nnx.clone}


def flow_named(name):
    return nnx.merge(*(images() if name == "images" else vectors(name)), copy=True)


def assert_unchanged(flow, name, expected):
    """Checks that structure, variables and result are those of an unchanged flow."""
    graphdef, state = nnx.split(flow)
    other_graphdef, other = nnx.split(flow_named(name))
    assert graphdef == other_graphdef and hash(graphdef) == hash(other_graphdef)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    np.testing.assert_array_equal(flow(INPUTS[name]), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", INPUTS)
def test_copies(name, way):
    """A copy is equal, shares the compiled programs, and changes without the original."""
    flow = flow_named(name)
    expected = flow(INPUTS[name])
    duplicate = WAYS[way](flow)
    assert_unchanged(duplicate, name, expected)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(duplicate), nnx.state(flow))
    nnx.update(duplicate, jax.tree.map(lambda leaf: leaf + 1, nnx.state(duplicate, nnx.Param)))
    assert_unchanged(flow, name, expected)


def test_pickled_in_another_process(tmp_path):
    """What one process writes another reads, of the same numbers."""
    path = tmp_path / "flow.pickle"
    program = """
import pickle, sys, jax
from flax import nnx
jax.config.update("jax_enable_x64", True)
flow = pickle.load(open(sys.argv[1], "rb"))
print(flow.config, float(sum(abs(leaf).sum() for leaf in jax.tree.leaves(nnx.state(flow)))))
"""
    flow = flow_named("plain")
    path.write_bytes(pickle.dumps(flow))
    out = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
    *config, total = out.split()
    assert " ".join(config) == str(flow.config)
    np.testing.assert_allclose(float(total), sum(abs(leaf).sum() for leaf in jax.tree.leaves(nnx.state(flow))))


@pytest.mark.parametrize("name", rf.ACTIVATIONS)
def test_activations(name):
    """Each stays the very object that it is, so that programs compiled for it are found again."""
    for way in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert way(rf.ACTIVATIONS[name]) is rf.ACTIVATIONS[name]


def test_an_activation_of_ones_own():
    """It is pickled as any dataclass, also under a name that is taken."""
    for name in ("own", "relu"):
        own = Activation(name, np.add)
        assert pickle.loads(pickle.dumps(own)) == own


@pytest.mark.parametrize("value", [rf.Roulette(rf.Poisson(3.0)), rf.Exact(), rf.Broyden(memory=3), rf.DenseMap(2, 3)])
def test_settings(value):
    """Estimators, laws, solvers and maps are values."""
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


def methods():
    """All methods of all classes of modules."""
    classes = [Module]
    for cls in classes:
        classes += cls.__subclasses__()
    return {(cls, name): value for cls in classes for name, value in vars(cls).items() if callable(value)}


@pytest.mark.parametrize("name", INPUTS)
def test_tabulate(name):
    """The table has the layers with their shapes, twice the same, and the flow stays as it was."""
    flow, x = flow_named(name), INPUTS[name]
    expected = flow(x)
    before = methods()
    table = nnx.tabulate(flow, x, console_kwargs={"width": 400, "force_terminal": False})
    for text in (type(flow).__name__, "ResidualStack", "LipschitzLinear", f"float64[{len(x)}", "kernel: float64["):
        assert text in table
    assert nnx.tabulate(flow, x, console_kwargs={"width": 400, "force_terminal": False}) == table
    assert {key: before[key] for key in before} == {key: methods()[key] for key in before}
    assert_unchanged(flow, name, expected)


def test_tabulate_with_a_condition():
    """Networks of a condition are layers of Flax, and stay as they were."""
    before, of_flax = methods(), nnx.Linear.__call__
    rngs = nnx.Rngs(0)
    layers = [rf.ResidualBlock(rf.LipschitzMLP(2, (2,), condition_dim=1, rngs=rngs))]
    layers.append(rf.Affine((2,), condition_dim=1, rngs=rngs))
    flow = rf.Flow(rf.Chain(layers))
    table = nnx.tabulate(flow, jnp.ones((3, 2)), jnp.ones((3, 1)), console_kwargs={"width": 400})
    assert "Conditioning" in table
    assert "ConditionedParams" in table
    assert {key: methods()[key] for key in before} == before
    assert nnx.Linear.__call__ is of_flax


@pytest.mark.parametrize("method", ["log_prob", "inverse"])
def test_tabulate_another_method(method):
    """The table has any method that takes and returns arrays."""
    options = {"key": KEY} if method == "log_prob" else {}
    assert method in nnx.tabulate(flow_named("plain"), X, method=method, **options)


class Twice(nnx.Module):
    """A user's module around a flow."""

    def __init__(self, flow):
        self.flow = flow

    def __call__(self, x):
        return 2 * self.flow(x)


def test_tabulate_leaves_inherited_methods_inherited():
    """The classes have no names of their own that they did not have before, also after one that failed."""
    flow = flow_named("plain")
    with pytest.raises(ValueError, match="x: expected"):
        nnx.tabulate(flow, X[:, :1])
    assert not {"log_prob", "update_statistics", "set_attributes"} & set(vars(rf.ResidualFlow))
    nnx.tabulate(flow, X)
    assert not {"log_prob", "update_statistics", "set_attributes", "__call__"} & set(vars(rf.ResidualFlow))


def test_tabulate_a_module_around_a_flow():
    assert "LipschitzLinear" in nnx.tabulate(Twice(flow_named("plain")), X, console_kwargs={"width": 400})


def failing(flow):
    """A module that fails after the first layer of a flow; it has a new class, since Flax leaves the class changed."""

    class Failing(nnx.Module):
        def __init__(self):
            self.flow = flow

        def __call__(self, x):
            self.flow.scales[0].bijectors[0](x)
            raise ZeroDivisionError

    return Failing()


@pytest.mark.parametrize(
    ("error", "summarize"),
    [
        (ValueError, lambda flow: nnx.tabulate(flow, X[:, :1])),
        (KeyError, lambda flow: nnx.tabulate(flow, X, method="unknown")),
        (ZeroDivisionError, lambda flow: nnx.tabulate(failing(flow), X)),
    ],
)
def test_a_table_that_fails_breaks_nothing(error, summarize):
    """Flows are made, used and tabulated after it as before."""
    flow = flow_named("plain")
    expected, table = flow(X), nnx.tabulate(flow, X)
    for _ in range(2):
        with pytest.raises(error):
            summarize(flow)
        assert_unchanged(flow, "plain", expected)
        rf.ResidualFlow(flow.config, rngs=nnx.Rngs(0)).initialize(jnp.asarray(X))
        assert nnx.tabulate(flow, X) == table
