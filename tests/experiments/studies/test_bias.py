"""The comparison of biased and unbiased training, tiny: its files, its promises, and bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.configs.base import OptimizerConfig
from experiments.runs.setup import set_up
from experiments.runs.tasks.images import ImageTask, load
from experiments.runs.workdir import claim_workdir
from experiments.studies import bias
from experiments.studies.bias import BiasConfig
from resflow_jax import Exact, ImageFlowConfig, Truncated, certify
from tests.experiments.outputs import read_metrics
from tests.experiments.tiny import DIGITS

TINY = BiasConfig(
    model=DIGITS.model,
    steps=5,
    batch_size=16,
    truncated=Truncated(terms=1),
    optimizer=OptimizerConfig(warmup=2),
    every=3,
    draws=2,
    images=20,
    log_every=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs of five steps, where the same command was cut before: their config and outcomes."""
    config = dataclasses.replace(TINY, workdir=tmp_path_factory.mktemp("run"))
    claim_workdir(config.workdir, config)
    (config.workdir / "metrics.jsonl").write_text('{"run": "truncated", "step": 1, "split": "train"}\n')
    return config, bias.run(config)


@pytest.fixture(scope="module")
def data():
    return load(bias.digits_uniform.CONFIG.data)


def test_files_and_metrics(finished):
    """All promised files exist; either run has a line a pause and one a measurement, with the promised fields."""
    config, outcomes = finished
    assert {path.name for path in config.workdir.iterdir()} == {".lock", "bias.png", "config.json", "metrics.jsonl"}
    assert (config.workdir / "bias.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((config.workdir / "config.json").read_text())["truncated"]["terms"] == 1
    lines = read_metrics(config.workdir)
    assert [line["run"] for line in lines] == sorted((line["run"] for line in lines), reverse=True)
    for name, outcome in outcomes.items():
        train, test = ([x for x in lines if (x["run"], x["split"]) == (name, s)] for s in ("train", "test"))
        assert [line["step"] for line in train] == [2, 3, 4, 5]
        assert all(np.isfinite((line["bits_per_dim"], line["gradient_norm"])).all() for line in train)
        assert [line["step"] for line in test] == [3, 5]
        fields = ("bits_per_dim", "bits_per_dim_stderr", "gap", "gap_stderr")
        assert tuple(test[-1][field] for field in fields) == tuple(outcome.test)
        assert outcome.test.stderr > 0 and outcome.test.gap_stderr > 0
        assert outcome.estimate == pytest.approx((train[2]["bits_per_dim"] + train[3]["bits_per_dim"]) / 2)


def test_the_closing_table(finished, tmp_path, capsys):
    """Training estimate, exact value and gap of either run, side by side."""
    config, outcomes = finished
    bias.report(dataclasses.replace(config, workdir=tmp_path), outcomes, read_metrics(config.workdir), 0.0)
    printed = " ".join(capsys.readouterr().out.split())
    truncated, roulette = outcomes.values()
    assert f"training estimate {truncated.estimate:.4f} {roulette.estimate:.4f}" in printed
    assert f"estimate - exact {truncated.test.gap:+.4f} +- {truncated.test.gap_stderr:.4f} " in printed
    assert f"{roulette.test.gap:+.4f} +- {roulette.test.gap_stderr:.4f} time per step" in printed
    assert f"exact test value {truncated.test.exact:.4f} +- {truncated.test.stderr:.4f}" in printed


def test_runs_start_alike(data):
    """Parameters before the first step do not depend on the estimator."""
    first, second = (set_up(ImageTask(TINY.training(estimator)))[1] for estimator in (TINY.truncated, TINY.roulette))
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gap_is_that_of_the_estimator(data):
    """None for the exact log-det, none for a long series; for its first term that of tr J, from large Jacobians."""
    config = dataclasses.replace(TINY, draws=8)
    trainer, state = set_up(ImageTask(config.training(Exact())))
    grown = jax.tree.map(lambda p: 3 * jnp.abs(p), state.params)  # positive kernels: J is close to a blur
    flow = trainer.current_flow(state._replace(params=grown))
    assert certify(flow).norms.max() == pytest.approx(config.model.coefficient, rel=1e-3)  # of the new weights
    key = jax.random.key(0)
    exact = bias.measure(config, flow, data, key, Exact())
    assert (exact.gap, exact.gap_stderr) == (0, 0)
    one, many = (bias.measure(config, flow, data, key, Truncated(n, probes=8)) for n in (1, 60))
    assert one[:2] == many[:2] == exact[:2]
    assert abs(many.gap) < 5 * many.gap_stderr
    # log(1 + l) < l: the series of one term claims too large a density, too few bits.
    assert one.gap < -5 * one.gap_stderr


def test_measuring_leaves_the_state_alone(data):
    """The measured flow has its own norms."""
    trainer, state = set_up(ImageTask(TINY.training(TINY.roulette)))
    before = jax.device_get(jax.tree.leaves(state.non_params))
    flow = trainer.current_flow(state)
    assert isinstance(flow, nnx.Module)
    for a, b in zip(before, jax.tree.leaves(state.non_params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_command_line_overrides(monkeypatch):
    """Flags reach the nested fields, and the two runs have what they set in common."""
    configs = []
    monkeypatch.setattr(bias, "run", configs.append)
    bias.main(["--steps", "7", "--workdir", "there", "--truncated.terms", "3", "--model.coefficient", "0.9"])
    (config,) = configs
    assert (config.steps, str(config.workdir), config.truncated.terms) == (7, "there", 3)
    first, second = config.training(config.truncated), config.training(config.roulette)
    assert first == dataclasses.replace(second, estimator=Truncated(terms=3))
    assert first.model.coefficient == 0.9


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"every": 0}, "every: expected an integer of at least 1, got 0"),
        ({"draws": 1}, "draws: expected an integer of at least 2, got 1"),
        ({"images": 1}, "images: expected an integer of at least 2, got 1"),
        ({"log_every": 0}, "log_every: expected an integer of at least 1, got 0"),
        ({"model": ImageFlowConfig((4, 4, 1), blocks=(1,))}, r"model.shape: expected \(8, 8, 1\).*got \(4, 4, 1\)"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        BiasConfig(**setting)


def test_divergence_is_reported(tmp_path):
    """A loss or a measurement that stops being finite ends the run; no line of it is written."""
    config = dataclasses.replace(TINY, workdir=tmp_path, optimizer=OptimizerConfig(learning_rate=1e200, warmup=0))
    with pytest.raises(FloatingPointError, match=r"training diverged between steps|bits/dim of the test split are"):
        bias.run(config)
    assert all(np.isfinite(line["bits_per_dim"]) for line in read_metrics(tmp_path))
