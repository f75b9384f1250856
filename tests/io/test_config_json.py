"""Configs as JSON: what is written comes back, also what earlier versions wrote; the rest is refused by name.

tests/fixtures/before_compositions has files of the version before groups of settings, with flat configs.
"""

import json
import math
from dataclasses import fields

import pytest

import resflow_jax as rf
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.io.config_json import (
    FLOW_TYPES,
    FORMAT_VERSION,
    as_document,
    as_json,
    completed,
    config_from_json,
    config_to_json,
    from_document,
    upgraded,
)
from tests.paths import FIXTURES

OLD = FIXTURES / "before_compositions"
IMAGES = rf.ImageFlowConfig(
    (8, 8, 2),
    blocks=(1, 2),
    hidden_channels=6,
    kernels=(3, 5),
    activation="elu",
    preactivation="all",
    coefficient=0.5,
    condition_dim=3,
    matmul_dtype="bfloat16",
    data=rf.ImageTransform((0.1, 0.2), (0.3, 0.4), rf.Padding(2, "gaussian", 0.5, 0.25), logit_alpha=None),
    between=rf.BetweenBlocks(False, True, False, True, "blocks", True),
    norms=rf.Norms("1f1"),
    tail=rf.DenseTail(2, 5, 1, (math.inf, 2.5), 7, 8),
    densenet=rf.DenseNetBlocks(0, 9),
    scales=rf.Scales(True, True),
)
CONFIGS = {
    "images": IMAGES,
    "images of PyTorch": TorchImageConfig((4, 4, 1), fully_connected=True, padding_first=True, classes=3),
    "couplings": rf.CouplingFlowConfig.flow_pp((8, 8, 3), condition_dim=2),
    "couplings of vectors": rf.CouplingFlowConfig.nice((4,), conditioner=rf.MLPConditioner((3,), "elu", True, False)),
    "autoregressive": rf.AutoregressiveFlowConfig.made((4,), data=rf.VectorTransform((0.0,) * 4, (2.0,) * 4)),
    "continuous": rf.ContinuousFlowConfig.ffjord((8, 8, 1), adjoint="backsolve", time=0.5),
    "vectors": rf.VectorFlowConfig(2, norms=rf.Norms(learned=True, ties="none"), condition_dim=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back(name):
    """Equal, of the same types, hashable; as JSON of the standard, with a version."""
    config = CONFIGS[name]
    text = config_to_json(config)
    again = config_from_json(text)
    assert again == config and repr(again) == repr(config) and hash(again) == hash(config)
    assert json.loads(text, parse_constant=pytest.fail)["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("kind", [rf.ImageFlowConfig, rf.VectorFlowConfig])
def test_configs_are_short(kind):
    """At most 16 settings side by side; what a config says is found in its group."""
    assert len(fields(kind)) <= 16


# Every setting of the flat configs, each with another value than its default.
FLAT_IMAGES = {
    "type": "ImageFlowConfig",
    "shape": [8, 8, 2],
    "blocks": [1, 2],
    "hidden_channels": 6,
    "kernels": [3, 5],
    "dense_depth": 0,
    "dense_growth": 9,
    "fully_connected": False,
    "squeeze_first": True,
    "factor_out": True,
    "fc_blocks": 2,
    "fc_hidden": 5,
    "fc_layers": 1,
    "fc_norms": ["inf", 2.5],
    "fc_dense_first": 7,
    "fc_dense_growth": 8,
    "actnorm": False,
    "feature_actnorm": True,
    "first_actnorm": False,
    "batchnorm": True,
    "centering": "blocks",
    "invertible_linear": True,
    "activation": "elu",
    "preactivation": "all",
    "coefficient": 0.5,
    "norms": [1.0, "inf", 1.0],
    "learn_norms": False,
    "order_ties": "closed",
    "logit_alpha": None,
    "data_mean": [0.1, 0.2],
    "data_deviation": [0.3, 0.4],
    "padding": 2,
    "padding_noise": "gaussian",
    "padding_scale": 0.5,
    "padding_shift": 0.25,
    "padding_first": False,
    "classes": 0,
    "classifier_channels": 2,
    "matmul_dtype": "bfloat16",
}
FLAT_VECTORS = {
    "type": "VectorFlowConfig",
    "dim": 2,
    "blocks": 3,
    "hidden": [5],
    "dense_depth": 2,
    "dense_growth": 6,
    "actnorm": False,
    "first_actnorm": False,
    "batchnorm": True,
    "centering": "blocks",
    "invertible_linear": True,
    "activation": "relu",
    "preactivation": "all",
    "coefficient": 0.25,
    "norms": None,
    "learn_norms": False,
    "order_ties": "all",
    "data_mean": [1.0, 2.0],
    "data_deviation": [3.0, 4.0],
    "padding": 1,
    "padding_noise": "gaussian",
    "padding_scale": 2.0,
    "padding_shift": -1.0,
    "matmul_dtype": "bfloat16",
}


def without_condition(config):
    return type(config)(**{f.name: getattr(config, f.name) for f in fields(config) if f.name != "condition_dim"})


def read(values, **changes):
    return config_from_json(json.dumps({**values, **changes}))


def test_flat_settings_reach_their_groups():
    """Each of version 0, which has no version."""
    assert len(FLAT_IMAGES) == 39 and len(FLAT_VECTORS) == 24
    assert read(FLAT_IMAGES) == without_condition(IMAGES)
    assert read(FLAT_VECTORS) == rf.VectorFlowConfig(
        dim=2,
        blocks=3,
        hidden=(5,),
        activation="relu",
        preactivation="all",
        coefficient=0.25,
        matmul_dtype="bfloat16",
        data=rf.VectorTransform((1.0, 2.0), (3.0, 4.0), rf.Padding(1, "gaussian", 2.0, -1.0)),
        between=rf.BetweenBlocks(False, False, False, True, "blocks", True),
        norms=rf.Norms(ties="all"),
        densenet=rf.DenseNetBlocks(2, 6),
    )
    learned = {"norms": None, "fc_norms": None, "learn_norms": True, "order_ties": "none"}
    assert read(FLAT_IMAGES, **learned).norms == rf.Norms(learned=True, ties="none")
    found = read(FLAT_IMAGES, norms=None, fc_norms=None, dense_depth=2, data_mean=None, data_deviation=None)
    assert found.densenet == rf.DenseNetBlocks(2, 9)
    assert read({"type": "ImageFlowConfig", "shape": [4, 4, 1], "logit_alpha": 0.05}) == rf.ImageFlowConfig(
        (4, 4, 1), data=rf.ImageTransform(logit_alpha=0.05)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"fully_connected": True, "kernels": [1, 1]},
        {"padding_first": True, "data_mean": None, "data_deviation": None, "logit_alpha": 0.05},
        {"classes": 3},
        {"data_mean": [0.5] * 8, "data_deviation": [2.0] * 8},
    ],
)
def test_flat_settings_of_pytorch_files(changes):
    """A config that needs one of them is a `TorchImageConfig`; else their defaults are left out."""
    found = read(FLAT_IMAGES, **changes)
    assert type(found) is TorchImageConfig and found.classifier_channels == 2
    for name in ("fully_connected", "padding_first", "classes"):
        assert getattr(found, name) == changes.get(name, FLAT_IMAGES[name])
    assert found.data.mean == tuple(changes.get("data_mean", [0.1, 0.2]) or ()) or found.data.mean is None
    assert type(read(FLAT_IMAGES, padding_first=True, padding=0)) is rf.ImageFlowConfig


def test_settings_that_a_flat_config_lacks_have_their_defaults():
    """Files before a setting was added; a DenseNet of images then grows by 172 channels, of vectors by 64 features."""
    assert read({"type": "ImageFlowConfig", "shape": [4, 4, 1]}) == rf.ImageFlowConfig((4, 4, 1))
    assert read({"type": "VectorFlowConfig", "dim": 3}) == rf.VectorFlowConfig(3)
    assert read({"type": "ImageFlowConfig", "shape": [4, 4, 1], "dense_depth": 3}).densenet.growth == 172
    assert read({"type": "VectorFlowConfig", "dim": 3, "dense_depth": 3}).densenet.growth == 64


def test_files_of_the_version_before():
    """The three flows of tests/fixtures/before_compositions, which hold between them most settings."""
    safetensors = pytest.importorskip("safetensors", reason="needs the extra safetensors")
    expected = {
        "image": TorchImageConfig(
            (4, 4, 1),
            blocks=(1, 2),
            hidden_channels=4,
            kernels=(3, 1),
            coefficient=0.8,
            between=rf.BetweenBlocks(batchnorm=True, invertible_linear=True),
            norms=rf.Norms("222"),
            tail=rf.DenseTail(1, hidden=4, layers=2),
            scales=rf.Scales(factor_out=True),
            classes=2,
            classifier_channels=2,
        ),
        "vector": rf.VectorFlowConfig(
            3,
            blocks=2,
            hidden=(4,),
            preactivation="all",
            coefficient=0.8,
            data=rf.VectorTransform((0.0, 1.0, 2.0), (1.0, 2.0, 3.0)),
            between=rf.BetweenBlocks(centering="blocks"),
            norms=rf.Norms("1f2"),
        ),
        "densenet": rf.ImageFlowConfig(
            (2, 2, 1),
            blocks=(1, 1),
            coefficient=0.8,
            data=rf.ImageTransform((0.5,), (0.25,), rf.Padding(1, "gaussian", 0.5, 0.1), logit_alpha=None),
            tail=rf.DenseTail(0),
            densenet=rf.DenseNetBlocks(1, 4),
        ),
    }
    for name, config in expected.items():
        with safetensors.safe_open(OLD / f"{name}.safetensors", framework="numpy") as file:
            found = config_from_json(file.metadata()["config"])
        assert found == config and type(found) is type(config)


@pytest.mark.parametrize("version", [{}, {"format_version": 1}])
def test_roulettes_of_earlier_versions(version):
    """Versions 0 and 1 called the minimal-residual steps `krylov`, and had no `subsample`; estimators at any depth."""
    roulette = {"type": "Roulette", "length": {"type": "Poisson", "rate": 3.0}, "exact_terms": 2, "krylov": 4}
    document = {"type": "Run", **version, "inner": {"type": "Inner", "estimators": [roulette]}}
    found = upgraded(document)["inner"]["estimators"][0]
    types = {"Roulette": rf.Roulette, "Poisson": rf.Poisson}
    expected = rf.Roulette(rf.Poisson(3.0), exact_terms=2, minres_steps=4, subsample=1)
    assert from_document({**found, "format_version": 2}, rf.Roulette, types) == expected
    with pytest.raises(ValueError, match="unknown: krylov"):
        from_document({**roulette, "format_version": 2}, rf.Roulette, types)


@pytest.mark.parametrize("group", ["VectorTransform", "ImageTransform"])
def test_deviations_of_version_1(group):
    """`data.deviation` is `data.std` now."""
    data = {"type": group, "mean": [1.0], "deviation": [2.0]}
    flow = {"type": "VectorFlowConfig", "dim": 1}
    if group == "ImageTransform":
        data |= {"logit_alpha": None}
        flow = {"type": "ImageFlowConfig", "shape": [4, 4, 1]}
    assert config_from_json(json.dumps({**flow, "format_version": 1, "data": data})).data.std == (2.0,)
    with pytest.raises(ValueError, match="unknown: deviation"):
        config_from_json(json.dumps({**flow, "format_version": 2, "data": data}))


def edited(*path, **changes):
    """The document of a config of images with fields of a nested object set, or removed where they are None."""
    document = as_document(IMAGES)
    inner = document
    for name in path:
        inner = inner[name]
    inner |= changes
    for name in [name for name, value in changes.items() if value is None]:
        del inner[name]
    return document


def test_missing_fields_have_their_defaults():
    """Files from before a field or a group was added can be read."""
    document = edited("tail", hidden=None, norms=None, densenet_first=None)
    assert from_document(document, rf.ImageFlowConfig, FLOW_TYPES).tail == rf.DenseTail(2, 128, 1, None, 64, 8)
    found = from_document(edited(scales=None, condition_dim=None), rf.ImageFlowConfig, FLOW_TYPES)
    assert found.scales == rf.Scales() and found.condition_dim is None and found.hidden_channels == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config: expected JSON of a config of type ImageFlowConfig or VectorFlowConfig or .*Torch.*, got '{'"),
        ("[]", r"config: expected JSON of a config of type .*, got '\[\]'"),
        ('{"type": "Norms"}', "config: expected JSON of a config of type .*Norms"),
        ('{"type": ["Norms"]}', "config: expected JSON of a config of type .*Norms"),
        (json.dumps(edited(depth=3)), r"config: expected the fields of ImageFlowConfig, got others \(unknown: depth\)"),
        (json.dumps(edited("tail", depth=3)), r"config.tail: .* of DenseTail, got others \(unknown: depth\)"),
        (json.dumps(edited(shape=None)), r"config: .*ImageFlowConfig, got others \(missing: shape\)"),
        (json.dumps(edited("tail", type="Tail")), "config.tail.type: expected one of .*; got 'Tail'"),
        (json.dumps(edited("tail", type=None)), "config.tail.type: expected one of .*; got None"),
        (json.dumps(edited(tail=3)), "config.tail: expected DenseTail, got 3"),
        (json.dumps(edited(tail=as_json(rf.Norms()))), r"config.tail: expected DenseTail, got Norms\("),
        (json.dumps(edited(blocks=["one"])), r"config.blocks\[0\]: expected int, got 'one'"),
        (json.dumps(edited(coefficient=True)), "config.coefficient: expected float, got True"),
        (json.dumps(edited(coefficient="inf")), r"coefficient: expected a number in \(0, 1\), got inf"),
        (json.dumps(edited("tail", blocks=-1)), "tail.blocks: expected an integer of at least 0, got -1"),
        (
            json.dumps(edited(format_version=99)),
            "format_version: .* got 99, written by a later version",
        ),
        (json.dumps(edited(format_version="1")), "format_version: expected at most [0-9]+, got '1'"),
        (json.dumps({**FLAT_IMAGES, "depth": 3}), r"config: .* got others \(unknown: depth\)"),
        (json.dumps({**FLAT_IMAGES, "fc_norms": 2}), "config.tail.norms: expected str or .*, got 2"),
    ],
)
def test_bad_json_is_named(text, message):
    """The field, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        config_from_json(text)


def test_only_configs_of_flows_are_written():
    """A group alone is none."""
    for config in (rf.Norms(), None, {}):
        with pytest.raises(ValueError, match=r"config: expected one of ImageFlowConfig, .*; got"):
            config_to_json(config)


def test_documents_are_completed():
    """Defaults of what they lack, at every depth; of other types they are left as they are."""
    plain = rf.ImageFlowConfig((4, 4, 1))
    lacking = {"type": "ImageFlowConfig", "shape": [8, 8, 1], "tail": {"type": "DenseTail", "blocks": 7}}
    expected = rf.ImageFlowConfig((8, 8, 1), tail=rf.DenseTail(7))
    assert completed(lacking, plain) == as_json(expected)
    assert completed(lacking, rf.VectorFlowConfig(2)) == lacking
    assert upgraded(as_document(plain)) == as_json(plain)
