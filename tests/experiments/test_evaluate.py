"""The evaluation of a saved run, tiny: its figures are those of the run, its detection has known answers."""

import json
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate
from experiments.configs import CONFIGS
from experiments.evaluate import EvaluateConfig
from experiments.runs import devices
from experiments.runs.devices import data_mesh
from experiments.runs.launch import run_config
from experiments.runs.saved import saved_config, saved_flow
from experiments.runs.tasks import images
from experiments.runs.tasks.subset import subset
from experiments.studies import ablation
from experiments.studies.ablation import AblationConfig
from resflow_jax import Anderson, Exact, ResidualFlow, Roulette, evaluate_bits_per_dim
from resflow_jax.data.images import ImageSplits, to_unit_interval
from resflow_jax.io.config_json import as_json
from resflow_jax.training.evaluation import image_bits_per_dim
from tests.experiments import tiny
from tests.training.test_evaluation import KnownDensity

pytestmark = pytest.mark.usefixtures("shared_steps")
CONFIG = replace(tiny.DIGITS, evaluation=replace(tiny.DIGITS.evaluation, draws=2))
KEY = jax.random.key(CONFIG.seed + 2)
SHARED = {"levels": 17, "mesh": data_mesh(jax.device_count())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of two steps and its test bits/dim; it is loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "saved_flow", lru_cache(saved_flow))
        workdir = tmp_path_factory.mktemp("run")
        yield workdir, run_config(replace(CONFIG, workdir=workdir))


@pytest.fixture(scope="module")
def saved(finished):
    return evaluate.saved_flow(finished[0], "best")


def test_figures_are_those_of_the_run(finished, capsys):
    """Bits/dim and errors to the last bit, certificate, reconstructions; what is written is what is returned."""
    workdir, estimate = finished
    result = evaluate.run(EvaluateConfig(workdir))
    test = result["test"]
    assert (test["bits_per_dim"], test["stderr"], test["data_stderr"], test["noise_stderr"]) == estimate
    assert (test["examples"], result["draws"], result["step"], result["weights"]) == (20, 2, 2, "best")
    assert result["reconstruction"]["examples"] == 20 and result["reconstruction"]["unconverged"] == 0
    assert 0 <= result["reconstruction"]["error"] < 1e-9
    assert as_json(result["certificate"]) == json.loads((workdir / "certificate.json").read_text())
    out = workdir / "evaluation"
    assert json.loads((out / "evaluation.json").read_text()) == as_json(result)
    assert (out / "histograms.png").read_bytes().startswith(b"\x89PNG")
    with np.load(out / "scores.npz") as scores:
        assert set(scores) == {"test", "permuted"}
        np.testing.assert_allclose(scores["test"].mean(), estimate.mean, rtol=1e-12)
        pairs = scores["permuted"][:, None] > scores["test"][None]
        np.testing.assert_allclose(pairs.mean(), result["other"]["permuted"]["auroc"], rtol=1e-12)
    printed = capsys.readouterr().out
    assert f"{estimate.mean:.4f} +- {estimate.stderr:.4f}" in printed and "every block is invertible" in printed
    assert "of the test split in disorder" in printed


def test_figures_of_a_run_with_exact_log_dets(saved, tmp_path, monkeypatch):
    """They have the noise of the run too, whose batches are larger than those of `--estimator exact`."""
    evaluation = replace(CONFIG.evaluation, estimator=Exact(), examples=12)
    config = replace(saved.config, evaluation=evaluation)
    monkeypatch.setattr(saved.task, "config", config)
    monkeypatch.setattr(evaluate, "saved_flow", lambda *_: saved._replace(config=config))
    test = evaluate.run(EvaluateConfig(tmp_path / "run", workdir=tmp_path))["test"]
    expected = saved.task.estimate(saved.flow, "test")
    assert (test["bits_per_dim"], test["stderr"], test["data_stderr"], test["noise_stderr"]) == expected


