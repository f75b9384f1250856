"""The variational experiment: its files, what it learns, its measures, and bad input."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from experiments import variational
from experiments.configs.base import OptimizerConfig
from experiments.variational import VariationalConfig, divergence, draw_from_grid, target_on_grid
from resflow_jax import Exact, VectorFlowConfig
from resflow_jax.data.potentials import log_density

KEY = jax.random.key(0)
TINY = VariationalConfig(
    target="banana",
    steps=40,
    batch_size=64,
    annealing=0,
    optimizer=OptimizerConfig(learning_rate=3e-2, warmup=4, ema_decay=0.8),
    model=VectorFlowConfig(dim=2, blocks=3, hidden=(16,), activation="elu", preactivation="none"),
    samples=500,
    cells=60,
    log_every=10,
)


def test_a_tiny_run_learns_from_its_own_samples(tmp_path, capsys):
    """The files; the divergence falls, is positive, and is what the metrics and the table say."""
    result = variational.run(VariationalConfig(**{**vars(TINY), "workdir": tmp_path / "run"}))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "variational.png",
    }
    assert (tmp_path / "run" / "variational.png").read_bytes().startswith(b"\x89PNG")
    *train, test = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in train] == [10, 20, 30, 40]
    assert train[-1]["kl_minus_log_normalizer"] < train[0]["kl_minus_log_normalizer"] - 0.3
    assert test["kl"] == result.kl and 0 < result.kl < train[0]["kl_minus_log_normalizer"] + result.log_normalizer
    assert 0 < result.sample_efficiency <= 1
    printed = capsys.readouterr().out
    assert f"{result.kl:.4f} +- {result.stderr:.4f} nats" in printed and "every block is invertible" in printed


def test_annealing_changes_the_gradient_alone(monkeypatch):
    """The loss, which is logged, is the mean of log p - log q at every step; its gradient has the weight of log q."""
    given = []
    monkeypatch.setattr(variational, "train_flow", lambda config, *rest, **options: given.extend(rest))
    variational.train(replace(TINY, annealing=100), None)
    flow, loss = given[:2]
    z = jax.random.normal(KEY, (8, 2), flow.dtype)
    graphdef, params, others = nnx.split(flow, nnx.Param, ...)

    @jax.jit
    def at(step):
        def objective(params):
            return loss(nnx.merge(graphdef, params, others, copy=True), z, KEY, Exact(), step)[0]

        return jax.value_and_grad(objective)(params)

    values, gradients = zip(*(at(jnp.asarray(step)) for step in (0, 49, 1000)), strict=True)
    x, log_prob = flow.inverse_and_log_prob(z, estimator=Exact(), solver=variational.SOLVER)
    expected = jnp.mean(log_prob - log_density("banana", x))
    np.testing.assert_allclose(values, [expected] * 3, rtol=1e-6)
    none, half, whole = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in gradients)
    assert jnp.abs(none - whole).max() > 1e-2
    np.testing.assert_allclose((half - whole) / 0.5, (none - whole) / 0.99, atol=1e-8)


def test_divergence_of_gaussians():
    """KL(N(0, 1) || c N(1, 1)) = 1/2, log Z = log c, and the efficiency exp(-1), from samples."""
    x = np.random.default_rng(0).normal(size=400_000)
    found = divergence(norm.logpdf(x), norm.logpdf(x, 1.0) + 0.7, 0.7)
    assert abs(found.kl - 0.5) < 4 * found.stderr < 0.01
    assert abs(found.estimated_log_normalizer - 0.7) < 0.02
    assert abs(found.sample_efficiency - np.exp(-1)) < 0.02
    same = divergence(norm.logpdf(x), norm.logpdf(x) + 0.7, 0.7)
    np.testing.assert_allclose((same.kl, same.stderr, same.sample_efficiency), (0, 0, 1), atol=1e-12)


def test_grid_of_a_known_density(monkeypatch):
    """The grid normalises exp(3) N((1, -2), diag(0.25, 1)), and points drawn from it have its moments."""
    monkeypatch.setattr(
        variational,
        "log_density",
        lambda name, x: (
            3 + jax.scipy.stats.norm.logpdf(x, jnp.asarray([[1.0, -2.0]]), jnp.asarray([[0.5, 1.0]])).sum(-1)
        ),
    )
    density, log_normalizer = target_on_grid("any", 200)
    assert abs(log_normalizer - 3) < 1e-6
    low, high = (np.full(2, bound) for bound in variational.POTENTIAL_BOX)
    points = draw_from_grid(density, low, high, 100_000, np.random.default_rng(0))
    np.testing.assert_allclose(points.mean(0), [1, -2], atol=0.02)
    np.testing.assert_allclose(points.std(0), [0.5, 1], rtol=0.02)


def test_a_solve_that_fails_stops_the_run(tmp_path, monkeypatch):
    """A sample that is no solution is never trained on."""
    monkeypatch.setattr(variational, "SOLVER", variational.Anderson(max_iterations=1, on_failure="raise"))
    with pytest.raises(FloatingPointError, match=r"diverged between steps 1 and 2: loss nan.*did not converge"):
        variational.run(VariationalConfig(**{**vars(TINY), "workdir": tmp_path / "run", "steps": 2}))


def test_updates_that_are_skipped_are_counted(tmp_path, monkeypatch, capsys):
    """One of four, whose latents have no solution; it has a line in the metrics, and the table has a row."""
    train = variational.train_flow

    def with_one_bad_batch(config, flow, loss, batch_at, metrics, **options):
        return train(config, flow, loss, lambda step: batch_at(step) * (1 if step != 1 else np.nan), metrics, **options)

    monkeypatch.setattr(variational, "train_flow", with_one_bad_batch)
    settings = vars(TINY) | {"workdir": tmp_path, "steps": 4, "samples": 20, "cells": 10, "log_every": 2}
    variational.run(VariationalConfig(**settings))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines[:3]] == [(2, "skipped"), (2, "train"), (4, "train")]
    assert lines[0]["loss"] is None and np.isfinite(lines[1]["kl_minus_log_normalizer"])
    assert "1 updates skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target": "square"}, "target: expected one of"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"annealing": -1}, "annealing: expected an integer of at least 0, got -1"),
        ({"estimator": "truncated"}, "estimator: expected Exact, Truncated or Roulette, .* got 'truncated'"),
        ({"model": VectorFlowConfig(dim=3)}, "model.dim: expected 2, got 3"),
        ({"optimizer": OptimizerConfig(reversible=True)}, "optimizer.reversible: expected False for a flow that"),
    ],
)
def test_bad_settings_are_named(setting, message):
    """Each is refused before anything is made."""
    with pytest.raises(ValueError, match=message):
        VariationalConfig(**setting)


def test_the_command_line_reaches_the_config(monkeypatch):
    """Names and nested settings."""
    seen = []
    monkeypatch.setattr(variational, "run", seen.append)
    variational.main(["--target", "wave", "--model.blocks", "3"])
    assert (seen[0].target, seen[0].model.blocks) == ("wave", 3)
