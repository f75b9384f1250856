"""A tiny run of `python -m experiments.toy`: its files and its promises."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from experiments import density, toy
from experiments.configs import CONFIGS
from experiments.configs.toy import ToyEvaluationConfig
from experiments.runs import launch
from experiments.runs.launch import run_config
from experiments.runs.tasks.toy import ToyTask
from resflow_jax.data.toy import sample_toy
from resflow_jax.training.evaluation import vector_log_prob

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"data": "spiral"}, "data: expected one of"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIGS["8gaussians"], **setting)
    with pytest.raises(ValueError, match="cells: expected an integer of at least 1, got 0"):
        ToyEvaluationConfig(cells=0)


@pytest.fixture
def tiny(tmp_path):
    """Sizes are shared by all runs of this file, so that most programs are compiled once."""
    return replace(
        CONFIGS["8gaussians"],
        workdir=tmp_path / "run",
        steps=30,
        batch_size=64,
        log_every=10,
        model=rf.VectorFlowConfig(dim=2, blocks=2, hidden=(16,), activation="elu", preactivation="none"),
        evaluation=ToyEvaluationConfig(examples=500, samples=1000, cells=60, every=20),
    )


@pytest.mark.parametrize("estimator", [rf.Exact(), rf.Roulette()])
def test_a_tiny_run_writes_everything_and_its_density_integrates_to_one(estimator, tiny, capsys):
    """The flow is a density after any training; a few steps improve it, and a second call resumes it."""
    result = run_config(replace(tiny, estimator=estimator))
    assert {path.name for path in tiny.workdir.iterdir()} == {
        *("config.json", "metrics.jsonl", "certificate.json", "checkpoints", "tensorboard", "training"),
        *("toy.png", "curves.png", "report.html", ".lock"),
    }
    assert (tiny.workdir / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tiny.workdir / "training").iterdir()) == [
        "0000020_samples.png",
        "0000030_samples.png",
    ]
    assert json.loads((tiny.workdir / "config.json").read_text())["estimator"]["type"] == type(estimator).__name__
    *train, test = [json.loads(line) for line in (tiny.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in train] == [10, 20, 30]
    assert {line["split"] for line in train} == {"train"}
    assert test["split"] == "test" and (test["log_prob"], test["log_prob_stderr"]) == result[:2]
    assert train[0]["log_prob"] < result.mean < -2.8  # -2.84: minus the entropy of the data
    assert train[1]["validation_log_prob"] < train[2]["validation_log_prob"]
    assert 0 < result.stderr < 0.2 and result.noise_stderr == 0
    printed = capsys.readouterr().out
    assert "WARNING" not in printed
    assert abs(float(re.search(r"integral of density +([0-9.]+)", printed)[1]) - 1) < 0.01
    assert "certified every block is invertible: Lip(g) <= " in " ".join(printed.split())
    assert printed.splitlines()[-1] == f"test log_prob, nats {result.mean:.4f} +- {result.stderr:.4f}"
    if isinstance(estimator, rf.Exact):
        assert run_config(tiny) == result
        assert "no step taken" in capsys.readouterr().out


def test_a_wrong_integral_is_reported(tiny, capsys):
    """One cell is too few for the integral."""
    run_config(replace(tiny, evaluation=replace(tiny.evaluation, cells=1, every=30)))
    assert "WARNING                 the density integrates to" in capsys.readouterr().out


def test_a_run_that_diverges_stops(tiny, monkeypatch):
    def batches(self, step, part, parts):
        while True:
            yield np.full((64, 2), 1e200) * np.random.default_rng(step).normal(size=(64, 2))

    monkeypatch.setattr(ToyTask, "batches", batches)
    with pytest.raises(FloatingPointError, match="training diverged between steps 1 and 10"):
        run_config(tiny)


def test_exact_log_prob_does_not_depend_on_the_batching(tiny):
    flow = rf.ResidualFlow(tiny.model, rngs=nnx.Rngs(0))
    points = sample_toy("rings", 1200, np.random.default_rng(0))
    whole = np.asarray(flow.log_prob(points, estimator=rf.Exact()))
    (pieces,) = vector_log_prob(flow, points, jax.random.key(0), batch_size=500)
    assert pieces.shape == (1200,)
    np.testing.assert_allclose(pieces, whole, rtol=1e-10)


def test_other_points_and_points_in_disorder(tiny):
    """Other data are another density or a file; permuted elements keep their own distribution."""
    task = ToyTask(tiny)
    assert task.other("rings").shape == (500, 2)
    test = task.splits.test
    shuffled = task.permuted(test)
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(test, axis=0))
    assert (shuffled != test).mean() > 0.9
    np.save(tiny.workdir.parent / "wide.npy", np.arange(90.0).reshape(30, 3))
    with pytest.raises(ValueError, match="other: expected vectors of dimension 2, like those of 8gaussians; got 3 in"):
        task.other(str(tiny.workdir.parent / "wide.npy"))
    with pytest.raises(ValueError, match=r"model\.dim: expected 2, the dimension of the vectors, got 3"):
        ToyTask(replace(tiny, model=rf.VectorFlowConfig(dim=3)))


def test_the_command_line_reaches_the_config(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(launch, "run_config", seen.append)
    toy.main(["moons", "--estimator", "roulette", "--model.blocks", "3", "--evaluation.cells", "10"])
    toy.main([])
    density.main(["rings", "--steps", "7"])
    assert (seen[0].data, seen[0].estimator) == ("moons", rf.Roulette())
    assert (seen[0].model.blocks, seen[0].evaluation.cells) == (3, 10)
    assert seen[1] == CONFIGS["8gaussians"]
    assert (seen[2].data, seen[2].steps, seen[2].workdir.name) == ("rings", 7, "rings")
    with pytest.raises(SystemExit):
        toy.main(["spiral"])
    assert "8gaussians" in capsys.readouterr().err
