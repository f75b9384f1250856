"""The toy densities, and a tiny run of `python -m experiments.toy` from training to the picture."""

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
from experiments.runs import launch, train
from experiments.runs.launch import run_config
from experiments.runs.tasks.toy import ToyTask
from resflow_jax.data.toy import TOY_DENSITIES, sample_toy
from resflow_jax.training.evaluation import vector_log_prob


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """Programs compiled by a run stay out of the home directory."""
    monkeypatch.setattr(train, "use_compilation_cache", lambda: None)


@pytest.mark.parametrize("name", TOY_DENSITIES)
@pytest.mark.parametrize("number", [1, 2, 7, 4000])
def test_samples_have_the_promised_form(name, number):
    points = sample_toy(name, number, np.random.default_rng(0))
    assert points.shape == (number, 2)
    assert points.dtype == np.float32
    assert np.isfinite(points).all()
    assert np.abs(points).max() < 5.5


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_samples_are_a_function_of_the_generator(name):
    rng = np.random.default_rng(3)
    first, second = sample_toy(name, 100, rng), sample_toy(name, 100, rng)
    np.testing.assert_array_equal(first, sample_toy(name, 100, np.random.default_rng(3)))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_the_scale_is_that_of_the_plane_around_the_origin(name):
    points = sample_toy(name, 20000, np.random.default_rng(0))
    assert np.abs(points.mean(0)).max() < 0.6
    assert 0.9 < points.std(0).min() < points.std(0).max() < 2.6


def test_eight_gaussians_have_eight_equal_modes():
    """Every point belongs to one of eight centres, each with an eighth of them, spread by sqrt(1/8)."""
    points = sample_toy("8gaussians", 40000, np.random.default_rng(0))
    angle = np.arange(8) * np.pi / 4
    centres = np.sqrt(8) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    offsets = points[:, None] - centres
    nearest = np.argmin(np.linalg.norm(offsets, axis=-1), axis=1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=8) / 40000, 1 / 8, atol=0.01)
    np.testing.assert_allclose(offsets[np.arange(40000), nearest].std(), np.sqrt(1 / 8), rtol=0.03)


def test_checkerboard_is_uniform_on_the_eight_dark_squares():
    points = sample_toy("checkerboard", 40000, np.random.default_rng(0))
    column, row = np.floor((points + 4) / 2).astype(int).T
    assert ((column - row) % 2 == 0).all()
    share = np.bincount(4 * column + row, minlength=16) / 40000
    np.testing.assert_allclose(share[share > 0], 1 / 8, atol=0.01)
    assert np.count_nonzero(share) == 8


@pytest.mark.parametrize("name, radii", [("rings", [0.75, 1.5, 2.25, 3.0]), ("circles", [1.5, 3.0])])
def test_circles_have_their_radii(name, radii):
    radius = np.linalg.norm(sample_toy(name, 40000, np.random.default_rng(0)), axis=1)
    nearest = np.argmin(np.abs(radius[:, None] - radii), axis=1)
    for n, expected in enumerate(radii):
        np.testing.assert_allclose(radius[nearest == n].mean(), expected, atol=0.04)
        np.testing.assert_allclose((nearest == n).mean(), 1 / len(radii), atol=0.02)


def test_pinwheel_repeats_after_a_fifth_of_a_turn():
    """Turned by 72 degrees it is the same density: the mean of exp(5 i angle) is far from 0, those before are 0."""
    points = sample_toy("pinwheel", 40000, np.random.default_rng(0))
    angle = np.arctan2(points[:, 1], points[:, 0])
    moments = [abs(np.exp(1j * k * angle).mean()) for k in range(1, 6)]
    assert max(moments[:4]) < 0.02
    assert moments[4] > 0.1


def test_two_spirals_mirror_each_other():
    """Angle and radius agree along an arm: r = angle / 3 modulo half a turn."""
    points = sample_toy("2spirals", 4000, np.random.default_rng(0)).astype(float)
    radius = np.linalg.norm(points, axis=1)
    away = radius > 1
    phase = np.arctan2(points[away, 1], points[away, 0]) - 3 * radius[away]
    assert np.cos(2 * phase).mean() > 0.7


def test_bad_arguments_of_the_sampler_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"name: expected one of 8gaussians.*; got 'spiral'"):
        sample_toy("spiral", 10, rng)
    with pytest.raises(ValueError, match="number: expected an integer of at least 1, got 0"):
        sample_toy("moons", 0, rng)


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
        evaluation=ToyEvaluationConfig(examples=500, samples=500, cells=60, every=20),
    )


@pytest.mark.parametrize("estimator", [rf.Exact(), rf.Roulette()])
def test_a_tiny_run_writes_everything_and_its_density_integrates_to_one(estimator, tiny, capsys):
    """Whatever the flow has learned, it is a density; and a few steps are better than none. Run again, it goes on."""
    result = run_config(replace(tiny, estimator=estimator))
    assert {path.name for path in tiny.workdir.iterdir()} == {
        *("config.json", "metrics.jsonl", "certificate.json", "checkpoints", "tensorboard", "training"),
        *("toy.png", "curves.png", "report.html"),
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
    run_config(replace(tiny, steps=1, evaluation=replace(tiny.evaluation, cells=1)))
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
    """Of another density or a file; elements that do not belong together keep their own distribution."""
    task = ToyTask(tiny)
    assert task.other("rings").shape == (500, 2)
    test = task.splits.test
    shuffled = task.permuted(test)
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(test, axis=0))
    assert (shuffled != test).mean() > 0.9
    np.save(tiny.workdir.parent / "wide.npy", np.zeros((30, 3)))
    with pytest.raises(ValueError, match="other: expected vectors of dimension 2, like those of 8gaussians; got 3 in"):
        task.other(str(tiny.workdir.parent / "wide.npy"))
    with pytest.raises(ValueError, match=r"model\.dim: expected 2, that of the vectors, got 3"):
        ToyTask(replace(tiny, model=rf.VectorFlowConfig(dim=3)))


def test_the_command_line_reaches_the_config(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(launch, "run_config", seen.append)
    toy.main(["--data", "moons", "--estimator", "roulette", "--model.blocks", "3", "--evaluation.cells", "10"])
    toy.main([])
    density.main(["rings", "--steps", "7"])
    assert (seen[0].data, seen[0].estimator) == ("moons", rf.Roulette())
    assert (seen[0].model.blocks, seen[0].evaluation.cells) == (3, 10)
    assert seen[1] == CONFIGS["8gaussians"]
    assert (seen[2].data, seen[2].steps, seen[2].workdir.name) == ("rings", 7, "rings")
    with pytest.raises(SystemExit):
        toy.main(["--data", "spiral"])
    assert "8gaussians" in capsys.readouterr().err
