"""Runs of `experiments.classify`, tiny: their files and promises, resuming, and the commands on finished runs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import evaluate, fid, sample
from experiments.configs.base import DataConfig, EvaluationConfig, OptimizerConfig
from experiments.configs.classes import CLASS_CONFIGS
from experiments.configs.classification import HybridConfig
from experiments.evaluate import EvaluateConfig
from experiments.fid import FidConfig
from experiments.runs import pictures, rehearsal
from experiments.runs.launch import run_config
from experiments.runs.sampling import base_latents
from experiments.runs.saved import saved_flow
from experiments.runs.tasks.classes import ClassTask
from experiments.runs.tasks.task import Drawing
from experiments.sample import SampleConfig
from resflow_jax import ClassifierConfig, Estimate, Exact, Truncated, certified_radius
from resflow_jax.io.config_json import as_json
from tests.experiments.outputs import read_metrics
from tests.experiments.tiny import run_and_cut

PLAIN = replace(
    CLASS_CONFIGS["digits"],
    model=ClassifierConfig((8, 8, 1), 10, blocks=(1,), hidden_channels=(4,), padding=0, head_channels=8),
    steps=2,
    batch_size=32,
    log_every=1,
    optimizer=OptimizerConfig(learning_rate=0.03, warmup=1),
    evaluation=EvaluationConfig(estimator=Truncated(2), draws=2, examples=20, every=2),
)
MIXTURE = replace(
    PLAIN,
    model=replace(PLAIN.model, head="mixture", head_channels=None),
    hybrid=HybridConfig("1/D"),
    labels=20,
    estimator=Truncated(2),
)
pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A classifier without a density, finished and then trained for more steps: its work directory and result.

    The first run compiles its programs before its first step.
    """
    workdir = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "number_of_cores", lambda: 2)
        run_config(replace(PLAIN, workdir=workdir, steps=2))
    return workdir, run_config(replace(PLAIN, workdir=workdir, steps=4))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A hybrid run with a component for each class and few labels, cut and resumed: its work directory and result."""
    config = replace(MIXTURE, workdir=tmp_path_factory.mktemp("mixture"), steps=4)
    run_and_cut(config, batches=3)
    return config.workdir, run_config(config)


def check_promises(workdir, result):
    """What every run writes, and what its metrics have."""
    names = ["reconstructions.png", "confusion.png", "curves.png"]
    names += ["samples.png"] if json.loads((workdir / "config.json").read_text())["hybrid"]["weight"] else []
    assert {path.name for path in workdir.glob("*.png")} == set(names)
    assert "cross-entropy" in (workdir / "report.html").read_text()
    check_metrics(workdir, result)


def check_metrics(workdir, result):
    """What metrics.jsonl and the page have of a run."""
    lines = read_metrics(workdir)
    train = [line for line in lines if line["split"] == "train"]
    assert all(np.isfinite(line["loss"]) for line in train)
    assert all(0 <= line["validation_error"] <= 100 for line in train if "validation_error" in line)
    assert "validation_error" in train[-1] and "error" not in train[-1]
    (test,) = [line for line in lines if line["split"] == "test"]
    assert (test["error"], test["error_stderr"], test["noise_stderr"]) == (result.mean, result.stderr, 0)
    page = (workdir / "report.html").read_text()
    assert f"test error in % {result.mean:.4f} +- {result.stderr:.4f}</h1>" in page


def test_a_classifier(plain, capsys):
    """It resumes where it was, and its last line is the test error; a third call only evaluates again."""
    workdir, result = plain
    check_promises(workdir, result)
    assert [line["step"] for line in read_metrics(workdir) if line["split"] == "train"] == [1, 2, 3, 4]
    assert {path.name for path in (workdir / "training").iterdir()} == {
        f"{step:07}_reconstructions.png" for step in (2, 4)
    }
    assert run_config(replace(PLAIN, workdir=workdir, steps=4)) == result
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == f"test error in % {result.mean:.4f} +- {result.stderr:.4f}"
    said = "".join(printed[:4]).replace("  ", " ")
    assert "reconstructions.png, confusion.png" in said and "samples" not in said
    assert any(line.startswith("gradient attack") and " 0 of 20 images" in line for line in printed)


def test_a_classifier_is_evaluated(plain, tmp_path, capsys):
    """Its error is that of the run; radius and calibration are those of the logits that are written."""
    workdir, estimate = plain
    result = evaluate.run(EvaluateConfig(workdir, other=("digits",), workdir=tmp_path))
    test = result["test"]
    assert (test["error"], test["stderr"], test["examples"]) == (estimate.mean, estimate.stderr, 20)
    assert "bits_per_dim" not in test and "estimator" not in result
    assert json.loads((tmp_path / "evaluation.json").read_text()) == as_json(result)
    assert as_json(result["certificate"]) == json.loads((workdir / "certificate.json").read_text())
    with np.load(tmp_path / "scores.npz") as scores:
        assert set(scores) == {"test_logits", "test_labels", "test_max_p", "digits_max_p"}
        logits, labels = scores["test_logits"], scores["test_labels"]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(scores["test_max_p"], p.max(axis=1))
    nats = Estimate.from_scores(-np.log(p[np.arange(20), labels])[None])
    np.testing.assert_allclose([test["cross_entropy"], test["cross_entropy_stderr"]], nats[:2])
    radii = certified_radius(saved_flow(workdir).flow, logits)
    is_right = logits.argmax(axis=1) == labels
    robustness = result["robustness"]
    np.testing.assert_allclose(robustness["median_radius"], np.median(radii[is_right]))
    assert (robustness["attacked"], robustness["broken"]) == (20, 0)
    assert result["other"]["digits"]["auroc_max_p"] == pytest.approx(0.5)
    printed = capsys.readouterr().out
    assert f"{estimate.mean:.4f} +- {estimate.stderr:.4f} (20 examples, weights of step" in printed
    assert "of digits, test split" in printed and "every block is invertible" in printed
    assert (tmp_path / "histograms.png").read_bytes().startswith(b"\x89PNG")


def test_what_needs_a_density(plain, tmp_path, monkeypatch):
    """It is refused with the reason, before anything is written."""
    out = tmp_path / "out"
    for settings, name in (({"typicality": True}, "typicality"), ({"draws": 3}, "draws")):
        with pytest.raises(ValueError, match=rf"{name}: expected none for a run without a density of x"):
            evaluate.run(EvaluateConfig(plain[0], workdir=out, **settings))
    with pytest.raises(ValueError, match="estimator: expected none for a run without a density"):
        evaluate.run(EvaluateConfig(plain[0], estimator=Exact(), examples=2, workdir=out))
    for settings in ({}, {"interpolate": (0, 1)}):
        with pytest.raises(ValueError, match=r"run_dir: expected a run with a density of x.*hybrid\.weight 0"):
            sample.run(SampleConfig(plain[0], workdir=out, **settings))
    monkeypatch.setattr(fid, "needed_package", lambda: None)
    with pytest.raises(ValueError, match=r"run_dir: expected a run with a density of x"):
        fid.run(FidConfig(plain[0], features="pixels", workdir=out))
    assert not out.exists()


def test_a_hybrid_run(mixture):
    """Half of each batch has no labels; samples are drawn in training and at the end."""
    workdir, result = mixture
    check_promises(workdir, result)
    assert {path.name for path in (workdir / "training").iterdir()} == {
        f"{step:07}_{kind}.png" for step in (2, 4) for kind in ("reconstructions", "samples")
    }
    assert "samples, and images of the training set" in (workdir / "report.html").read_text()


def test_a_hybrid_run_is_evaluated(mixture, tmp_path, capsys):
    """Bits/dim, the AUROC by the density, and typicality; other images need no labels."""
    noise = np.random.default_rng(0).integers(0, 17, (30, 8, 8, 1)).astype(np.uint8)
    drawn, save = [], pictures.save_histograms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save_histograms", lambda *args: drawn.append(args[1]) or save(*args))
        patch.setattr("experiments.runs.tasks.images.load", lambda config: Unlabelled(noise))
        settings = {"other": ("noise",), "typicality": True, "examples": 12, "draws": 1}
        result = evaluate.run(EvaluateConfig(mixture[0], workdir=tmp_path, **settings))
    found = result["other"]["noise"]
    assert found["examples"] == 12 and 2 < result["test"]["bits_per_dim"] < 10
    with np.load(tmp_path / "scores.npz") as scores:
        pairs = scores["noise_bits_per_dim"][:, None] > scores["test_bits_per_dim"][None]
        np.testing.assert_allclose(pairs.mean(), found["auroc_log_prob"])
        np.testing.assert_allclose(scores["test_bits_per_dim"].mean(), result["test"]["bits_per_dim"])
        pairs = scores["noise_max_p"][:, None] < scores["test_max_p"][None]
        np.testing.assert_allclose(pairs.mean(), found["auroc_max_p"])
    assert list(drawn[0]) == ["max p(y | x) of an image", "bits/dim of an image"]
    assert result["robustness"] is None, "logits by Bayes' rule are not Lipschitz"
    assert result["draws"] == 1 and set(result["typicality"]) == {"test", "noise"}
    lines = (tmp_path / "typicality.csv").read_text().splitlines()
    assert len(lines) == 25 and lines[1].startswith("test,0,")
    printed = capsys.readouterr().out
    assert "AUROC, log p(x)" in printed and "typicality, noise" in printed


class Unlabelled:
    """Images like those of `load`."""

    def __init__(self, test):
        self.test, self.shape, self.levels = test, test.shape[1:], 17


def test_samples_of_a_hybrid_run(mixture, tmp_path, monkeypatch):
    """They are f^-1 of latents of all classes or of one, whose mean and deviations are those of its component."""
    options = {"number": 3, "batch_size": 3, "format": ("npz",)}
    drawn = sample.run(SampleConfig(mixture[0], workdir=tmp_path, **options))
    assert drawn.shape == (3, 8, 8, 1) and drawn.dtype == np.uint8
    compared = []
    monkeypatch.setattr(fid, "needed_package", lambda: SimpleNamespace(__version__="0"))
    monkeypatch.setattr(fid, "frechet_distance", lambda *sets: compared.append(sets[:2]) or 1.0)
    assert fid.run(FidConfig(mixture[0], number=3, batch_size=3, features="pixels", workdir=tmp_path))["distance"] == 1
    np.testing.assert_array_equal(compared[-1][0], drawn)
    assert [images.shape for images in compared[0]] == [(3, 8, 8, 1)] * 2
    of_class = sample.run(SampleConfig(mixture[0], workdir=tmp_path, label=4, interpolate=(0, 1), **options))
    assert (of_class != drawn).any() and (tmp_path / "interpolation.png").exists()
    flow = saved_flow(mixture[0]).flow
    z = np.asarray(base_latents(flow, 0, 0.5, label=4)(np.arange(2000)))
    np.testing.assert_allclose(z.mean(axis=0), flow.base.means[...][4].reshape(-1), atol=0.1)
    deviations = 0.5 * np.exp(flow.base.log_stds[...][4]).reshape(-1)
    np.testing.assert_allclose(z.std(axis=0), deviations, rtol=0.1)
    means = base_latents(flow, 0, 0.0)(np.arange(200))
    distances = np.abs(np.asarray(means)[:, None] - np.asarray(flow.base.means[...]).reshape(1, 10, -1)).max(axis=2)
    assert distances.min(axis=1).max() < 1e-9 and len(set(distances.argmin(axis=1))) == 10
    with pytest.raises(ValueError, match=r"label: expected a class in 0\.\.9, got 10"):
        sample.run(SampleConfig(mixture[0], workdir=tmp_path, label=10))


@pytest.mark.parametrize(
    "change",
    [
        {"model": replace(PLAIN.model, coefficient=None), "labels": 20, "dropout": 0.1},
        {"model": replace(PLAIN.model, coefficient=None, architecture="standard", blocks=(2,))},
    ],
    ids=["vanilla, few labels, dropout", "standard"],
)
def test_networks_without_a_bound(change, tmp_path, capsys):
    """They are trained alike; their reconstructions may fail, and nothing is certified."""
    result = run_config(replace(PLAIN, workdir=tmp_path, **change))
    check_promises(tmp_path, result)
    printed = capsys.readouterr().out
    assert "certified radius        none: the network has no bound" in printed and "nothing: " in printed
    assert printed.splitlines()[-1] == f"test error in % {result.mean:.4f} +- {result.stderr:.4f}"


def without_pictures(monkeypatch):
    """Omits what other tests check."""
    monkeypatch.setattr(ClassTask, "sketch", lambda *_: {})
    monkeypatch.setattr(ClassTask, "draw", lambda *_: Drawing({}, {}))


def test_a_density_beside_a_pooled_head(tmp_path, monkeypatch):
    """With the weight 1 the loss of an image is many nats; that of classes alone is about two."""
    without_pictures(monkeypatch)
    config = replace(PLAIN, workdir=tmp_path, hybrid=HybridConfig(1.0), estimator=Truncated(2))
    check_metrics(tmp_path, run_config(config))
    first = read_metrics(tmp_path)[0]
    assert abs(first["loss"]) > 10 and np.isfinite(first["diagnostics"]["mean"]).all()


def test_updates_of_two_batches(tmp_path, monkeypatch):
    """Images and labels of the batches of an update come together."""
    without_pictures(monkeypatch)
    config = replace(PLAIN, workdir=tmp_path, steps=4, optimizer=replace(PLAIN.optimizer, accumulate=2))
    check_metrics(tmp_path, run_config(config))
    assert [line["step"] for line in read_metrics(tmp_path) if line["split"] == "train"] == [2, 4]


def test_images_of_32_pixels(tmp_path, monkeypatch):
    """Colour, two stages, appended zeros, mirrored and shifted images, SGD with a step schedule, as for CIFAR-10."""
    cifar = CLASS_CONFIGS["cifar10_vanilla"]  # certificates of such sizes take their time
    config = replace(
        cifar,
        workdir=tmp_path,
        data=DataConfig("photographs", size=32, channels=3, flip=True, crop=4),
        model=replace(cifar.model, classes=2, blocks=(1, 1), hidden_channels=(2, 2), padding=1),
        steps=2,
        batch_size=8,
        optimizer=replace(cifar.optimizer, milestones=(1,)),
        evaluation=replace(PLAIN.evaluation, examples=4),
    )
    without_pictures(monkeypatch)
    check_metrics(tmp_path, run_config(config))
