"""Runs of `experiments.density` on files of your own: images and vectors."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from experiments import evaluate, sample
from experiments.configs import CONFIGS
from experiments.configs.base import DataConfig, EvaluationConfig, OptimizerConfig, VectorDataConfig
from experiments.evaluate import EvaluateConfig
from experiments.runs.launch import run_config
from experiments.runs.own_data import fitted_to_data
from experiments.runs.saved import MovedData, saved_config, saved_flow
from experiments.runs.tasks.images import load
from experiments.runs.tasks.vectors import load as load_vectors_of
from experiments.sample import SampleConfig
from resflow_jax import (
    Exact,
    Norms,
    VectorFlowConfig,
)
from tests.experiments.outputs import read_metrics
from tests.experiments.tiny import TINY


def test_own_images(tmp_path):
    """A folder of image files, cut to five bits, mirrored and shifted: trained, moved, evaluated again, added to."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for n in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "images" / f"{n}.png")
    data = DataConfig("own", path=tmp_path / "images", bits=5, flip=True, crop=1)
    model = dataclasses.replace(TINY.model, shape=(8, 8, 3))
    optimizer = OptimizerConfig("adamax", warmup=1, accumulate=2)
    config = dataclasses.replace(
        TINY, data=data, model=model, optimizer=optimizer, batch_size=8, workdir=tmp_path / "run"
    )
    result = run_config(config)
    assert 4 < result.mean < 7  # of random pixels of 32 levels, five bits at best
    assert load(config.data).levels == 32
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    assert run_config(saved_config(config.workdir, MovedData(path=moved))) == result
    config = saved_config(config.workdir)
    assert config.data.path == moved
    (moved / "60.png").write_bytes((moved / "0.png").read_bytes())
    for call in (lambda: run_config(config), lambda: saved_flow(config.workdir)):
        message = (
            rf"data: expected those that the run in .* got others in {moved}; .*\n  train.number: 52 there, 53 now"
        )
        with pytest.raises(ValueError, match=message):
            call()


