"""The study of the inverse, tiny: its tables, files and figures, and bad input."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.studies import inverse
from experiments.studies.inverse import InverseConfig
from experiments.studies.parts import trained
from resflow_jax import Anderson, FixedPoint, InverseStatus
from tests.experiments import tiny


@pytest.fixture
def small(monkeypatch):
    """A tiny digits flow, not trained, and few points."""
    monkeypatch.setitem(CONFIGS, "digits_uniform", tiny.DIGITS)
    monkeypatch.setattr(trained, "run_config", tiny.save_run)
    monkeypatch.setattr(inverse, "SOLVERS", {name: inverse.SOLVERS[name] for name in (inverse.PLAIN, inverse.BEST)})
    monkeypatch.setattr(inverse, "TOLERANCES", (1e-6,))  # one program
    monkeypatch.setattr(inverse, "PLOTTED_ITERATIONS", (2,))
    monkeypatch.setattr(inverse, "DRAWN_ITERATIONS", (2,))
    monkeypatch.setitem(sys.modules, "experiments.studies.parts.peers", SimpleNamespace(normflows_from=StandIn))


class StandIn:
    """Another library's flow that stops early, and whose log p grows by one nat with every draw."""

    def __init__(self, flow):
        self.flow, self.draws = flow, 0

    def samples(self, z):
        solver = FixedPoint(tolerance=1e-30, max_iterations=2)  # as in the figure of the errors: one program for both
        return np.asarray(self.flow.inverse(z, solver=solver, return_status=True)[0])

    def samples_and_log_prob(self, z):
        self.draws += 1
        return self.samples(z), np.full(len(z), float(self.draws))

    def forward(self, x):
        return np.asarray(self.flow(np.clip(x, 0, 1)))


def test_end_to_end(small, tmp_path, capsys):
    """Every solver reaches the error asked for; the files; what is printed is what is written."""
    config = InverseConfig(tmp_path, targets=("digits",), samples=4, repeats=1, peer=True)
    with jax.enable_x64(False):
        results = inverse.run(config)["digits"]
    assert json.loads((tmp_path / "inverse.json").read_text()) == {"digits": results}
    for name in ("digits_errors.png", "digits_reconstructions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name
    assert len(results["bounds"]) == 1 and max(results["bounds"]) < 1
    for solver in inverse.SOLVERS:
        cost = results["costs"][solver]
        assert cost["error"] <= config.error and cost["tolerance"] == 1e-6
        assert all(1 <= mean <= most for mean, most in zip(cost["mean"], cost["largest"], strict=True))
        row = results["seconds"][solver]
        assert row["samples"] > 0 and row["error"] == cost["error"] and row["tolerance"] == 1e-6
    row = results["seconds"]["normflows"]
    assert row["samples"] > 0 and row["with log_prob"] > 0 and 1e-6 < row["error"] < 0.1
    assert row["noise"] == pytest.approx(np.std(range(inverse.DRAWS), ddof=1))
    assert results["seconds"]["Anderson, error of normflows"]["error"] <= row["error"]
    errors = results["round_trips"]
    assert errors["x, float32"] < 1e-5 and errors["x, float64"] < 1e-10 and errors["z, float64"] < 1e-9
    assert np.sum([sum(part["Anderson"][:1]) for part in results["totals"].values()]) == pytest.approx(
        np.sum(results["costs"]["Anderson"]["mean"])
    )
    printed = capsys.readouterr().out
    assert "every block is invertible" in printed and "block 0, L <= " in printed and "nats" in printed


def test_bisection_finds_the_loosest_tolerance(monkeypatch):
    """The loosest sufficient tolerance is found if errors fall with it; the tightest if no error is small enough."""
    solved = []

    class Flow:
        def inverse(self, z, *, solver, return_status):
            solved.append(solver.tolerance)
            counts = np.full((1, 2), 3)
            return z, InverseStatus(counts, 0.0 * counts, 0.0 * counts, counts > 0)

    monkeypatch.setattr(inverse, "reconstruction_error", lambda flow, x, solver: 2 * solver.tolerance)
    certificate = SimpleNamespace(error_bounds=lambda status: np.zeros(2))
    for error, expected in ((2e-4, 1e-4), (1.9e-4, 10**-4.25), (1.0, 1e-2), (1e-9, 1e-7)):
        solved.clear()
        cost = inverse.equal_error_cost(Flow(), certificate, np.zeros((2, 2)), error, Anderson(), inverse.TOLERANCES)
        assert cost.tolerance == pytest.approx(expected) and cost.error == pytest.approx(2 * expected)
        assert len(solved) == len(set(solved)) <= 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"targets": ("letters",)}, "targets: expected one of digits, fashion_mnist; got 'letters'"),
        ({"samples": 0}, "samples: expected an integer of at least 1, got 0"),
        ({"part": 0}, "part: expected an integer of at least 1, got 0"),
        ({"repeats": 0}, "repeats: expected an integer of at least 1, got 0"),
        ({"error": 0.0}, "error: expected a positive number, got 0.0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    """Each is refused before anything is made."""
    with pytest.raises(ValueError, match=message):
        InverseConfig(**setting)