def test_typicality_by_example(finished, tmp_path, capsys):
    """Each example has a line with the likelihood of scores.npz and a p-value that counts validation images."""
    config = EvaluateConfig(finished[0], typicality=True, workdir=tmp_path)
    result = evaluate.run(config)
    assert {path.name for path in tmp_path.iterdir()} == {*evaluate.COMMAND.output(config).names}
    assert "typicality.csv" not in evaluate.COMMAND.output(replace(config, typicality=False)).names
    header, *lines = (tmp_path / "typicality.csv").read_text().splitlines()
    assert header == "set,example,likelihood,score,p_value,quantile" and len(lines) == 40
    rows = {
        name: np.array([row[1:] for row in map(lambda line: line.split(","), lines) if row[0] == name], float)
        for name in ("test", "permuted")
    }
    with np.load(tmp_path / "scores.npz") as scores:
        for name, found in rows.items():
            np.testing.assert_array_equal(found[:, 0], np.arange(20))
            np.testing.assert_allclose(found[:, 1], scores[name], rtol=1e-8)
            p = found[:, 3]
            assert (p[:, None] > 0).all() and len(set(p * 21)) > 1
            np.testing.assert_allclose(p * 21, np.round(p * 21), atol=1e-6)
            order = np.argsort(found[:, 2])  # larger scores, smaller p-values
            assert (np.diff(p[order]) <= 0).all()
            share = result["typicality"][name]["rejected_at_0.05"]
            assert share == (p <= 0.05).mean()
    assert result["typicality"]["test"]["auroc"] == pytest.approx(0.5)
    printed = capsys.readouterr().out
    assert "typicality, test" in printed and "typicality, permuted" in printed


def test_exact_log_dets_of_few_images(finished, saved, tmp_path):
    """The mean is that of `Exact()` with the same noise; the unknown error of a single draw is written as a string."""
    out = tmp_path / "a" / "b"
    result = evaluate.run(EvaluateConfig(finished[0], "latest", examples=3, draws=1, estimator=Exact(), workdir=out))
    assert (result["test"]["examples"], result["draws"], result["weights"]) == (3, 1, "latest")
    expected = evaluate_bits_per_dim(
        saved.flow, subset(saved.task.splits.test, 3), KEY, estimator=Exact(), draws=1, levels=17
    )
    np.testing.assert_allclose(result["test"]["bits_per_dim"], expected.mean, rtol=1e-10)
    written = json.loads((out / "evaluation.json").read_text())
    assert written["test"]["noise_stderr"] == "nan" and written["estimator"]["type"] == "Exact"


