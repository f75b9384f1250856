"""Impossible configurations: the errors name the field, what was expected and what came."""

import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.torch.flow import TorchImageConfig

IMAGE_SHAPE = {"shape": (8, 8, 1)}
SQUEEZED = {"scales": rf.Scales(squeeze_first=True)}
BAD_CONFIGS = {
    "block": (rf.VectorFlowConfig, {"dim": 2, "block": "x"}, "block: expected one of residual, monotone, implicit"),
    "block of the original": (
        TorchImageConfig,
        {**IMAGE_SHAPE, "block": "monotone"},
        "block: expected one of resblock, coupling",
    ),
    "zero blocks": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "blocks": (2, 0)}, "blocks: expected an integer of at least 1"),
    "no scales": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "blocks": ()}, "blocks: expected at least one scale"),
    "unsqueezable": (
        rf.ImageFlowConfig,
        {"shape": (7, 8, 1), "blocks": (1, 1)},
        r"shape: .*divisible by 2.*\(7, 8, 1\)",
    ),
    "unsqueezable first": (
        rf.ImageFlowConfig,
        {"shape": (6, 6, 1), "blocks": (1, 1), "scales": rf.Scales(squeeze_first=True)},
        "shape: .*divisible by 4.*with scales.squeeze_first",
    ),
    "flat shape": (rf.ImageFlowConfig, {"shape": (8, 8)}, r"shape: expected \(H, W, C\), got \(8, 8\)"),
    "coefficient one": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "coefficient": 1.0}, r"coefficient: .*\(0, 1\), got 1.0"),
    "coefficient zero": (rf.VectorFlowConfig, {"dim": 2, "coefficient": 0.0}, r"coefficient: .*\(0, 1\), got 0.0"),
    "activation": (rf.VectorFlowConfig, {"dim": 2, "activation": "gelu"}, "activation: expected one of .*got 'gelu'"),
    "preactivation": (rf.VectorFlowConfig, {"dim": 2, "preactivation": "x"}, "preactivation: expected one of"),
    "vector blocks": (rf.VectorFlowConfig, {"dim": 2, "blocks": 0}, "blocks: expected an integer of at least 1, got 0"),
    "dim": (rf.VectorFlowConfig, {"dim": 0}, "dim: expected an integer of at least 1, got 0"),
    "even kernel": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "kernels": (3, 2)}, "kernels: expected odd sizes"),
    "no coefficient": (rf.VectorFlowConfig, {"dim": 2, "coefficient": None}, "coefficient: .*got None"),
    "shape no tuple": (rf.ImageFlowConfig, {"shape": 8}, "shape: expected a tuple of numbers, got 8"),
    "blocks no tuple": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "blocks": 4},
        "blocks: expected a tuple of numbers, got 4",
    ),
    "data mean alone": (
        rf.VectorTransform,
        {"mean": (0.0, 1.0)},
        "data.std: expected both or none of data.mean and data.std, got None",
    ),
    "deviation of zero": (
        rf.VectorTransform,
        {"mean": (0, 0), "std": (1, 0)},
        "data.std: expected a positive number, got 0",
    ),
    "data deviation alone": (rf.VectorTransform, {"std": (1.0, 1.0)}, "data.std: .* both"),
    "data mean of another length": (
        rf.VectorFlowConfig,
        {"dim": 2, "data": rf.VectorTransform((0.0,), (1.0,))},
        r"data.mean: expected 2 numbers, one a channel, got \(0.0,\)",
    ),
    "data mean no tuple": (
        rf.VectorTransform,
        {"mean": 0.0, "std": 1.0},
        "data.mean: expected a tuple of numbers, got 0.0",
    ),
    "data mean beside logit": (
        rf.ImageTransform,
        {"mean": (0.0,), "std": (1.0,)},
        r"data.mean: expected None together with data.logit_alpha, got \(0.0,\)",
    ),
    "data of images in a flow of vectors": (
        rf.VectorFlowConfig,
        {"dim": 2, "data": rf.ImageTransform()},
        "data: expected VectorTransform, got ImageTransform",
    ),
    "data of vectors in a flow of images": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "data": rf.VectorTransform()},
        "data: expected ImageTransform, got VectorTransform",
    ),
    "orders in the place of a group": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": "2222"},
        "norms: expected Norms, got str",
    ),
    "no group": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "tail": None}, "tail: expected DenseTail, got NoneType"),
    "norms of another length": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": rf.Norms("22")},
        r"norms.orders: expected 4 orders for 3 layers, got 2 in \(2.0, 2.0\)",
    ),
    "norms below one": (rf.Norms, {"orders": (2, 0.5, 2, 2)}, r"norms.orders\[1\]: expected an order"),
    "norms unknown": (rf.Norms, {"orders": "22x2"}, "norms.orders: expected digits .* got 'x'"),
    "norms beside learning": (
        rf.Norms,
        {"orders": "222f", "learned": True},
        "norms.orders: expected None together with norms.learned, got '222f'",
    ),
    "norms of DenseNets": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": rf.Norms("2222"), "densenet": rf.DenseNetBlocks(1)},
        r"norms.orders: expected None together with densenet.depth, got \(2.0, 2.0, 2.0, 2.0\)",
    ),
    "learned norms of DenseNets": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": rf.Norms(learned=True), "densenet": rf.DenseNetBlocks(1)},
        "norms.learned: expected False together with densenet.depth, got True",
    ),
    "ActNorms per feature of vectors": (
        rf.VectorFlowConfig,
        {"dim": 2, "between": rf.BetweenBlocks(feature_actnorm=True)},
        "between.feature_actnorm: expected False, .* got True",
    ),
    "dense depth": (rf.DenseNetBlocks, {"depth": -1}, "densenet.depth: .* at least 0, got -1"),
    "dense growth": (rf.DenseNetBlocks, {"growth": 0}, "densenet.growth: .* at least 1, got 0"),
    "dense first": (rf.DenseTail, {"densenet_first": 0}, "tail.densenet_first: .* at least 1, got 0"),
    "dense tail growth": (rf.DenseTail, {"densenet_growth": 0}, "tail.densenet_growth: .* 1, got 0"),
    "padding": (rf.Padding, {"channels": -1}, "padding.channels: expected an integer of at least 0, got -1"),
    "noise": (rf.Padding, {"noise": "x"}, "padding.noise: expected one of uniform"),
    "padding scale": (rf.Padding, {"scale": 0.0}, "padding.scale: expected a positive .* 0.0"),
    "padding shift": (rf.Padding, {"shift": np.nan}, "padding.shift: expected a finite number, got nan"),
    "condition of no numbers": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "condition_dim": 0},
        "condition_dim: expected an integer of at least 1, got 0",
    ),
    "fully connected DenseNets": (
        TorchImageConfig,
        {**IMAGE_SHAPE, "fully_connected": True, "densenet": rf.DenseNetBlocks(2)},
        "fully_connected: expected False with densenet.depth 2, got True",
    ),
    "dense norms of another length": (
        rf.DenseTail,
        {"norms": "22"},
        "tail.norms: expected 4 orders for 3 layers, got 2 in '22'",
    ),
    "dense norms below one": (rf.DenseTail, {"norms": (2, 0.5, 2, 2)}, r"tail.norms\[1\]: expected an order"),
    "dense norms unknown": (rf.DenseTail, {"norms": "22x2"}, "tail.norms: .* got 'x'"),
    "dense norms beside learning": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "tail": rf.DenseTail(norms="222f"), "norms": rf.Norms(learned=True)},
        r"tail.norms: expected None together with norms.learned, got \(2.0, 2.0, 2.0, inf\)",
    ),
    "dense norms of DenseNets": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "tail": rf.DenseTail(norms="2222"), "densenet": rf.DenseNetBlocks(1)},
        r"tail.norms: expected None together with densenet.depth, got \(2.0, 2.0, 2.0, 2.0\)",
    ),
    "order ties": (rf.Norms, {"ties": "open"}, "norms.ties: expected one of closed, all, none; got 'open'"),
    "centering": (
        rf.BetweenBlocks,
        {"centering": "all"},
        "between.centering: expected one of None, blocks, layers; got 'all'",
    ),
    "centred layers of DenseNets": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "between": rf.BetweenBlocks(centering="layers"), "densenet": rf.DenseNetBlocks(1)},
        "between.centering: expected None or 'blocks' with densenet.depth, got 'layers'",
    ),
    "classes": (TorchImageConfig, {**IMAGE_SHAPE, "classes": -1}, "classes: .* at least 0, got -1"),
    "classifier channels": (
        TorchImageConfig,
        {**IMAGE_SHAPE, "classes": 2, "classifier_channels": 0},
        "classifier_channels: expected an integer of at least 1, got 0",
    ),
    "squeezed data mean without a squeeze": (
        TorchImageConfig,
        {**IMAGE_SHAPE, "data": rf.ImageTransform((0,) * 4, (1,) * 4, logit_alpha=None)},
        r"data.mean: expected 1 numbers, one a channel, got \(0, 0, 0, 0\)",
    ),
    "squeezed data mean of a plain config": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, **SQUEEZED, "data": rf.ImageTransform((0,) * 4, (1,) * 4, logit_alpha=None)},
        r"data.mean: expected 1 numbers, one a channel, got \(0, 0, 0, 0\)",
    ),
    "squeezed data mean of another length": (
        TorchImageConfig,
        {**IMAGE_SHAPE, **SQUEEZED, "data": rf.ImageTransform((0,) * 2, (1,) * 2, logit_alpha=None)},
        r"data.mean: expected 4 numbers, one a channel, got \(0, 0\)",
    ),
    "squeezed data mean alone": (
        TorchImageConfig,
        {**IMAGE_SHAPE, **SQUEEZED, "data": rf.ImageTransform((0,) * 4, (1,), logit_alpha=None)},
        r"data.std: expected 4 numbers, one a channel, got \(1,\)",
    ),
    "widths of another number of scales": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "blocks": (1, 1), "hidden_channels": (4,)},
        r"hidden_channels: expected one width, or 2, one for each scale, got \(4,\)",
    ),
    "a width of zero": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "blocks": (1, 1), "hidden_channels": (4, 0)},
        "hidden_channels: expected an integer of at least 1, got 0",
    ),
    "widths of a flow of the PyTorch code": (
        TorchImageConfig,
        {**IMAGE_SHAPE, "blocks": (1, 1), "hidden_channels": (4, 4)},
        r"hidden_channels: expected one width for all scales, got \(4, 4\)",
    ),
    "widths of a float": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "hidden_channels": 4.0},
        "hidden_channels: expected an integer of at least 1, got 4.0",
    ),
    "alpha": (rf.ImageTransform, {"logit_alpha": 0.5}, "data.logit_alpha: expected a number in"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_named(case):
    """A config that cannot be built says which field, what was expected and what came."""
    kind, arguments, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


VECTOR = {"dim": 3, "blocks": 1, "preactivation": "none"}
WIDTHS = {
    "odd hidden width, clipswish": (
        rf.VectorFlowConfig(**VECTOR, hidden=(4, 5), activation="clipswish"),
        "activation: expected widths that 2 divides for clipswish, got 5",
    ),
    "odd hidden width, maxmin": (
        rf.VectorFlowConfig(**VECTOR, hidden=(5,), activation="maxmin"),
        "activation: expected widths that 2 divides for maxmin, got 5",
    ),
    "odd growth, clipswish": (
        rf.VectorFlowConfig(**VECTOR, activation="clipswish", densenet=rf.DenseNetBlocks(depth=1, growth=5)),
        "activation: expected widths that 2 divides for clipswish, got 5",
    ),
    "odd hidden channels": (
        rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=3, activation="clipswish"),
        "activation: expected widths that 2 divides for clipswish, got 3",
    ),
    "odd fc width": (
        rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, activation="maxmin", tail=rf.DenseTail(hidden=3)),
        "activation: expected widths that 2 divides for maxmin, got 3",
    ),
    "odd fc growth": (
        rf.ImageFlowConfig(
            (4, 4, 1),
            blocks=(1,),
            activation="clipswish",
            tail=rf.DenseTail(densenet_growth=3),
            densenet=rf.DenseNetBlocks(depth=1, growth=2),
        ),
        "activation: expected widths that 2 divides for clipswish, got 3",
    ),
    "odd channels before an activation": (
        rf.VectorFlowConfig(dim=3, blocks=2, hidden=(4,), activation="maxmin", preactivation="all_but_first"),
        "preactivation: expected 'none' for maxmin on 3 channels, .* got 'all_but_first'",
    ),
}


@pytest.mark.parametrize("case", WIDTHS)
def test_flows_that_cannot_be_made_say_why(case):
    """Errors that need the layers come when the layers are built, not at the first call."""
    config, message = WIDTHS[case]
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("activation", ["maxmin", "clipswish"])
def test_even_widths_are_taken(activation):
    """An odd number of data channels is accepted if no activation of pairs is applied to them."""
    config = rf.VectorFlowConfig(dim=3, blocks=1, hidden=(4,), activation=activation, preactivation="all_but_first")
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
    linears = flow.scales[0].bijectors[1].bijectors[0].contraction.linears
    assert [linear.linear_map.features_out for linear in linears] == [4 if activation == "maxmin" else 2, 3]


def test_config_of_another_kind():
    """A flow is made of one of the two configs."""
    with pytest.raises(ValueError, match="config: expected ImageFlowConfig or VectorFlowConfig, got dict"):
        rf.ResidualFlow({}, rngs=nnx.Rngs(0))
