"""From a configuration to layers: their order, sizes and norms, and their effect on data before training.

Most of it on layers of shapes alone, which costs no compilation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.linear_maps import DenseMap
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.io.config_json import config_from_json, config_to_json
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.lipschitz import linears_inside
from resflow_jax.layers.logit import Logit
from resflow_jax.layers.normalization import Normalization
from resflow_jax.layers.padding import ChannelPadding
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.layers.shapes import Squeeze
from resflow_jax.models.residual_flow import flow_from_config


def entrance(**settings):
    """What a flow of images does to x before anything learned, as one chain."""
    around = {"between": rf.BetweenBlocks(actnorm=False), "tail": rf.DenseTail(0)}
    config = TorchImageConfig((2, 2, 1), blocks=(1,), kernels=(1,), **around, **settings)
    scale = flow_from_config(config, rngs=nnx.Rngs(0)).bijector.bijectors[0]
    of_data = (ChannelPadding, Logit, Normalization, Squeeze)
    return Chain(itertools.takewhile(lambda layer: isinstance(layer, of_data), scale.bijectors))


PADDING = rf.Padding(1, scale=0.5, shift=0.25)


@pytest.mark.parametrize("padding_first", [False, True])
def test_noise_before_or_behind_the_logit(padding_first):
    """[logit(x), e] or logit([x, e]) for e in [0.25, 0.75]: the log-det is that of all logits, and 4 log 0.5."""
    data = rf.ImageTransform(padding=PADDING, logit_alpha=0.05)
    chain = entrance(data=data, padding_first=padding_first)
    x = jax.random.uniform(jax.random.key(0), (100, 2, 2, 1))
    y, log_det = chain.forward(x, key=jax.random.key(1), estimator=rf.Exact())
    passed = y if padding_first else y[..., :1]
    s = jax.nn.sigmoid(passed)
    inputs = (s - 0.05) / 0.9
    np.testing.assert_allclose(inputs[..., :1], x, atol=1e-12)
    e = np.asarray(inputs[..., 1:] if padding_first else y[..., 1:])
    assert 0.25 <= e.min() < 0.26 and 0.74 < e.max() <= 0.75 and len(np.unique(e)) == 400
    slopes = 0.9 / (s * (1 - s))  # d logit(0.05 + 0.9 x) / dx
    np.testing.assert_allclose(log_det, jnp.log(slopes).sum((1, 2, 3)) + 4 * np.log(0.5), rtol=1e-10)
    np.testing.assert_allclose(chain.inverse(y), x, atol=1e-12)


@pytest.mark.parametrize("padding_first", [False, True])
def test_data_mean_of_squeezed_channels(padding_first):
    """One mean for every channel after the squeeze, in the order of `Squeeze`; the noise is not changed."""
    mean, deviation = np.asarray([0.1, 0.2, 0.3, 0.4]), np.asarray([0.5, 2.0, 0.25, 4.0])
    data, scales = rf.ImageTransform(mean, deviation, PADDING, logit_alpha=None), rf.Scales(squeeze_first=True)
    chain = entrance(data=data, scales=scales, padding_first=padding_first)
    x = jax.random.uniform(jax.random.key(0), (100, 2, 2, 1))
    y, log_det = chain.forward(x, key=jax.random.key(1), estimator=rf.Exact())
    np.testing.assert_allclose(y[..., :4], (np.asarray(x).reshape(100, 1, 1, 4) - mean) / deviation, rtol=1e-12)
    e = np.asarray(y[..., 4:])
    assert e.shape == (100, 1, 1, 4) and 0.25 <= e.min() < 0.26 and 0.74 < e.max() <= 0.75
    np.testing.assert_allclose(log_det, 4 * np.log(0.5) - np.log(deviation).sum(), rtol=1e-12)
    # One number is the mean of the image's channel, before the squeeze.
    chain = entrance(data=rf.ImageTransform((0.1,), (0.5,), logit_alpha=None), scales=scales)
    np.testing.assert_allclose(chain(x), (x.reshape(100, 1, 1, 4) - 0.1) / 0.5, rtol=1e-12)


def built(config):
    """The layers of every scale, as shapes alone: nothing is computed. Steps of a stack follow it in a list."""

    def parts(chain):
        return [
            parts(p.steps) if isinstance(p, ResidualStack) else parts(p) if isinstance(p, Chain) else p
            for p in chain.bijectors
        ]

    return [parts(scale) for scale in nnx.eval_shape(lambda: flow_from_config(config, rngs=nnx.Rngs(0))).scales]


def names(layers):
    return [names(layer) if isinstance(layer, list) else type(layer).__name__ for layer in layers]


TWO_SCALES = {"shape": (4, 4, 1), "blocks": (2, 1), "kernels": (3, 3), "hidden_channels": 4}
BLOCK = ["ResidualBlock"]
FULL_BLOCK = ["InvertibleLinear", "ResidualBlock", "ActNorm", "MovingBatchNorm", "MovingCentering"]
TAIL = rf.DenseTail(1, layers=2)
LAYERS = {
    "centred blocks": (
        {"between": rf.BetweenBlocks(actnorm=False, centering="blocks")},
        [
            ["Logit", [*BLOCK, "MovingCentering"], [*BLOCK, "MovingCentering"], "Squeeze"],
            [[*BLOCK, "MovingCentering"], "Flatten", [*BLOCK, "MovingCentering"]],
        ],
    ),
    "centred layers": (
        {"between": rf.BetweenBlocks(actnorm=False, centering="layers")},
        [["Logit", BLOCK, BLOCK, "Squeeze"], [BLOCK, "Flatten", BLOCK]],
    ),
    "fully connected": (
        {"fully_connected": True, "between": rf.BetweenBlocks(actnorm=False, invertible_linear=True)},
        [
            ["Logit", "Flatten", *[["InvertibleLinear", *BLOCK]] * 2, "Reshape", "Squeeze"],
            ["Flatten", ["InvertibleLinear", *BLOCK], BLOCK],
        ],
    ),
    "fully connected alone": (
        {"fully_connected": True, "tail": rf.DenseTail(0), "between": rf.BetweenBlocks(), "preactivation": "all"},
        [
            ["Logit", "Flatten", "ActNorm", [*BLOCK, "ActNorm"], "Reshape", "Squeeze"],
            ["Flatten", [*BLOCK, "ActNorm"]],
        ],
    ),
    "spline": (
        {"data": rf.ImageTransform(spline_bins=4)},
        [["Logit", "Spline", BLOCK, BLOCK, "Squeeze"], [BLOCK, "Flatten", BLOCK]],
    ),
    "all at once": (
        {
            "between": rf.BetweenBlocks(batchnorm=True, centering="blocks", invertible_linear=True),
            "tail": rf.DenseTail(0),
        },
        [
            ["Logit", "ActNorm", *[FULL_BLOCK] * 2, "Squeeze"],
            [FULL_BLOCK],
        ],
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_in_order(case):
    """The order of the layers in the scales, and around every block."""
    settings, expected = LAYERS[case]
    scales = built(
        TorchImageConfig(**TWO_SCALES | {"between": rf.BetweenBlocks(actnorm=False), "tail": TAIL} | settings)
    )
    assert names(scales) == expected


def test_widths_of_the_scales():
    """One number is the width of all scales; of several, each is that of a scale. A list is as good as a tuple."""

    def widths(hidden_channels):
        config = rf.ImageFlowConfig(**TWO_SCALES | {"hidden_channels": hidden_channels}, tail=rf.DenseTail(0))
        assert config_from_json(config_to_json(config)) == config and hash(config)
        shapes = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
        return [linear.kernel.shape[-2:] for linear in linears_inside(shapes)]

    first, second = [(1, 4), (4, 1)] * 2, [(4, 4)] * 2
    assert widths(4) == widths([4, 4]) == [*first, *second]
    assert widths((6, 3)) == [*[(1, 6), (6, 1)] * 2, (4, 3), (3, 4)]


def test_spline_of_the_data():
    """One curve for each channel, over all that the logit returns: at the ends of [0, 1] it meets the identity."""
    config = rf.ImageFlowConfig(
        (2, 2, 3), blocks=(1,), kernels=(1,), hidden_channels=4, data=rf.ImageTransform(logit_alpha=0.05, spline_bins=4)
    )
    logit, layer = rf.ResidualFlow(config, rngs=nnx.Rngs(0)).bijector.bijectors[0].bijectors[:2]
    assert layer.theta.shape == (11, 3) and layer.bins == 4
    layer.theta[...] = jax.random.normal(jax.random.key(0), (11, 3))
    ends = logit(jnp.stack([jnp.zeros((2, 2, 3)), jnp.full((2, 2, 3), 0.5), jnp.ones((2, 2, 3))]))
    moved = layer(ends) - ends
    assert jnp.abs(moved[::2]).max() < 1e-12 and jnp.abs(moved[1]).min() > 1e-3


@pytest.mark.parametrize(("block", "name"), [("monotone", "MonotoneBlock"), ("implicit", "ImplicitBlock")])
def test_other_blocks(block, name):
    """`block` replaces every residual block, also dense ones; an implicit block has two, in a chain."""
    expected = [name] if block == "monotone" else [["ResidualBlock", "Invert"]]
    scales = built(rf.ImageFlowConfig(**TWO_SCALES, between=rf.BetweenBlocks(actnorm=False), tail=TAIL, block=block))
    assert names(scales) == [["Logit", expected, expected, "Squeeze"], [expected, "Flatten", expected]]
    (stack,) = built(rf.VectorFlowConfig(3, 2, (4,), between=rf.BetweenBlocks(actnorm=False), block=block))
    assert names(stack) == [expected]


def contractions(layers):
    """The contractions of all residual blocks, in order; a stack counts as one."""
    for layer in layers:
        if isinstance(layer, list):
            yield from contractions(layer)
        elif isinstance(layer, ResidualBlock):
            yield layer.contraction


def test_centering_of_layers_leaves_dense_blocks_alone():
    """Convolutional blocks have one after every linear layer, and all but the first one before the activation."""
    *convolutional, dense = contractions(
        built(rf.ImageFlowConfig(**TWO_SCALES, between=rf.BetweenBlocks(centering="layers"), tail=TAIL))
    )
    assert [len(contraction.centers) for contraction in convolutional] == [2, 2, 2]
    assert [contraction.pre_center is None for contraction in convolutional] == [True, False, False]
    assert not dense.centers and dense.pre_center is None
    (blocks,) = contractions(
        built(rf.VectorFlowConfig(3, 2, (4,), preactivation="all", between=rf.BetweenBlocks(centering="layers")))
    )
    assert [center.mean.shape for center in (blocks.pre_center, *blocks.centers)] == [(2, 3), (2, 4), (2, 3)]


def test_fully_connected_sizes():
    """As many layers as `kernels`, of width `hidden_channels`, on all features; ActNorms are per feature there."""
    scales = built(TorchImageConfig(**TWO_SCALES | {"kernels": (3, 1, 3)}, fully_connected=True, tail=TAIL))
    maps = [[linear.linear_map for linear in g.linears] for g in contractions(scales)]
    assert maps == [[DenseMap(16, 4), DenseMap(4, 4), DenseMap(4, 16)]] * 3 + [[DenseMap(16, 128), DenseMap(128, 16)]]
    assert [norm.shift.shape for norm in (scales[0][2], scales[0][3][1], scales[0][4][1])] == [(16,), (16,), (1, 16)]


def test_norms_of_convolutional_and_of_dense_blocks():
    """`norms` are those of convolutions, or of dense layers in their place; `tail.norms` those of the tail."""
    for fully_connected in (False, True):
        config = TorchImageConfig(
            **TWO_SCALES,
            fully_connected=fully_connected,
            norms=rf.Norms("f1f"),
            tail=rf.DenseTail(1, layers=2, norms=(2, 1.5, 2)),
        )
        assert config.tail.norms == (2.0, 1.5, 2.0)
        orders = [[(linear.domain, linear.codomain) for linear in g.linears] for g in contractions(built(config))]
        assert orders == [[(np.inf, 1.0), (1.0, np.inf)]] * 3 + [[(2.0, 1.5), (1.5, 2.0)]]


TIES = {"closed": [0, 1, 2, 0], "all": [0, 0, 0, 0], "none": [0, 1, 2, 3]}


@pytest.mark.parametrize("ties", TIES)
def test_order_ties(ties):
    """Which of the orders around the layers of a block are one parameter; each block, also of a stack, has its own."""
    config = rf.VectorFlowConfig(3, 3, (4, 4), preactivation="all_but_first", norms=rf.Norms(learned=True, ties=ties))
    for n, contraction in enumerate(contractions(built(config))):
        linears = contraction.linears
        for before, after in itertools.pairwise(linears):
            assert before.codomain is after.domain
        orders = [linears[0].domain, *(linear.codomain for linear in linears)]
        assert [next(m for m, q in enumerate(orders) if q is p) for p in orders] == TIES[ties]
        assert {order.shape for order in orders} == {() if n == 0 else (2,)}
        distinct = [leaf for path, leaf in leaves_with_paths(contraction) if "domain" in path]  # of the "codomain" too
        assert len(distinct) == len(set(TIES[ties]))
        assert contraction.is_contraction == (ties != "none")


def leaves_with_paths(module):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(module, nnx.Param))
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