def test_other_data_sets(finished, saved, tmp_path, monkeypatch):
    """Their images are scored like the run's own; a set of another shape or other levels is refused at once."""
    load = images.load
    noise = np.random.default_rng(1).integers(0, 17, (30, 8, 8, 1)).astype(np.uint8)
    sets = {
        "noise": ImageSplits(noise, noise, noise, 17),
        "wide": ImageSplits(*[np.zeros((3, 8, 9, 1), np.uint8)] * 3, 17),
        "fine": ImageSplits(*[np.zeros((3, 8, 8, 1), np.uint8)] * 3, 256),
    }
    monkeypatch.setattr(images, "load", lambda config: sets.get(config.name) or load(config))
    result = evaluate.run(EvaluateConfig(finished[0], other=("noise", "digits"), workdir=tmp_path))
    found = result["other"]["noise"]
    assert found["examples"] == 20 and list(result["other"]) == ["noise", "digits"]
    estimator = CONFIG.evaluation.estimator
    expected = evaluate_bits_per_dim(saved.flow, subset(noise, 20), KEY, estimator=estimator, draws=2, **SHARED)
    np.testing.assert_allclose(found["bits_per_dim"], expected.mean, rtol=1e-10)
    assert result["other"]["digits"]["auroc"] == pytest.approx(0.5, abs=1e-12)  # the same images with the same noise
    for name, got in (("wide", r"\(8, 9, 1\) with 17"), ("fine", r"\(8, 8, 1\) with 256")):
        message = (
            rf"other: expected images of shape \(8, 8, 1\) with 17 levels.*digits; got shape {got} levels in {name}"
        )
        with pytest.raises(ValueError, match=message):
            evaluate.run(EvaluateConfig(finished[0], other=(name,), workdir=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_where_other_data_are_looked_for(saved, tmp_path, monkeypatch):
    """Other data are found by name in the run's data directory, or by path; embedded data have the run's shape."""
    asked = []
    config = replace(saved.config, data=replace(saved.config.data, path="images", dir="there"))
    monkeypatch.setattr(saved.task, "config", config)
    monkeypatch.setattr(images, "load", lambda data: asked.append(data) or saved.task.splits)
    np.testing.assert_array_equal(saved.task.other("photographs"), saved.task.splits.test)
    saved.task.other(str(tmp_path))
    by_name, by_path = asked
    assert (by_name.name, by_name.path, by_name.dir, by_name.size, by_name.channels) == (
        *("photographs", None, "there"),
        *(8, 1),
    )
    assert by_path.path == tmp_path


@pytest.mark.parametrize(
    ("test", "other", "expected"),
    [
        ([1.0, 2.0], [3.0, 4.0, 5.0], 1.0),
        ([3.0, 4.0], [1.0, 2.0], 0.0),
        ([2.0, 2.0], [2.0, 2.0, 2.0], 0.5),
        ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], 7 / 9),  # 3 + 2.5 + 1.5 of 9 pairs
        ([0.0, 1.0], [np.inf, 0.5], 3 / 4),
    ],
)
def test_auroc_of_known_scores(test, other, expected):
    """More bits/dim mean another set; ties count half."""
    assert evaluate.auroc(np.array(test), np.array(other)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("test", "other"), [([], [1.0]), ([1.0], []), ([1.0, np.nan], [2.0])])
def test_auroc_that_is_not_known(test, other):
    """The AUROC is NaN without examples, and if a loss is NaN."""
    assert np.isnan(evaluate.auroc(np.array(test), np.array(other)))


def test_permuted_images(saved):
    """All images and calls have the same permutation, which is not the identity; a pixel keeps its channels."""
    numbers = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    shown = np.stack([numbers, numbers + 100], axis=-1)[..., None, :].reshape(2, 4, 3, 2)
    shuffled = saved.task.permuted(shown)
    np.testing.assert_array_equal(shuffled[..., 1] - shuffled[..., 0], 100)
    np.testing.assert_array_equal(shuffled[1], shuffled[0] + 12)
    np.testing.assert_array_equal(np.sort(shuffled[0], axis=None), np.sort(shown[0], axis=None))
    assert (shuffled != shown).any()
    np.testing.assert_array_equal(shuffled, saved.task.permuted(shown))


def test_unconverged_reconstructions_are_counted(saved, monkeypatch):
    """After one evaluation of g no solve has converged, the error is large, and the table reports it."""
    examples = to_unit_interval(saved.task.splits.test[:6], 17)
    inverse = ResidualFlow.inverse
    short = Anderson(max_iterations=1)
    monkeypatch.setattr(ResidualFlow, "inverse", lambda flow, z, **kwargs: inverse(flow, z, solver=short, **kwargs))
    error, unconverged = evaluate.reconstruction(saved.flow, examples)
    found, _ = inverse(saved.flow, saved.flow(examples), solver=short, return_status=True)
    expected = jnp.abs(examples - found).max()
    assert unconverged == 6 and error == pytest.approx(float(expected), rel=1e-6) and error > 1e-6
    reconstruction = {"examples": 6, "error": error, "unconverged": unconverged}
    test = {"examples": 6, "bits_per_dim": 1.0, "stderr": 0.0, "data_stderr": 0.0, "noise_stderr": 0.0}
    result = {"test": test, "reconstruction": reconstruction, "step": 2, "draws": 1, "estimator": {"type": "Exact"}}
    assert "6 DID NOT CONVERGE" in evaluate.rows(saved.task, result | {"other": {}})["reconstruction error"]


