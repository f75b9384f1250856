"""The configuration of networks that classify images: sizes, whether there is a density, and errors."""

import pytest

import resflow_jax as rf

SMALL = {"shape": (4, 4, 1), "classes": 3, "blocks": (1, 1), "hidden_channels": (2, 2), "padding": 0}


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        ({}, (1, 4)),
        ({"padding": 2}, (3, 12)),
        ({"squeeze_first": True}, (4, 16)),
        ({"squeeze_first": True, "padding": 1}, (5, 20)),
    ],
)
def test_channels(settings, channels):
    """Those of an image, four times as many where it is squeezed first, and padding; each stage has four times more."""
    assert rf.ClassifierConfig(**{**SMALL, **settings}).channels == channels


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"head": "mixture"}, None),
        ({"padding": 2}, "padding 2: with appended zeros the network is injective, but not a bijection"),
        ({"coefficient": None}, "coefficient None: the blocks need not be bijections"),
        ({"coefficient": None, "architecture": "standard"}, "coefficient None: the blocks need not be bijections"),
    ],
)
def test_density(settings, reason):
    """There is a density without padding and with a bound on every convolution; else the reason names the setting."""
    config = rf.ClassifierConfig(**{**SMALL, **settings})
    assert config.no_density == reason and config.has_density == (reason is None)


def test_lists_become_tuples():
    """A config from lists, as of a file, equals the one of tuples."""
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}
    assert rf.ClassifierConfig(**lists) == rf.ClassifierConfig(**SMALL)
    assert hash(rf.ClassifierConfig(**lists)) == hash(rf.ClassifierConfig(**SMALL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (4, 4)}, r"shape: expected \(H, W, C\), got \(4, 4\)"),
        ({"shape": (4, 0, 1)}, "shape: expected an integer of at least 1, got 0"),
        ({"shape": (4, 3, 1)}, r"shape: expected height and width divisible by 2, for 2 stages, got \(4, 3, 1\)"),
        ({"shape": (6, 4, 1), "squeeze_first": True}, "shape: .* by 4, for 2 stages with squeeze_first, got"),
        ({"classes": 1}, "classes: expected an integer of at least 2, got 1"),
        ({"blocks": ()}, "blocks: expected at least one stage"),
        ({"blocks": (1, 0)}, "blocks: expected an integer of at least 1, got 0"),
        ({"hidden_channels": (2,)}, r"hidden_channels: expected 2 widths, .*, got \(2,\)"),
        ({"hidden_channels": (2, 0)}, "hidden_channels: expected an integer of at least 1, got 0"),
        ({"padding": -1}, "padding: expected an integer of at least 0, got -1"),
        ({"activation": "gelu"}, "activation: expected one of .*; got 'gelu'"),
        ({"activation": "clipswish"}, "activation: expected an activation without parameters that keeps the number"),
        ({"activation": "lipswish"}, "activation: expected an activation without parameters"),
        ({"activation": "maxmin"}, "activation: expected an activation without parameters"),
        ({"activation": "fullsort"}, "activation: expected an activation that acts on single channels, got 'fullsort'"),
        ({"coefficient": 1.0}, r"coefficient: expected a number in \(0, 1\), got 1.0"),
        ({"architecture": "resnet"}, "architecture: expected one of invertible, standard; got 'resnet'"),
        ({"architecture": "standard"}, "coefficient: expected None for the standard architecture, got 0.9"),
        ({"head": "linear"}, "head: expected one of pooled, mixture; got 'linear'"),
        ({"head_channels": 0}, "head_channels: expected an integer of at least 1, got 0"),
        ({"head_channels": 2, "head": "mixture"}, "head_channels: expected None together with head 'mixture', got 2"),
        ({"logit_alpha": 0.5}, r"logit_alpha: expected a number in \(0, 0.5\), got 0.5"),
        ({"head": "mixture", "padding": 2}, r"head: expected 'pooled' .* \(padding 2: .*\), got 'mixture'"),
        (
            {"head": "mixture", "coefficient": None},
            r"head: expected 'pooled' .* \(coefficient None: .*\), got 'mixture'",
        ),
    ],
)
def test_bad_settings(settings, message):
    """The error names the setting, what was expected and what came."""
    with pytest.raises(ValueError, match=f"^{message}"):
        rf.ClassifierConfig(**{**SMALL, **settings})
