"""Configurations that cannot be: the errors name the field, what was expected and what came."""

import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

IMAGE_SHAPE = {"shape": (8, 8, 1)}
BAD_CONFIGS = {
    "zero blocks": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "blocks": (2, 0)}, "blocks: expected an integer of at least 1"),
    "no scales": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "blocks": ()}, "blocks: expected at least one scale"),
    "unsqueezable": (
        rf.ImageFlowConfig,
        {"shape": (7, 8, 1), "blocks": (1, 1)},
        r"shape: .*divisible by 2.*\(7, 8, 1\)",
    ),
    "unsqueezable first": (
        rf.ImageFlowConfig,
        {"shape": (6, 6, 1), "blocks": (1, 1), "squeeze_first": True},
        "shape: .*divisible by 4.*squeeze_first",
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
        rf.VectorFlowConfig,
        {"dim": 2, "data_mean": (0.0, 1.0)},
        "data_deviation: expected both or none of data_mean and data_deviation, got None",
    ),
    "deviation of zero": (
        rf.VectorFlowConfig,
        {"dim": 2, "data_mean": (0, 0), "data_deviation": (1, 0)},
        "data_deviation: expected a positive number, got 0",
    ),
    "data deviation alone": (rf.VectorFlowConfig, {"dim": 2, "data_deviation": (1.0, 1.0)}, "data_deviation: .* both"),
    "data mean of another length": (
        rf.VectorFlowConfig,
        {"dim": 2, "data_mean": (0.0,), "data_deviation": (1.0,)},
        r"data_mean: expected 2 numbers, one a channel, got \(0.0,\)",
    ),
    "data mean no tuple": (
        rf.VectorFlowConfig,
        {"dim": 2, "data_mean": 0.0, "data_deviation": 1.0},
        "data_mean: expected a tuple of numbers, got 0.0",
    ),
    "data mean beside logit": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "data_mean": (0.0,), "data_deviation": (1.0,)},
        "data_mean: expected None beside logit_alpha",
    ),
    "norms of another length": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": "22"},
        "norms: expected 4 orders",
    ),
    "norms below one": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": (2, 0.5, 2, 2)},
        r"norms\[1\]: expected an order",
    ),
    "norms unknown": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "norms": "22x2"}, "norms: expected digits .* got 'x'"),
    "norms beside learning": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": "222f", "learn_norms": True},
        "norms: expected None beside learn_norms, got '222f'",
    ),
    "norms of DenseNets": (
        rf.VectorFlowConfig,
        {"dim": 2, "norms": "2222", "dense_depth": 1},
        "norms: expected None beside dense_depth, got '2222'",
    ),
    "learned norms of DenseNets": (
        rf.VectorFlowConfig,
        {"dim": 2, "learn_norms": True, "dense_depth": 1},
        "learn_norms: expected False beside dense_depth, got True",
    ),
    "dense depth": (rf.VectorFlowConfig, {"dim": 2, "dense_depth": -1}, "dense_depth: .* at least 0, got -1"),
    "dense growth": (rf.VectorFlowConfig, {"dim": 2, "dense_growth": 0}, "dense_growth: .* at least 1, got 0"),
    "dense first": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "fc_dense_first": 0}, "fc_dense_first: .* at least 1, got 0"),
    "dense fc growth": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "fc_dense_growth": 0}, "fc_dense_growth: .* 1, got 0"),
    "padding": (rf.VectorFlowConfig, {"dim": 2, "padding": -1}, "padding: expected an integer of at least 0, got -1"),
    "noise": (
        rf.VectorFlowConfig,
        {"dim": 2, "padding_noise": "x"},
        "padding_noise: expected one of uniform",
    ),
    "padding scale": (
        rf.VectorFlowConfig,
        {"dim": 2, "padding_scale": 0.0},
        "padding_scale: expected a positive .* 0.0",
    ),
    "padding shift": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "padding_shift": np.nan},
        "padding_shift: expected a finite number, got nan",
    ),
    "fully connected DenseNets": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "fully_connected": True, "dense_depth": 2},
        "fully_connected: expected False beside dense_depth 2, got True",
    ),
    "dense norms of another length": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "fc_norms": "22"},
        "fc_norms: expected 4 orders for 3 layers, got 2 in '22'",
    ),
    "dense norms below one": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "fc_norms": (2, 0.5, 2, 2)},
        r"fc_norms\[1\]: expected an order",
    ),
    "dense norms unknown": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "fc_norms": "22x2"}, "fc_norms: .* got 'x'"),
    "dense norms beside learning": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "fc_norms": "222f", "learn_norms": True},
        "fc_norms: expected None beside learn_norms, got '222f'",
    ),
    "dense norms of DenseNets": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "fc_norms": "2222", "dense_depth": 1},
        "fc_norms: expected None beside dense_depth, got '2222'",
    ),
    "order ties": (
        rf.VectorFlowConfig,
        {"dim": 2, "order_ties": "open"},
        "order_ties: expected one of closed, all, none; got 'open'",
    ),
    "centering": (
        rf.VectorFlowConfig,
        {"dim": 2, "centering": "all"},
        "centering: expected one of None, blocks, layers; got 'all'",
    ),
    "centred layers of DenseNets": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "centering": "layers", "dense_depth": 1},
        "centering: expected None or 'blocks' beside dense_depth, got 'layers'",
    ),
    "classes": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "classes": -1}, "classes: .* at least 0, got -1"),
    "classifier channels": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "classes": 2, "classifier_channels": 0},
        "classifier_channels: expected an integer of at least 1, got 0",
    ),
    "squeezed data mean without a squeeze": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "logit_alpha": None, "data_mean": (0,) * 4, "data_deviation": (1,) * 4},
        r"data_mean: expected 1 numbers, one a channel, got \(0, 0, 0, 0\)",
    ),
    "squeezed data mean of another length": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "squeeze_first": True, "logit_alpha": None, "data_mean": (0,) * 2, "data_deviation": (1,) * 2},
        r"data_mean: expected 4 numbers, one a channel, got \(0, 0\)",
    ),
    "squeezed data mean alone": (
        rf.ImageFlowConfig,
        {**IMAGE_SHAPE, "squeeze_first": True, "logit_alpha": None, "data_mean": (0,) * 4, "data_deviation": (1,)},
        r"data_deviation: expected 4 numbers, one a channel, got \(1,\)",
    ),
    "alpha": (rf.ImageFlowConfig, {**IMAGE_SHAPE, "logit_alpha": 0.5}, "logit_alpha: expected a number in"),
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
        rf.VectorFlowConfig(**VECTOR, dense_depth=1, dense_growth=5, activation="clipswish"),
        "activation: expected widths that 2 divides for clipswish, got 5",
    ),
    "odd hidden channels": (
        rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=3, activation="clipswish"),
        "activation: expected widths that 2 divides for clipswish, got 3",
    ),
    "odd fc width": (
        rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, fc_hidden=3, activation="maxmin"),
        "activation: expected widths that 2 divides for maxmin, got 3",
    ),
    "odd fc growth": (
        rf.ImageFlowConfig(
            (4, 4, 1), blocks=(1,), dense_depth=1, dense_growth=2, fc_dense_growth=3, activation="clipswish"
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
    """What shows only when the layers are built: at that moment, not at the first call."""
    config, message = WIDTHS[case]
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("activation", ["maxmin", "clipswish"])
def test_even_widths_are_taken(activation):
    """An odd number of data channels is no obstacle where no activation of pairs sees it."""
    config = rf.VectorFlowConfig(dim=3, blocks=1, hidden=(4,), activation=activation, preactivation="all_but_first")
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
    linears = flow.scales[0].bijectors[1].bijectors[0].contraction.linears
    assert [linear.linear_map.features_out for linear in linears] == [4 if activation == "maxmin" else 2, 3]


def test_config_of_another_kind():
    """A flow is made of one of the two configs."""
    with pytest.raises(ValueError, match="config: expected ImageFlowConfig or VectorFlowConfig, got dict"):
        rf.ResidualFlow({}, rngs=nnx.Rngs(0))
