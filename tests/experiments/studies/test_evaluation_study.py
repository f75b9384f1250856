"""The study of the noise of evaluations: a tiny flow end to end, known noise, and its table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.configs import CONFIGS
from experiments.studies import evaluation
from experiments.studies.evaluation import DEFAULT, PAPERS, EvaluationStudyConfig, Noise
from experiments.studies.parts import trained
from resflow_jax import Roulette
from tests.experiments import tiny


class Noisy(nnx.Module):
    """A flow whose log p has one error that all images share, of deviation 3, and one of their own, of deviation 4."""

    def log_prob(self, x, *, key, estimator):
        shared, own = jax.random.split(key)
        return 3 * jax.random.normal(shared) + 4 * jax.random.normal(own, x.shape[:1])


def test_known_noise():
    noise = evaluation.measure(Noisy(), jnp.zeros((100, 1)), Roulette(), 400, 0)
    np.testing.assert_allclose(noise.mean, np.hypot(3, 0.4), rtol=0.1)
    np.testing.assert_allclose(noise.one, 5, rtol=0.1)
    assert noise.milliseconds > 0


def test_the_table():
    """At equal cost: twice the error in a quarter of the time is as good."""
    lines = evaluation.table({PAPERS: Noise(4, 2, 8), DEFAULT: Noise(1, 1, 16)}).splitlines()
    assert lines[2].endswith("| 4 | 2 | 8 | 1 | 1 |") and lines[3].endswith("| 1 | 1 | 16 | 4 | 1 |")


def test_end_to_end(tmp_path, monkeypatch, capsys):
    """A tiny flow of the digits, which is not trained."""
    kept = {name: evaluation.ESTIMATORS[name] for name in (PAPERS, DEFAULT)}
    monkeypatch.setattr(evaluation, "ESTIMATORS", kept)
    monkeypatch.setitem(CONFIGS, "digits_uniform", tiny.DIGITS)
    monkeypatch.setattr(trained, "run_config", tiny.save_run)
    config = EvaluationStudyConfig(tmp_path, targets=("digits",), keys=8, images=8)
    with jax.enable_x64(False):
        results = evaluation.run(config)
    assert list(results) == ["digits"] and list(results["digits"]) == [PAPERS, DEFAULT]
    assert all(noise.mean > 0 and noise.one > 0 for noise in results["digits"].values())
    assert json.loads((tmp_path / "evaluation.json").read_text())["digits"][DEFAULT]["mean"] > 0
    assert "digits, 8 test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ("mnist",)}, "targets: expected one of digits, fashion_mnist; got 'mnist'"),
        ({"keys": 3}, "keys: expected an integer of at least 8, got 3"),
        ({"images": 1}, "images: expected an integer of at least 2, got 1"),
    ],
)
def test_bad_settings(arguments, message):
    """Each names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        EvaluationStudyConfig(**arguments)
