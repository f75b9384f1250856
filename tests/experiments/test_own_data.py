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
from experiments.runs.tasks.images import load
from experiments.sample import SampleConfig
from resflow_jax import (
    Exact,
    Norms,
    VectorFlowConfig,
)
from tests.experiments.outputs import read_metrics
from tests.experiments.tiny import TINY


def test_own_images(tmp_path):
    """A folder of image files, cut to five bits, mirrored and shifted: trained, evaluated, drawn, evaluated again."""
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
    assert run_config(config) == result


def test_own_vectors(tmp_path):
    """A table with a header: trained with learned norms and a rising weight of the log-det, evaluated again, drawn."""
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
    samples = sample.run(SampleConfig(config.workdir, number=5, batch_size=4))
    assert samples.shape == (5, 3) and np.isfinite(samples).all()
    with np.load(config.workdir / "sampling" / "samples.npz") as file:
        np.testing.assert_array_equal(file["vectors"], samples)
    with pytest.raises(ValueError, match="interpolate: expected a run on images, got one on vectors"):
        sample.run(SampleConfig(config.workdir, interpolate=(0, 1)))
