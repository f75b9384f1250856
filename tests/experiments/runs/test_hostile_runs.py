"""A config.json that was changed: nesting, and models of another size than the checkpoint, are refused by name."""

import json
from dataclasses import replace

import pytest

import resflow_jax as rf
from experiments.runs.saved import saved_config
from experiments.runs.setup import _check_size
from experiments.runs.workdir import claim_workdir
from resflow_jax.io.config_json import as_document
from tests.experiments import tiny


def with_checkpoint(directory, nbytes):
    state = directory / "checkpoints" / "3" / "state"
    state.mkdir(parents=True)
    (state / "data").write_bytes(bytes(nbytes))
    return replace(tiny.DIGITS, workdir=directory)


@pytest.mark.parametrize(
    "model",
    [
        rf.VectorFlowConfig(3, 2, hidden=(8,) * 10_000),
        rf.VectorFlowConfig(3, 2, hidden=(2**31, 2**20)),
        rf.VectorFlowConfig(2**40, 2, hidden=(2**40,)),
        rf.ImageFlowConfig((2**12, 2**12, 3), (2**20,), 512),
        rf.ImageFlowConfig((8, 8, 1), (1,), 4, densenet=rf.DenseNetBlocks(10_000)),
        rf.ClassifierConfig((2**14, 2**14, 3), 10, (2**20,), (2**20,)),
    ],
    ids=["layers", "width", "beyond 64 bits", "images", "dense layers", "classifier"],
)
def test_a_model_of_another_size(model, tmp_path):
    config = replace(with_checkpoint(tmp_path, 30_000), model=model)
    with pytest.raises(ValueError, match=r"config\.json: model of another size than .*3: config: expected"):
        _check_size(config)


def test_models_of_the_same_size(tmp_path):
    """The right model passes, and any model of a new run."""
    _check_size(with_checkpoint(tmp_path / "run", 30_000))
    _check_size(replace(tiny.DIGITS, workdir=tmp_path, model=rf.VectorFlowConfig(3, 2, hidden=(8,) * 10_000)))
    _check_size(with_checkpoint(tmp_path / "damaged", 0))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model":' * 100_000, json.dumps({"type": "x"}) + "x", "9" * 10_000])
def test_what_is_no_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected the config of a run of this version"):
        saved_config(tmp_path)
    if not text.isdigit():
        with pytest.raises(ValueError, match=r"config of a run in .*config\.json, could not read it"):
            claim_workdir(tmp_path, tiny.DIGITS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 10**30),
        ("optimizer", {"type": "OptimizerConfig", "milestones": ["a"], "schedule": "step"}),
        ("optimizer", {"type": "OptimizerConfig", "learning_rate": "x"}),
        ("optimizer", {"type": "OptimizerConfig", "weight_decay": None}),
        ("\x1b[2J", 1),
    ],
)
def test_settings_of_no_use(setting, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(as_document(tiny.DIGITS) | {setting: value}))
    with pytest.raises(ValueError, match=r"config\.json: expected the config of a run") as error:
        saved_config(tmp_path)
    assert str(error.value).isprintable()
