"""Calls of layers, bases and networks that a public docstring says to fail, with the message.

They compile nothing, or next to nothing: layers are made without norms.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import resflow_jax as rf
from tests.modes.calls import KEY, PIXELS, X, vectors

RNGS = nnx.Rngs(0)
C = np.ones(2)


def on_vectors():
    return nnx.merge(*vectors())


def norm():
    return rf.ActNorm((3,))


def mlp(*args, **kwargs):
    return rf.LipschitzMLP(*args, **kwargs, rngs=RNGS)


def cnn(*args, **kwargs):
    return rf.LipschitzCNN(*args, **kwargs, rngs=RNGS)


def conditional():
    """A flow that needs a condition."""
    return rf.Flow(rf.Affine((3,), condition_dim=2, rngs=RNGS))


def padded():
    return rf.Flow(rf.Chain([rf.ChannelPadding(1, "gaussian"), rf.ActNorm((4,))]), event_shape=(3,))


def unlikely():
    """A flow without a density."""
    return rf.Flow(rf.ZeroPadding(1), event_shape=(3,))


def block(module, **options):
    return rf.ResidualBlock(module, **options)


def head(*args, **options):
    return rf.PooledHead(*args, **options, rngs=RNGS)


def classifier():
    """A classifier of vectors by a mixture."""
    return rf.Classifier(norm(), base=rf.MixtureOfNormals(2, (3,), rngs=RNGS))


class Narrowing(nnx.Module):
    """No map of x to events like x."""

    def __call__(self, x):
        return 0.5 * x[:, :1]


# name of what has the docstring: {the message: a call}
LAYERS = {
    "rf.Affine": {
        "event_shape: expected": lambda: rf.Affine((0,)),
        "rngs: expected": lambda: rf.Affine((3,), condition_dim=2),
    },
    "rf.Bijector.forward": {
        r"x: expected events whose shape ends in \(3,\), got \(1,\)": lambda: norm().forward(X[:, :1]),
        "x: expected a float array": lambda: norm().forward(X.astype(int)),
        "condition: expected None": lambda: norm().forward(X, condition=C),
        "condition: expected floats": lambda: conditional().bijector.forward(X),
        "key: expected a PRNG key": lambda: padded().bijector.forward(X),
    },
    "rf.Chain": {
        r"bijectors\[0\]: expected Bijector": lambda: rf.Chain([3]),
        r"bijectors\[1\] .*: expected events": lambda: rf.Chain([rf.Reshape((4,), (2, 2)), norm()]),
        "condition: expected one shape": lambda: rf.Chain(
            [rf.Affine((3,), condition_dim=n, rngs=RNGS) for n in (1, 2)]
        ),
    },
    "rf.Classifier": {
        "head: expected a head, or None": lambda: rf.Classifier(norm(), event_shape=(3,)),
        "head: expected PooledHead": lambda: rf.Classifier(norm(), norm(), event_shape=(3,)),
        r"head: expected shape \(3,\)": lambda: rf.Classifier(norm(), head((2,), 3), event_shape=(3,)),
        "head: expected .* without a condition": lambda: rf.Classifier(
            norm(), base=rf.MixtureOfNormals(2, (3,), class_conditional=True, rngs=RNGS)
        ),
    },
    "rf.Classifier.logits": {
        "x: expected": lambda: classifier().logits(X[:, :2]),
        "condition: expected None": lambda: classifier().logits(X, condition=C),
        r"dropout: expected a probability in \[0, 1\), got 1.0": lambda: classifier().logits(X, dropout=1.0),
        "key: expected a PRNG key for dropout": lambda: classifier().logits(X, dropout=0.5),
        "key: expected a PRNG key, as": lambda: classifier().logits(X, key=3),
    },
    "rf.Classifier.forward_and_log_prob": {"x: expected": lambda: classifier().forward_and_log_prob(X[:, :2])},
    "rf.MixtureOfNormals.log_joint": {
        "class_conditional: expected": lambda: rf.MixtureOfNormals(
            2, (3,), class_conditional=True, rngs=RNGS
        ).log_joint(X, C)
    },
    "rf.PooledHead": {
        "shape: expected": lambda: head((0,), 2),
        "classes: expected": lambda: head((3,), 1),
        "hidden: expected": lambda: head((3,), 2, hidden=0),
        "activation: expected": lambda: head((3,), 2, activation="lipswish"),
        "activation: expected an activation .* single channels": lambda: head((3,), 2, activation="fullsort"),
    },
    "rf.ResNetClassifier": {
        "config: expected": lambda: rf.ResNetClassifier(rf.VectorFlowConfig(3), rngs=RNGS),
        "rngs: expected a stream": lambda: rf.ResNetClassifier(
            rf.ClassifierConfig((2, 2, 1), 3, (1,), (2,)), rngs=nnx.Rngs(dropout=0)
        ),
    },
    "rf.certified_radius": {
        "flow: expected Classifier": lambda: rf.certified_radius(on_vectors(), X),
        "flow: expected a classifier with a head": lambda: rf.certified_radius(classifier(), X),
        r"logits: expected .*3\]": lambda: rf.certified_radius(
            rf.Classifier(norm(), head((3,), 3), event_shape=(3,)), X[:, :2]
        ),
    },
    "rf.StridedBlock": {
        r"shape: expected \(H, W, C\)": lambda: rf.StridedBlock((4,), 2, 2, rngs=RNGS),
        "channels: expected": lambda: rf.StridedBlock((2, 2, 1), 0, 2, rngs=RNGS),
        "hidden_channels: expected": lambda: rf.StridedBlock((2, 2, 1), 2, 0, rngs=RNGS),
        "stride: expected 1 or 2": lambda: rf.StridedBlock((2, 2, 1), 2, 2, stride=3, rngs=RNGS),
        "shape: expected sides": lambda: rf.StridedBlock((2, 3, 1), 2, 2, rngs=RNGS),
        "activation: expected": lambda: rf.StridedBlock((2, 2, 1), 2, 2, activation="maxmin", rngs=RNGS),
        "StridedBlock: expected a pass without": lambda: rf.StridedBlock((2, 2, 1), 2, 2, rngs=RNGS).forward(PIXELS),
    },
    "rf.UnconstrainedBlock": {
        r"shape: expected \(H, W, C\)": lambda: rf.UnconstrainedBlock((4,), 2, rngs=RNGS),
        "hidden_channels: expected": lambda: rf.UnconstrainedBlock((2, 2, 1), 0, rngs=RNGS),
        "activation: expected": lambda: rf.UnconstrainedBlock((2, 2, 1), 2, activation="clipswish", rngs=RNGS),
        "UnconstrainedBlock: expected a pass without": lambda: rf.UnconstrainedBlock((2, 2, 1), 2, rngs=RNGS).forward(
            PIXELS
        ),
    },
    "rf.ZeroPadding": {
        "channels: expected": lambda: rf.ZeroPadding(0),
        "ZeroPadding: expected a pass without": lambda: rf.ZeroPadding(1).forward(X),
        "ZeroPadding: expected .*volume zero": lambda: rf.Flow(rf.ZeroPadding(1), event_shape=(3,)).log_prob(X),
    },
    "rf.Flow.sample": {"flow: expected a flow with a density": lambda: unlikely().sample(KEY, 2)},
    "rf.Flow.sample_and_log_prob": {
        "flow: expected a flow with a density": lambda: unlikely().sample_and_log_prob(KEY, 2)
    },
    "rf.Flow.inverse_and_log_prob": {
        "flow: expected a flow with a density": lambda: unlikely().inverse_and_log_prob(np.ones((2, 4)), key=KEY)
    },
    "rf.DenseNet": {
        "growth: expected": lambda: rf.DenseNet((3,), 2, 0, rngs=RNGS),
        "kernel: expected": lambda: rf.DenseNet((4, 4, 1), 2, 2, kernel=2, rngs=RNGS),
        "activation: expected widths that 2 divides": lambda: rf.DenseNet((3,), 2, 3, activation="maxmin", rngs=RNGS),
    },
    "rf.DiagonalNormal": {
        "event_shape: expected": lambda: rf.DiagonalNormal((0,)),
        "rngs: expected": lambda: rf.DiagonalNormal((3,), condition_dim=2),
    },
    "rf.LipschitzCNN": {
        "shape: expected": lambda: cnn((3,), (2,), (3, 3)),
        "hidden: expected": lambda: cnn((2, 2, 1), (0,), (3, 3)),
        "kernels: expected": lambda: cnn((2, 2, 1), (2,), (2, 3)),
        "kernels: expected 3 sizes": lambda: cnn((2, 2, 1), (2, 2), (3, 3)),
        "activation: expected widths that 2 divides": lambda: cnn((2, 2, 1), (3,), (3, 3), activation="maxmin"),
        "norms: expected 3": lambda: cnn((2, 2, 1), (2,), (3, 3), norms=(2, 2)),
    },
    "rf.LipschitzConv": {
        "coefficient: expected": lambda: rf.LipschitzConv((4,), 1, 2, 1, 1.0, rngs=RNGS),
        "x: expected": lambda: rf.LipschitzConv((4,), 1, 2, 1, 0.5, rngs=RNGS)(np.ones((1, 3, 1))),
    },
    "rf.LipschitzDense": {
        "coefficient: expected": lambda: rf.LipschitzDense(3, 2, 1.0, rngs=RNGS),
        "x: expected": lambda: rf.LipschitzDense(3, 2, 0.5, rngs=RNGS)(X[:, :2]),
    },
    "rf.LipschitzMLP": {
        "hidden: expected": lambda: mlp(3, (0,)),
        "activation: expected widths that 2 divides": lambda: mlp(3, (3,), activation="maxmin"),
        "norms: expected 3": lambda: mlp(3, (4,), norms=(2, 2)),
    },
    "rf.MixtureOfNormals": {
        "components: expected": lambda: rf.MixtureOfNormals(0, (3,), rngs=RNGS),
        "condition_dim: expected None": lambda: rf.MixtureOfNormals(
            2, (3,), class_conditional=True, condition_dim=2, rngs=RNGS
        ),
        "rngs: expected": lambda: rf.MixtureOfNormals(2, (3,), rngs=None),
    },
    "rf.MultiScale": {
        "scales: expected": lambda: rf.MultiScale([], (2, 2, 1)),
        r"scales\[1\].*: expected events": lambda: rf.MultiScale([rf.Squeeze((2, 2, 1)), rf.ActNorm((3,))], (2, 2, 1)),
        r"scales\[0\]: expected an even number": lambda: rf.MultiScale([norm(), norm()], (3,)),
    },
    "rf.ActNorm": {"expected events whose shape ends": lambda: norm().output_shape((2,))},
    "rf.Bijector.output_shape": {"expected events of shape": lambda: rf.Squeeze((2, 2, 1)).output_shape((4, 4, 1))},
    "rf.Bijector.inverse": {
        "y: expected a float array": lambda: norm().inverse(X.astype(int)),
        "condition: expected None": lambda: norm().inverse(X, condition=C),
        "condition: expected floats": lambda: conditional().bijector.inverse(X),
        "solver: expected": lambda: norm().inverse(X, solver="anderson"),
    },
    "rf.Bounded": {
        "low: expected": lambda: rf.Bounded([np.nan], [1.0]),
        "high: expected numbers above low": lambda: rf.Bounded([1.0], [1.0]),
        "one_sided: expected": lambda: rf.Bounded([0.0], [1.0], one_sided="exp"),
        "x: expected values": lambda: rf.Flow(rf.Bounded([0.0] * 3, [1.0] * 3), event_shape=(3,)).forward(X + 9),
    },
    "rf.ChannelPadding": {
        "channels: expected": lambda: rf.ChannelPadding(0),
        "noise: expected": lambda: rf.ChannelPadding(1, "x"),
        "scale: expected": lambda: rf.ChannelPadding(1, scale=0.0),
        "key: expected": lambda: rf.ChannelPadding(1).forward(X),
    },
    "rf.Exp": {"x: expected": lambda: rf.Exp().forward(X.astype(int))},
    "rf.Softplus": {"x: expected": lambda: rf.Softplus().forward(X.astype(int))},
    "rf.Flatten": {"shape: expected": lambda: rf.Flatten((0, 2))},
    "rf.Reshape": {
        "shape: expected": lambda: rf.Reshape((0,), (1,)),
        "new_shape: expected": lambda: rf.Reshape((4,), (3,)),
    },
    "rf.Spline": {
        "bins: expected": lambda: rf.Spline((3,), 1),
        "bins: expected at most": lambda: rf.Spline((3,), 501),
        "bound: expected a positive": lambda: rf.Spline((3,), bound=0.0),
        "bound: expected a finite": lambda: rf.Spline((3,), bound=np.inf),
        "expected events": lambda: rf.Spline((3,)).output_shape((2,)),
    },
    "rf.Squeeze": {
        "shape: expected": lambda: rf.Squeeze((2, 2)),
        "shape: expected even": lambda: rf.Squeeze((3, 2, 1)),
    },
    "rf.Permutation": {
        "order: expected": lambda: rf.Permutation([0, 0]),
        "axis: expected": lambda: rf.Permutation([0, 1], axis=0.5),
        "expected events with 2 elements": lambda: rf.Permutation([0, 1]).output_shape((3,)),
    },
    "rf.Invert": {
        "bijector: expected Bijector": lambda: rf.Invert(3),
        "bijector: expected a bijection; ZeroPadding": lambda: rf.Invert(rf.ZeroPadding(1)),
        "bijector: expected .*pad": lambda: rf.Invert(rf.ChannelPadding(1)),
        "solver: expected": lambda: rf.Invert(norm(), solver="anderson"),
    },
    "rf.MonotoneBlock": {
        "lipschitz: expected a bound": lambda: rf.MonotoneBlock(Narrowing()),
        r"lipschitz: expected .*1.5": lambda: rf.MonotoneBlock(Narrowing(), lipschitz=1.5),
        "lipschitz: expected None": lambda: rf.MonotoneBlock(mlp(3, (2,)), lipschitz=0.5),
        "solver: expected": lambda: rf.MonotoneBlock(mlp(3, (2,)), solver="anderson"),
    },
    "rf.ImplicitBlock": {
        "g_x: expected Contraction": lambda: rf.ImplicitBlock(Narrowing(), mlp(3, (2,))),
        "g_y: expected Contraction": lambda: rf.ImplicitBlock(mlp(3, (2,)), Narrowing()),
        "solver: expected": lambda: rf.ImplicitBlock(mlp(3, (2,)), mlp(3, (2,)), solver="anderson"),
        r"bijectors\[1\] .*: expected events": lambda: rf.ImplicitBlock(mlp(3, (2,)), mlp(2, (2,))),
    },
    "rf.InvertibleLinear": {
        "dim: expected": lambda: rf.InvertibleLinear(0, rngs=RNGS),
        "expected events": lambda: rf.InvertibleLinear(3, rngs=RNGS).output_shape((2,)),
    },
    "rf.Logit": {
        "alpha: expected": lambda: rf.Logit(0.5),
        "low: expected": lambda: rf.Logit(0.1, -np.inf, 1.0),
        "high: expected numbers above low": lambda: rf.Logit(0.1, 1.0, 1.0),
        "x: expected values": lambda: rf.Flow(rf.Logit(0.1), event_shape=(3,)).forward(X + 9),
    },
    "rf.MovingBatchNorm": {
        "decay: expected": lambda: rf.MovingBatchNorm((3,), 1.0),
        "epsilon: expected": lambda: rf.MovingBatchNorm((3,), epsilon=0.0),
        "expected events": lambda: rf.MovingBatchNorm((3,)).output_shape((2,)),
    },
    "rf.MovingCentering": {
        "decay: expected": lambda: rf.MovingCentering((3,), 1.0),
        "expected events": lambda: rf.MovingCentering((3,)).output_shape((2,)),
    },
    "rf.Normalization": {
        "mean: expected": lambda: rf.Normalization([np.nan], [1.0]),
        "std: expected positive": lambda: rf.Normalization([0.0], [0.0]),
        "std: expected the shape": lambda: rf.Normalization([0.0], [1.0, 1.0]),
        "expected events": lambda: rf.Normalization(np.zeros(3), np.ones(3)).output_shape((2,)),
    },
    "rf.ResidualBlock": {
        "lipschitz: expected a bound": lambda: block(Narrowing()),
        "lipschitz: expected a number": lambda: block(Narrowing(), lipschitz=1.0),
        "lipschitz: expected None": lambda: block(mlp(3, (4,)), lipschitz=0.5),
        "event_shape: expected None": lambda: block(mlp(3, (4,)), event_shape=(3,)),
    },
    "rf.ResidualBlock.g": {"g: expected": lambda: block(Narrowing(), lipschitz=0.5).forward(X, estimator=rf.Exact())},
    "rf.ResidualStack": {
        "depth: expected": lambda: rf.ResidualStack(lambda rngs: norm(), 0, rngs=RNGS),
        "make_step: expected": lambda: rf.ResidualStack(lambda rngs: nnx.Param(jnp.zeros(2)), 2, rngs=RNGS),
        "expected layers that keep the shape": lambda: rf.ResidualStack(
            lambda rngs: rf.Squeeze((2, 2, 1)), 2, rngs=RNGS
        ),
    },
    "rf.StandardNormal": {"event_shape: expected": lambda: rf.StandardNormal((0,))},
    "rf.Flow.base_log_prob": {
        "z: expected": lambda: on_vectors().base_log_prob(X[:, :2]),
        "condition: expected None": lambda: on_vectors().base_log_prob(X, C),
    },
    "rf.certify": {"flow: expected": lambda: rf.certify(3)},
}
