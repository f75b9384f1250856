"""The comparison of estimators: its variances against closed forms, and a tiny run end to end."""

import dataclasses
import json
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.runs.tasks import images
from experiments.studies import estimators
from experiments.studies.estimators import DEFAULT, FITTED, PAPERS, PLAIN, EstimatorsConfig, Target
from experiments.studies.parts import estimator_targets
from resflow_jax import Diagnostics, Geometric, Roulette
from tests.experiments import tiny

pytestmark = pytest.mark.filterwarnings("ignore:length. .* infinite variance:RuntimeWarning")


def known_target(ratio):
    """A gradient that is a series of terms ratio^k along one direction, k = 0, 1, ..., with noise along another."""

    def gradient(key, estimator):
        length_key, noise_key = jax.random.split(key)
        length, k = estimator.length.sample(length_key), np.arange(200, dtype=np.int32)
        weights = jnp.where(k == 0, 1.0, (length >= k).astype(float) / estimator.length.survival(k))
        values = jnp.stack([jnp.sum(weights * ratio ** k.astype(float)), jax.random.normal(noise_key)])
        norms = jnp.zeros(16)
        return values, values[:1], Diagnostics(length.astype(float), norms, jnp.zeros(()), jnp.zeros(()))

    return Target("known", gradient, keys=2000, lipschitz=ratio, batch_size=1)


def known_variance(law, ratio, terms):
    """Variance over N of sum_k ratio^k 1[N >= k] / P(N >= k), for terms 0..`terms`, by summing over N."""
    k = np.arange(terms + 1)
    survival = np.append(np.asarray(law.survival(np.arange(terms + 2)), float)[: terms + 1], 0)
    survival[0] = 1
    probability = survival[:-1] - survival[1:]
    values = np.cumsum(ratio**k / survival[:-1])
    return probability @ values**2 - (probability @ values) ** 2


def test_measured_and_summed_variance():
    """Both are the closed form plus the variance of the noise: the sampled one within its stated error."""
    law, target = Geometric(0.4), known_target(0.5)
    measured, norms = estimators.measure(target, Roulette(law, 0), jax.random.key(0))
    expected = known_variance(law, 0.5, 60) + 1
    assert abs(measured.variance - expected) < 4 * measured.variance_stderr < 0.3 * expected
    assert measured.work == measured.variance * measured.cost and abs(measured.cost - 2.5) < 0.1
    assert norms.shape == (16,)
    values = known_variance(law, 0.5, 60)
    assert measured.one_value == measured.mean_value and abs(measured.mean_value / values - 1) < 0.3
    assert abs(measured.along_mean / values - 1) < 0.3  # the noise has mean zero
    moments, mean_square = estimators.length_moments(target, Roulette(law, 0), jax.random.key(1), probes=3)
    of_lengths = estimators.summed_variance(target, Roulette(law, 0), moments, moments.sum())
    np.testing.assert_allclose(of_lengths, expected - 1, rtol=1e-4)  # what the probes add is taken off
    assert mean_square < moments.sum()


def test_the_sum_over_lengths_sees_a_heavy_tail():
    """0.9^k under Geometric(0.5) has infinite variance: with 24 terms the sum is far above what is ever drawn."""
    target = known_target(0.9)
    moments = estimators.length_moments(target, Roulette(Geometric(0.5), 0), jax.random.key(1), probes=20)
    heavy = estimators.summed_variance(target, Roulette(Geometric(0.5), 0), *moments)
    np.testing.assert_allclose(heavy, known_variance(Geometric(0.5), 0.9, 24), rtol=1e-3)
    light = estimators.summed_variance(target, Roulette(exact_terms=0), *moments)
    assert light < heavy / 10


def test_kurtosis():
    """Three for a normal law, six for a Laplace law."""
    rng = np.random.default_rng(0)
    assert abs(estimators.mean_kurtosis(rng.normal(size=(20000, 1))) - 3) < 0.2
    assert abs(estimators.mean_kurtosis(rng.laplace(size=(20000, 1))) - 6) < 1


def test_end_to_end(tmp_path, monkeypatch, capsys):
    """One spectrum and a tiny digits flow, which is trained once: tables, JSON and picture; the default wins."""
    names = (PAPERS, PLAIN, DEFAULT, "default with fitted lengths")
    assert "default with fitted lengths" in FITTED
    kept = {name: estimator for name, estimator in estimators.ESTIMATORS.items() if name in names}
    monkeypatch.setattr(estimators, "ESTIMATORS", kept)
    monkeypatch.setattr(estimator_targets, "spectra", lambda dim, rng: {"saturated": -0.9 * np.eye(dim)})
    monkeypatch.setitem(CONFIGS, "digits_uniform", tiny.DIGITS)
    monkeypatch.setattr(images, "load_tfds", Mock(side_effect=FileNotFoundError("no such data")))
    config = EstimatorsConfig(tmp_path, keys=20, probes=2, batch_size=4)
    with jax.enable_x64(False):
        results = estimators.run(config)
        stamp = (tmp_path / "digits" / "metrics.jsonl").stat().st_mtime_ns
        monkeypatch.setattr(estimators, "measure_all", lambda target, _: results[target.name])
        again = estimators.run(dataclasses.replace(config, targets=("digits",)))
    assert stamp == (tmp_path / "digits" / "metrics.jsonl").stat().st_mtime_ns
    assert list(results) == ["saturated", "digits flow, batch 4"] and list(again) == ["digits flow, batch 4"]
    for rows in results.values():
        assert list(rows) == list(kept)
        assert all(np.isfinite(m.variance) and m.cost > 0 for m in rows.values())
    saturated = results["saturated"]
    assert saturated[PAPERS].summed > 1e6 * saturated[PLAIN].summed
    assert saturated[DEFAULT].along_mean < 1e-2 * saturated[PAPERS].along_mean
    printed = capsys.readouterr().out
    assert "fashion_mnist: left out, no such data" in printed and "all lengths" in printed
    assert "whole gradient  along its mean  mean of a batch  of one example" in printed
    assert saturated[DEFAULT].mean_value < 1e-6 * saturated[PAPERS].mean_value
    assert (tmp_path / "estimators.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "estimators.json").read_text())["digits flow, batch 4"][PAPERS]["cost"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ("mnist",)}, "targets: expected one of synthetic, digits, fashion_mnist; got 'mnist'"),
        ({"keys": 3}, "keys: expected an integer of at least 20, got 3"),
        ({"probes": 1}, "probes: expected an integer of at least 2, got 1"),
    ],
)
def test_bad_settings(arguments, message):
    """Each names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        EstimatorsConfig(**arguments)