def test_scores_of_single_images():
    """Each image has its own score in each draw, also in a ragged last batch; their mean is the evaluation."""
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    arguments = {"levels": 16, "estimator": Roulette(), "batch_size": 4, "draws": 3}
    scores = image_bits_per_dim(KnownDensity(), images, jax.random.key(0), **arguments)
    assert scores.shape == (3, 10)
    expected = 4 - np.arange(10) / (4 * np.log(2))
    np.testing.assert_allclose(scores, np.tile(expected, (3, 1)), atol=5 * 0.1 / (4 * np.log(2)))
    assert (scores.std(axis=0) > 0).all()
    assert evaluate_bits_per_dim(KnownDensity(), images, jax.random.key(0), **arguments).mean == scores.mean()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"examples": 1}, "examples: expected an integer of at least 2, got 1"),
        ({"draws": 0}, "draws: expected an integer of at least 1, got 0"),
        ({"estimator": Exact()}, "examples: expected a number with the exact estimator"),
    ],
)
def test_bad_settings_are_named(setting, message, tmp_path):
    """Each wrong setting is refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(tmp_path, **setting)


def test_command_line(monkeypatch, tmp_path):
    """The run's directory stands by itself; several other data sets may be named."""
    configs = []
    monkeypatch.setattr(evaluate, "run", configs.append)
    for name in ("use_xla_flags", "use_all_cores"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)
    evaluate.main([str(tmp_path), "--other", "mnist", "svhn", "--examples", "5", "--estimator", "exact"])
    evaluate.main([str(tmp_path), "--draws", "3", "--workdir", "out"])
    assert configs[0] == EvaluateConfig(tmp_path, other=("mnist", "svhn"), examples=5, estimator=Exact())
    assert (configs[1].draws, str(configs[1].workdir)) == (3, "out")


def test_as_many_devices_as_the_run_had(monkeypatch, finished):
    """On six cores a run with batches of eight has four devices; with six the noise would be another."""
    numbers = []
    monkeypatch.setattr(evaluate, "run", lambda config: None)
    monkeypatch.setattr(evaluate, "use_xla_flags", lambda: None)
    monkeypatch.setattr(evaluate, "use_all_cores", numbers.append)
    monkeypatch.setattr(devices, "number_of_cores", lambda: 6)
    evaluate.main([str(finished[0])])
    batch_size = saved_config(finished[0]).batch_size
    assert numbers == [max(n for n in range(1, 7) if batch_size % n == 0)] and numbers != [6]


def test_an_ablation_of_two_steps_and_two_seeds(tmp_path, monkeypatch, capsys):
    """One variant is trained; a second call only evaluates it again, with the same table.

    The test is in this file since it shares compiled programs with `finished`.
    """
    monkeypatch.setattr(ablation, "VARIANTS", {"Residual flow, LipSwish": ""})
    monkeypatch.setitem(CONFIGS, "digits_uniform", CONFIG)
    config = AblationConfig(seeds=(0, 1), workdir=tmp_path)
    table = ablation.run(config)
    (row,) = table.values()
    assert np.isfinite(row["mean"]) and row["deviation"] > 0
    assert (tmp_path / "digits_uniform" / "1" / "report.html").exists()
    capsys.readouterr()
    assert ablation.run(config) == table
    assert capsys.readouterr().out.count("no step taken") == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_typicality_in_any_metric(sign):
    """Quantiles are those of the density, whether a lower metric is better, as with bits/dim, or a higher one."""
    losses = np.linspace(1.0, 3.0, 101)
    means = {"test": sign * np.array([2.0, 0.5, 3.5])}
    found = evaluate.typicality_of(sign, 2, [sign * losses, sign * losses], means)["test"]
    np.testing.assert_allclose(found["score"], [0, 1.5, 1.5], atol=1e-12)
    np.testing.assert_allclose(found["p_value"], [1, 1 / 102, 1 / 102])
    np.testing.assert_allclose(found["quantile"], [0.5, 1, 0], atol=1e-12)
