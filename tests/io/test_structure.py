"""Every public layer, base and contraction is described by its arguments, and built of them again."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.io.structure import UnknownClassError, build, classes, describe
from resflow_jax.layers.lipschitz import deferred_norms
from resflow_jax.layers.module import Module

LOW, HIGH = [0, -np.inf, -1], [np.inf, np.inf, 1.0]
ABSTRACT = {"Base", "Bijector", "Contraction", "Coupling", "Flow", "ResidualFlow", "ResNetClassifier"}
# Their files have their config.
ABSTRACT |= {"AutoregressiveFlow", "ContinuousFlow", "CouplingFlow"}


def step(rngs):
    return rf.Chain([rf.InvertibleLinear(2, rngs=rngs), rf.ActNorm((2,))])


MLP = rf.MLPConditioner((4,), "tanh")

# An object of every class, with arguments that are not the default.
MAKERS = {
    "ActNorm": lambda rngs: rf.ActNorm((3,)),
    "AdditiveCoupling": lambda rngs: rf.AdditiveCoupling((4,), MLP, np.arange(4) < 1, True, 2, rngs=rngs),
    "AffineCoupling": lambda rngs: rf.AffineCoupling((4,), MLP, flipped=True, scale="sigmoid", rngs=rngs),
    "Affine": lambda rngs: rf.Affine((3,), condition_dim=2, rngs=rngs),
    "Bounded": lambda rngs: rf.Bounded(LOW, HIGH, alpha=1e-3, one_sided="softplus"),
    "Chain": lambda rngs: rf.Chain([rf.ActNorm((4,)), rf.Reshape((4,), (2, 2))]),
    "ChannelPadding": lambda rngs: rf.ChannelPadding(2, "gaussian", 0.5, 0.1),
    "Classifier": lambda rngs: rf.Classifier(
        rf.ZeroPadding(1), rf.PooledHead((4,), 3, rngs=rngs), rf.DiagonalNormal((4,)), event_shape=(3,)
    ),
    "ContinuousBlock": lambda rngs: rf.ContinuousBlock(
        rf.VelocityField((3,), MLP, 2, rngs=rngs), time=0.5, tolerance=1e-3, max_steps=20, adjoint="direct"
    ),
    "DenseNet": lambda rngs: rf.DenseNet(
        (4, 4, 2), 2, 4, first=4, kernel=1, padding="periodic", condition_dim=2, activation="tanh", rngs=rngs
    ),
    "DiagonalNormal": lambda rngs: rf.DiagonalNormal((3,), condition_dim=2, rngs=rngs),
    "Exp": lambda rngs: rf.Exp(),
    "Flatten": lambda rngs: rf.Flatten((2, 2)),
    "ImplicitBlock": lambda rngs: rf.ImplicitBlock(
        *(rf.LipschitzMLP(3, (n,), rngs=rngs) for n in (2, 3)), solver=rf.Broyden(memory=2)
    ),
    "Invert": lambda rngs: rf.Invert(rf.ActNorm((3,)), rf.Broyden(tolerance=1e-3, memory=2)),
    "InvertibleLinear": lambda rngs: rf.InvertibleLinear(3, rngs=rngs),
    "LipschitzCNN": lambda rngs: rf.LipschitzCNN(
        (4, 4, 1), (2,), (1, 3), padding="periodic", condition_dim=2, activation="tanh", coefficient=0.5, rngs=rngs
    ),
    "LipschitzConv": lambda rngs: rf.LipschitzConv((4,), 1, 2, 1, 0.5, padding="periodic", rngs=rngs, domain=1.0),
    "LipschitzDense": lambda rngs: rf.LipschitzDense(3, 2, 0.5, rngs=rngs, codomain=np.inf),
    "LipschitzMLP": lambda rngs: rf.LipschitzMLP(
        3,
        (4,),
        condition_dim=2,
        activation="tanh",
        coefficient=0.5,
        preactivation=True,
        norms=(2, np.inf, 2),
        rngs=rngs,
    ),
    "Logit": lambda rngs: rf.Logit(1e-3, -1.0, [1.0, 2.0]),
    "MaskedAutoregressive": lambda rngs: rf.MaskedAutoregressive(
        3, (4,), condition_dim=2, activation="tanh", rngs=rngs
    ),
    "MixtureCoupling": lambda rngs: rf.MixtureCoupling(
        (2, 2, 1), rf.CNNConditioner((4,), (3, 1)), "checkerboard", components=2, rngs=rngs
    ),
    "MixtureOfNormals": lambda rngs: rf.MixtureOfNormals(2, (3,), condition_dim=2, rngs=rngs),
    "MonotoneBlock": lambda rngs: rf.MonotoneBlock(rf.LipschitzMLP(3, (2,), rngs=rngs), solver=rf.Broyden(memory=2)),
    "MovingBatchNorm": lambda rngs: rf.MovingBatchNorm((3,), 0.2, 1e-3),
    "MovingCentering": lambda rngs: rf.MovingCentering((3,), 0.2),
    "MultiScale": lambda rngs: rf.MultiScale([rf.Squeeze((2, 2, 1)), rf.ActNorm((2,))], (2, 2, 1)),
    "Normalization": lambda rngs: rf.Normalization([0.0, 1.0], [2.0, 3.0]),
    "Permutation": lambda rngs: rf.Permutation([1, 2, 0], axis=-2),
    "PooledHead": lambda rngs: rf.PooledHead((2, 2, 3), 4, hidden=5, activation="tanh", rngs=rngs),
    "Reshape": lambda rngs: rf.Reshape((2, 2), (4, 1)),
    "ResidualBlock": lambda rngs: rf.ResidualBlock(rf.LipschitzMLP(3, (2,), rngs=rngs)),
    "ResidualStack": lambda rngs: rf.ResidualStack(step, 3, rngs=rngs),
    "Softplus": lambda rngs: rf.Softplus(),
    "Spline": lambda rngs: rf.Spline((3,), 5, 2.0),
    "SplineCoupling": lambda rngs: rf.SplineCoupling(
        (2, 2, 2), rf.ResNetConditioner(4, 1), bins=4, bound=2.0, rngs=rngs
    ),
    "Squeeze": lambda rngs: rf.Squeeze((2, 4, 1)),
    "StandardNormal": lambda rngs: rf.StandardNormal((3,)),
    "StridedBlock": lambda rngs: rf.StridedBlock(
        (2, 4, 1), 3, 2, stride=1, activation="tanh", preactivation=False, rngs=rngs
    ),
    "UnconstrainedBlock": lambda rngs: rf.UnconstrainedBlock(
        (2, 4, 1), 2, activation="tanh", preactivation=False, rngs=rngs
    ),
    "VariationalDequantization": lambda rngs: rf.VariationalDequantization((2, 2, 1), 1, 4, rngs=rngs),
    "VelocityField": lambda rngs: rf.VelocityField((3,), MLP, 2, rngs=rngs),
    "ZeroPadding": lambda rngs: rf.ZeroPadding(2),
}


def test_every_public_class_is_here():
    modules = {name for name, cls in classes().items() if issubclass(cls, Module)}
    assert modules - ABSTRACT == set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_described_is_built_again(name):
    """The same structure, with arrays of the same shapes; through JSON of the standard, and nothing is computed."""
    with deferred_norms():
        made = MAKERS[name](nnx.Rngs(0))
    text = json.dumps(describe(made), allow_nan=False)
    built = nnx.eval_shape(lambda: build(json.loads(text), nnx.Rngs(0)))
    assert type(built) is type(made)
    assert nnx.graphdef(built) == nnx.graphdef(made)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(module)) for module in (built, made)]
    assert shapes[0] == shapes[1]


def test_what_nothing_tells_how_to_make():
    """A base around an object of the user's: it is named, and cannot be built."""

    class Object:
        def log_prob(self, z):
            return -0.5 * (z**2).sum(axis=1)

        def sample(self, key, n):
            return jax.random.normal(key, (n, 3))

    description = describe(rf.Flow(rf.ActNorm((3,)), Object(), event_shape=(3,)))
    assert list(description["arguments"]["base"]) == ["unknown"]
    with pytest.raises(UnknownClassError, match=r"structure.base: expected a class of resflow_jax, got "):
        build(description, nnx.Rngs(0))
