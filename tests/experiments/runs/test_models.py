"""`--model` takes the place of the residual flow, with the same data, and its run is read back."""

import re

import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from experiments import density
from experiments.configs import CONFIGS
from experiments.configs.tiny import tiny
from experiments.runs import rehearsal
from experiments.runs.launch import run_config
from experiments.runs.models import IMAGES, LEARNING_RATE, VECTORS
from experiments.runs.saved import saved_flow
from resflow_jax.models.residual_flow import flow_from_config


def parsed(*arguments):
    return density.COMMAND.parse([*arguments])


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("data", ["digits", "fashion_mnist", "vectors", "moons"])
def test_every_model(data, name):
    """It fits the data, keeps their transform, trains with small steps, and has a place of its own; tiny ones build."""
    if name not in IMAGES and data in ("digits", "fashion_mnist"):
        pytest.skip("for vectors alone")
    config, default = parsed(data, "--model", name), CONFIGS[data]
    if name == "residual":
        assert config == default
        return
    assert config.workdir.name == f"{default.workdir.name}_{name}"
    assert config.optimizer.learning_rate == min(LEARNING_RATE, default.optimizer.learning_rate)
    assert config.data == default.data and config.evaluation == default.evaluation
    is_image = isinstance(default.model, rf.ImageFlowConfig)
    assert config.model.shape == (default.model.shape if is_image else (default.model.dim,))
    assert getattr(config.model.data, "logit_alpha", None) == getattr(default.model.data, "logit_alpha", None)
    small = tiny(config).model
    flow = nnx.eval_shape(lambda: flow_from_config(small, rngs=nnx.Rngs(0)))
    size = sum(leaf.size for leaf in nnx.to_pure_dict(nnx.state(flow, nnx.Param)).values() if hasattr(leaf, "size"))
    assert type(small) is type(config.model) and size < 1e5
    assert (flow.dequantizer is not None) == (name == "flow_pp" and is_image)


def test_settings_of_a_model(tmp_path):
    """They are those of its config; `--data.path` gives it the shape; tiny or not, the word says the kind."""
    config = parsed("digits", "--model", "glow", "--model.couplings", "3", "--model.conditioner.hidden", "8", "8")
    assert config.model.couplings == 3 and config.model.conditioner.hidden == (8, 8)
    assert not config.model.data.dequantization.couplings  # its own, not that of the residual flow
    table = tmp_path / "table.npy"
    np.save(table, np.random.default_rng(0).normal(size=(100, 4)))
    config = parsed("vectors", "--tiny", "--model", "maf", "--data.path", str(table))
    assert config.model.shape == (4,) and config.model.layers == 1
    residual = parsed("digits_uniform", "--model.data.dequantization.couplings", "2")
    assert residual.model.data.dequantization == rf.Dequantization(2, 32)


def test_an_unknown_model(capsys):
    with pytest.raises(SystemExit):
        parsed("digits", "--model", "maf")
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert "--model" in said and "real_nvp" in said


@pytest.mark.parametrize("model", ["maf", "ffjord"])
def test_a_run_of_vectors(model, tmp_path, monkeypatch):
    """It compiles its programs first, trains, evaluates and draws."""
    monkeypatch.setattr(rehearsal, "number_of_cores", lambda: 2)
    assert np.isfinite(run_config(parsed("moons", "--tiny", "--model", model, "--workdir", str(tmp_path))).mean)
    assert {"report.html", "toy.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_run(tmp_path, capsys):
    """It trains, evaluates, draws and is read back; its table says that there is nothing to certify, and why."""
    result = run_config(parsed("digits", "--tiny", "--model", "nice", "--workdir", str(tmp_path)))
    assert 2 < result.mean < 5
    printed = capsys.readouterr().out
    assert "nothing: there are no residual blocks; no Lipschitz bound for 1 layer AdditiveCoupling" in printed
    assert "upper bound" not in printed
    found = saved_flow(tmp_path, "latest")
    assert isinstance(found.flow, rf.CouplingFlow) and found.config.model.coupling == "additive"
    assert {"report.html", "samples.png", "certificate.json"} <= {path.name for path in tmp_path.iterdir()}


def test_the_default_run(tmp_path, capsys):
    """Its dequantisation is variational: it says that its figure is a bound, and so does the run that is read back."""
    small = ("--tiny", "--model.blocks", "1", "--model.tail.blocks", "0", "--model.kernels", "3", "3")
    result = run_config(parsed(*small, "--workdir", str(tmp_path)))
    assert 2 < result.mean < 6
    assert "these bits/dim are an upper bound on those of the integer images" in capsys.readouterr().out
    found = saved_flow(tmp_path, "latest")
    assert "an upper bound" in found.task.notes["dequantisation"] and found.flow.dequantizer is not None
    assert found.flow.config.data.dequantization == rf.Dequantization(1, 4)
