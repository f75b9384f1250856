"""The repr of layers and flows: short, without running anything, whatever a module holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.lipschitz import deferred_norms
from resflow_jax.models.bases import Base
from tests.modes.calls import VECTORS, images, vectors


@pytest.fixture(scope="module")
def composed():
    def step(rngs):
        g = rf.LipschitzMLP(6, (8, 8), condition_dim=3, rngs=rngs)
        return rf.Chain([rf.ResidualBlock(g), rf.ActNorm((6,))])

    rngs = nnx.Rngs(0)
    layers = [
        rf.ActNorm((6,)),
        rf.ResidualStack(step, 8, rngs=rngs),
        rf.Invert(rf.ResidualBlock(rf.LipschitzMLP(6, (), activation="tanh", coefficient=0.5, rngs=rngs))),
        rf.ResidualBlock(nnx.Linear(6, 6, rngs=rngs), lipschitz=0.9),
        rf.Reshape((6,), (2, 3)),
    ]
    return rf.Flow(rf.Chain(layers), rf.DiagonalNormal((2, 3)))


TABLE = """\
Flow: x (6,), z (2, 3), condition (3,), 10 residual blocks, float64, 26,604 parameters
 layer event shape parameters Lip(g) bound
 ActNorm((6,)) (6,) 12
 ResidualStack(8 x [ResidualBlock(LipschitzMLP(6, hidden=(8, 8), condition_dim=3)), ActNorm((6,))]) (6,) 26,496 \
