"""The staircase on the line, tiny: its files, its target, and the bounds that it shows."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import steep
from experiments.studies.steep import SteepConfig
from resflow_jax import certify


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = SteepConfig(workdir=tmp_path_factory.mktemp("run"), steps=3, points=20, width=4)
    return config, steep.run(config)


def test_files_and_numbers(finished):
    """All promised files exist; no flow is steeper than its certified bound."""
    config, outcomes = finished
    assert (config.workdir / "steep.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((config.workdir / "steep.json").read_text())) == set(outcomes) == set(steep.KINDS)
    for outcome in outcomes.values():
        assert 0 < outcome.slope <= outcome.bound * (1 + 1e-6) and np.isfinite(outcome.error)


def test_the_bounds_are_those_of_the_text():
    """Residual blocks reach (1 + L)^2, far from S; the others reach beyond it."""
    config = SteepConfig(width=8)
    contraction = config.coefficient**2
    bounds = {}
    for kind in ("residual", "implicit", "monotone"):
        flow = steep.flow_of(config, kind)
        flow.tighten()
        bounds[kind] = certify(flow).lipschitz
    assert bounds["residual"] <= (1 + contraction) ** 2 < 4 < config.steepness
    assert bounds["monotone"] <= ((1 + contraction) / (1 - contraction)) ** 2
    assert bounds["implicit"] <= (1 + contraction) / (1 - contraction)


def test_the_staircase():
    """It increases, passes through the integers, and has the slopes 1/S and S."""
    x = jnp.linspace(-2, 2, 40_001)
    y = steep.staircase(x, 20.0)
    slopes = np.diff(y) / np.diff(x)
    np.testing.assert_allclose(steep.staircase(jnp.arange(-2.0, 3.0), 20.0), np.arange(-2, 3), atol=1e-9)
    np.testing.assert_allclose(np.quantile(slopes, [0.01, 0.9, 0.99]), [0.05, 0.05, 20], rtol=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"steepness": 1.0}, "steepness: expected a number above 1, got 1.0"),
        ({"coefficient": 1.0}, r"coefficient: .*\(0, 1\), got 1.0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        SteepConfig(**setting)