def test_own_vectors(tmp_path):
    """A table with a header: trained with learned norms and a rising weight of the log-det, evaluated again."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, 3)) * [1.0, 5.0, 0.1] + [0, 20, 3]
    table = "\n".join(["a,b,c", *(",".join(map(str, row)) for row in rows)])
    (tmp_path / "rows.csv").write_text(table)
    config = dataclasses.replace(
        CONFIGS["vectors"],
        data=VectorDataConfig(tmp_path / "rows.csv"),
        model=VectorFlowConfig(3, blocks=2, hidden=(4,), norms=Norms(learned=True)),
        workdir=tmp_path / "run",
        steps=4,
        annealing=2,
        batch_size=8,
        evaluation=EvaluationConfig(estimator=Exact(), draws=1, every=2),
    )
    result = run_config(config)
    assert -20 < result.mean < 0 and result.noise_stderr == 0
    lines = read_metrics(config.workdir)
    orders = [line["orders"] for line in lines if "orders" in line]
    assert np.shape(orders) == (2, 4, 2) and orders[0] != orders[1]
    assert [len(line["lipschitz"]) for line in lines if "lipschitz" in line] == [2, 2]
    assert run_config(config) == result
    with pytest.raises(ValueError, match=r"model\.dim: expected 3, the dimension of the vectors, got 30"):
        run_config(dataclasses.replace(CONFIGS["vectors"], data=config.data, workdir=tmp_path / "other"))
    again = evaluate.run(EvaluateConfig(config.workdir, other=(str(tmp_path / "rows.csv"),)))
    assert again["test"]["log_prob"] == pytest.approx(result.mean, rel=1e-6)
    assert again["other"][str(tmp_path / "rows.csv")]["auroc"] == pytest.approx(0.5, abs=1e-9)
    with pytest.raises(ValueError, match="interpolate: expected a run on images, got one on vectors"):
        sample.run(SampleConfig(config.workdir, interpolate=(0, 1)))


def test_training_does_not_depend_on_the_unit(tmp_path):
    """Numbers times 1e6 plus 1e9, as a .csv file: the same curve but for the log-det of the unit, samples in the unit.

    All commands that read the run give likelihoods and samples in the unit of the file.
    """
    rows = np.random.default_rng(0).normal(size=(120, 2)) @ np.asarray([[1.0, 0.5], [0.0, 0.7]])
    files = {"one": rows, "other": rows * 1e6 + 1e9}
    results, curves, samples = {}, {}, {}
    for name, numbers in files.items():
        np.savetxt(tmp_path / f"{name}.csv", numbers, "%.17g", ",", header="a,b", comments="")
        config = dataclasses.replace(
            CONFIGS["vectors"],
            model=VectorFlowConfig(2, blocks=1, hidden=(4,)),
            data=VectorDataConfig(tmp_path / f"{name}.csv"),
            workdir=tmp_path / name,
            steps=6,
            batch_size=16,
            log_every=1,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0),
            evaluation=EvaluationConfig(estimator=Exact(), draws=1, every=3),
        )
        config = fitted_to_data(config, ["--data.path", str(tmp_path / f"{name}.csv")])
        assert (config.data.shift is None) == (name == "one")
        results[name] = run_config(config)
        curves[name] = [line["log_prob"] for line in read_metrics(config.workdir) if line["split"] == "train"]
        samples[name] = sample.run(SampleConfig(config.workdir, number=8, batch_size=6))
        assert samples[name].shape == (8, 2) and np.isfinite(samples[name]).all()
        with np.load(config.workdir / "sampling" / "samples.npz") as file:
            np.testing.assert_array_equal(file["vectors"], samples[name])
        assert "likelihoods and samples" in (config.workdir / "report.html").read_text()
    again = evaluate.run(EvaluateConfig(tmp_path / "other", other=(str(tmp_path / "other.csv"),)))
    assert again["test"]["log_prob"] == pytest.approx(results["other"].mean, rel=1e-6)
    assert again["other"][str(tmp_path / "other.csv")]["auroc"] == pytest.approx(0.5, abs=1e-9)
    log_det = 2 * np.log(1e6)
    assert len(curves["one"]) == 6 and curves["one"][-1] != curves["one"][0]
    np.testing.assert_allclose(np.asarray(curves["other"]) + log_det, curves["one"], atol=1e-4)
    assert results["other"].mean + log_det == pytest.approx(results["one"].mean, abs=1e-4)
    assert samples["other"].dtype == np.float64
    np.testing.assert_allclose((samples["other"] - 1e9) / 1e6, samples["one"], atol=1e-4)


def test_vectors_that_float32_rounds(tmp_path):
    """Without the command, which would set a shift, a warning names the column."""
    rows = np.random.default_rng(0).normal(size=(60, 2)) + np.asarray([0.0, 1e6])
    np.save(tmp_path / "rows.npy", rows)
    with pytest.warns(UserWarning, match=r"data\.shift: expected a number near the mean of column 2 of .*rows\.npy"):
        splits = load_vectors_of(VectorDataConfig(tmp_path / "rows.npy"))
    assert splits.train.dtype == np.float32
    near = load_vectors_of(VectorDataConfig(tmp_path / "rows.npy", shift=(0.0, 1e6)))
    np.testing.assert_array_equal(near.train[:, 0], splits.train[:, 0])
    assert np.ptp(near.train[:, 1]) < 10


def test_a_constant_column_is_refused(tmp_path):
    """The error names the file and the column, before anything is written."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(60, 2)) * np.asarray([1, 0]) + 7)
    with pytest.raises(
        ValueError, match=r"columns that vary, got 7\.0 in every training row of column 2 of .*rows\.npy"
    ):
        fitted_to_data(CONFIGS["vectors"], ["--data.path", str(tmp_path / "rows.npy")])


def test_units_are_those_of_the_training_split(tmp_path):
    """Other splits do not change them."""
    train = np.random.default_rng(0).normal(size=(50, 2)) + np.asarray([0.0, 1e7])
    np.savez(tmp_path / "rows.npz", train=train, validation=train + 9, test=7 * train)
    config = fitted_to_data(CONFIGS["vectors"], ["--data.path", str(tmp_path / "rows.npz")])
    shift = np.asarray(config.data.shift)
    np.testing.assert_allclose(config.model.data.mean + shift, train.mean(axis=0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(config.model.data.std, train.std(axis=0), rtol=1e-5)
    assert config.model.dim == 2 and shift[0] == 0
    splits = load_vectors_of(dataclasses.replace(config.data, path=tmp_path / "rows.npz"))
    np.testing.assert_allclose(splits.validation.astype(float) + shift, train + 9, rtol=0, atol=1e-5)