0.940918
 Invert(ResidualBlock(LipschitzMLP(6, hidden=(), activation=tanh, coefficient=0.5))) (6,) 42 0.5
 ResidualBlock(TrustedContraction(Linear(6, 6), 0.9)) (6,) 42 0.9, not proved
 Reshape((6,), (2, 3)) (6,) -> (2, 3) 0
 base: DiagonalNormal((2, 3)) (2, 3) 12"""


def squeezed(text):
    return re.sub(" +", " ", text)


def test_table(composed):
    assert squeezed(repr(composed)) == TABLE
    assert str(composed) == repr(composed)
    assert max(map(len, repr(composed).splitlines())) <= 150
    starts = {line.index("(6,)", 100) for line in repr(composed).splitlines()[2:6]}
    assert len(starts) == 1  # the columns are aligned


@pytest.mark.parametrize("layers", [1, 8])
def test_a_stack_alone(layers):
    """The depth is there where the stack is the whole flow, on one line and on several."""

    def step(rngs):
        block = rf.ResidualBlock(rf.LipschitzMLP(3, (2,) * layers, rngs=rngs))
        return rf.Chain([block, rf.ActNorm((3,))])

    with deferred_norms():
        flow = rf.Flow(rf.ResidualStack(step, 5, rngs=nnx.Rngs(0)))
    assert ("ResidualStack(5 x [ResidualBlock(" if layers == 1 else "\n  ResidualStack: 5 x ") in repr(flow)
    assert repr(flow.bijector).startswith("ResidualStack: 5 x: events (3,), ")


def test_parameters_add_up(composed):
    """The number of parameters is that of the arrays, and the lines of a table have it all."""
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(composed, nnx.Param)))
    lines = repr(composed).splitlines()
    assert f"{total:,} parameters" in lines[0]
    top = [line for line in lines[2:] if re.match(r"  \S", line)]
    assert sum(int(re.search(r"\)\s+([\d,]+)(\s|$)", line).group(1).replace(",", "")) for line in top) == total


@pytest.mark.parametrize("name", [*VECTORS, "images"])
def test_flows_of_configs(name):
    """A head, a line a layer, the base; the same for shapes alone, for tracers, and for whatever stands in the tree."""
    graphdef, state = images() if name == "images" else vectors(name)
    flow = nnx.merge(graphdef, state)
    text = repr(flow)
    assert len(text.splitlines()) < 25 and "Array(" not in text and "..." not in text
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param)))
    assert text.startswith(type(flow).__name__) and f"{total:,} parameters" in text and "base: StandardNormal" in text
    assert repr(nnx.merge(graphdef, jax.eval_shape(lambda: state))) == text
    seen = []
    jax.jit(lambda state: seen.append(repr(nnx.merge(graphdef, state))))(state)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    jax.vmap(lambda state: seen.append(repr(nnx.merge(graphdef, state))))(stacked)
    assert seen == [text, text]
    assert f"{2 * total:,} parameters" in repr(nnx.merge(graphdef, stacked))
    assert repr(nnx.merge(graphdef, jax.tree.map(lambda _: object(), state))).startswith(type(flow).__name__)
    if name == "images":
        assert "classifier: Classifier(" in text and "\n  MultiScale " in text and "(2, 2, 1) -> (1, 1, 4)" in text
    if name == "mixed norms":
        assert "norms=(inf, 1, inf)" in text
    if name == "learned norms":
        assert "norms=learned" in text


def test_lines():
    """Layers, contractions and bases by the arguments of their constructors."""
    rngs = nnx.Rngs(0)
    net = rf.DenseNet(4, 2, 6, rngs=rngs)
    expected = {
        rf.ActNorm((3,)): "ActNorm((3,))  # 6 parameters",
        rf.Permutation([1, 0]): "Permutation((1, 0), axis=-1)",
        rf.Squeeze((4, 4, 1)): "Squeeze((4, 4, 1))",
        rf.Logit(1e-3): "Logit(0.001)",
        rf.Logit(1e-3, -1.0, 2.0): "Logit(0.001, low=-1, high=2)",
        rf.MovingBatchNorm((2,)): "MovingBatchNorm((2,))  # 4 parameters",
        rf.Normalization([1.0], [2.0]): "Normalization(float64[1], float64[1])",
        rf.InvertibleLinear(3, rngs=rngs): "InvertibleLinear(3)  # 21 parameters",
        rf.ChannelPadding(2, "gaussian"): "ChannelPadding(2, noise='gaussian')",
        rf.LipschitzDense(3, 4, 0.9, rngs=rngs): "LipschitzDense(3, 4, coefficient=0.9)  # 16 parameters",
        rf.LipschitzConv((4, 4), 1, 2, padding="periodic", rngs=rngs): (
            "LipschitzConv((4, 4), 1, 2, kernel_size=3, padding='periodic')  # 20 parameters"
        ),
        net: f"DenseNet((4,), depth=2, growth=6, kernel=3)  # {_size(net):,} parameters, Lip(g) bound 0.941192",
        rf.StandardNormal((2, 2)): "StandardNormal((2, 2))",
        rf.MixtureOfNormals(2, (3,), rngs=rngs): "MixtureOfNormals(2, (3,))  # 14 parameters",
        rf.Exp(): "Exp()",
        rf.Chain([]): "Chain([])",
    }
    for layer, text in expected.items():
        assert repr(layer) == text


def _size(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


class Shift(rf.Bijector):
    """A layer as a user writes it."""

    def __init__(self, dim, offset=0.0):
        self.event_shape = (dim,)
        self.offset = offset
        self.shift = nnx.Param(jnp.zeros(dim))

    def output_shape(self, shape):
        raise ZeroDivisionError


class Half(rf.Contraction):
    lipschitz = 0.5

    def __call__(self, x, condition=None):
        return 0.5 * x


class Named(rf.Flow):
    def __repr__(self):
        return "mine"


def test_modules_of_a_user(composed):
    assert repr(Shift(3, 1.5)) == "Shift(offset=1.5)  # 3 parameters"
    assert repr(Half()) == "Half()  # Lip(g) bound 0.5, not proved"
    chain = rf.Chain([rf.ResidualBlock(Half()), rf.ActNorm((3,))])
    chain.bijectors.append(Shift(3))
    assert [line.split()[0] for line in repr(chain).splitlines()[2:]] == [
        "ResidualBlock(Half())",
        "ActNorm((3,))",
        "Shift()",
    ]
    assert "events ?" in repr(chain) and "Shift()                ?  " in repr(chain)
    chain.event_shape = (3,)
    assert "(3,) -> ?" in repr(chain)
    own = Named(composed.bijector, composed.base)
    assert repr(own) == str(own) == "mine"

    class Around(nnx.Module):
        def __init__(self, flow):
            self.flow = flow

    assert repr(Around(own)).endswith("flow=mine\n)")
    around = repr(Around(composed))
    assert len(around.splitlines()) == len(repr(composed).splitlines()) + 2 and "  Reshape((6,), (2, 3))" in around
    nested = rf.Flow(rf.Chain([rf.ActNorm((2, 3))]), base=rf.Flow(rf.Exp(), rf.StandardNormal((2, 3))))
    assert "base: ObjectBase(Flow((2, 3) to (2, 3), blocks=0), (2, 3))" in repr(nested)


def test_modules_half_made(composed):
    """Without attributes, before and in __init__, and with attributes of other types."""
    for cls in [rf.Flow, rf.ResidualFlow, rf.Chain, rf.ResidualStack, rf.LipschitzMLP, rf.DenseNet, Bijector, Base]:
        assert re.match(rf"{cls.__name__}\(.*\)$", repr(cls.__new__(cls))), cls
    seen = []

    class Late(rf.Chain):
        def __init__(self, bijectors):
            seen.append(repr(self))
            super().__init__(bijectors)
            seen.append(repr(self))
            self.bijectors = None
            seen.append(repr(self))

    Late([rf.Exp()])
    assert seen[0] == "Late(...)" and "Exp()" in seen[1] and seen[2].startswith("Late(")
    flow = nnx.clone(composed)
    flow.event_shape = "wrong"
    assert repr(flow).startswith("Flow")
    block = rf.ResidualBlock(Half())
    block.contraction = block
    assert repr(block).startswith("ResidualBlock(")


def test_nothing_runs(composed, monkeypatch):
    """A repr reads shapes only: no array is read, and no layer is applied."""

    def fail(*args, **kwargs):
        raise AssertionError

    text = repr(composed)
    for cls in (rf.ActNorm, rf.LipschitzMLP, rf.ResidualStack, rf.ResidualBlock):
        for name in ("__call__", "transform", "apply", "weights", "certified_bounds"):
            if hasattr(cls, name):
                monkeypatch.setattr(cls, name, fail)
    monkeypatch.setattr(np, "asarray", fail)
    monkeypatch.setattr(jnp, "asarray", fail)
    assert repr(composed) == text


def test_display(composed, capsys):
    """The displays of modules in Flax still work."""
    nnx.display(composed.bijector.bijectors[0])
    assert capsys.readouterr().out == "ActNorm((6,))  # 12 parameters\n"
    treescope = pytest.importorskip("treescope")
    rendered = treescope.render_to_text(composed)
    assert "bijector=" in rendered and "DiagonalNormal" in rendered
    assert "ActNorm" in repr(nnx.List([rf.ActNorm((2,))]))
    assert "NormState" in repr(nnx.state(composed))
