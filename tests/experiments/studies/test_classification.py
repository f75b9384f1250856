"""The comparison of classifiers: which runs it makes, what it measures of one, its tables."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.runs.saved import saved_flow
from experiments.studies import classification
from experiments.studies.classification import PARTS, ClassificationConfig, Variant, over_seeds, variants
from experiments.studies.parts import class_runs
from experiments.studies.parts.class_runs import DATASETS, figures, measured
from tests.experiments.tiny import finish_untrained


@pytest.fixture
def figures_by_name(monkeypatch):
    """In the place of runs: figures that follow from name and seed; the settings that were asked for."""
    asked = []

    def of(settings):
        asked.append(settings)
        found = {"error": settings.seed + 1.0, "error_stderr": 0.5, "cross_entropy": 0.1, "ece": 0.01}
        found |= {"auroc_classes": 0.9, "parameters": 10, "step_seconds": 0.02}
        if settings.model.has_density:
            found |= {"bits_per_dim": None if not settings.hybrid.weight else 2.0, "auroc_density": 1.0}
        return found

    monkeypatch.setattr(classification, "measured", of)
    return asked


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("small", [False, True])
def test_variants(data, small):
    """Their settings are valid; a directory is shared by equal settings alone; densities have no padding."""
    config = ClassificationConfig(data, small=small)
    assert list(variants(config)) == list(PARTS)
    of_directory = {}
    for part, found in variants(config).items():
        assert len(found) == (1 if small else {"architectures": 4, "hybrid": 4, "labels": 8}[part])
        for variant in found:
            settings = config.common.run(variant.settings, f"{variant.name}_seed0")
            assert of_directory.setdefault(settings.workdir, settings) == settings
            assert part == "architectures" or settings.model.padding == 0
            assert (settings.labels is None) == (part != "labels")
    if not small:
        shared = data == "digits"  # the only one without padding
        assert len(of_directory) == 16 - shared


def test_chosen_networks():
    """A part may be restricted by names; the error for a name that no network has lists those that there are."""
    config = ClassificationConfig(networks=("mixture_1_over_d", "c0.9"))
    found = variants(config)
    assert list(found) == list(PARTS)
    assert [variant.title for variant in found["architectures"]] == ["i-ResNet, c = 0.9"]
    assert [variant.title for variant in found["labels"]] == [
        f"{number} labels: {kind}" for number in (100, 1000) for kind in ("supervised alone", "mixture, weight 1/D")
    ]
    with pytest.raises(ValueError, match=r"networks: expected some of standard, vanilla, c0.9, c0.5 for architectures"):
        variants(replace(config, networks=("c0.9", "hybrid_1"), part="architectures"))
    with pytest.raises(ValueError, match="for all, got mixtur_1"):
        variants(replace(config, networks=("c0.9", "mixtur_1")))
    assert list(variants(replace(config, networks=("standard",)))) == ["architectures"]


def test_results(tmp_path, figures_by_name, capsys):
    """Means and standard errors over seeds, in a file, a table and a picture; a later part keeps the others."""
    config = ClassificationConfig(workdir=tmp_path, seeds=2, labels=(50,), steps=7)
    found = classification.run(replace(config, part="hybrid"))
    assert list(found) == ["hybrid"] and len(figures_by_name) == 8
    assert {settings.steps for settings in figures_by_name} == {7}
    assert sorted({settings.workdir.name for settings in figures_by_name})[0] == "c0.9_seed0"
    row = found["hybrid"]["mixture, weight 1"]
    assert row["mean"]["error"] == pytest.approx(1.5) and row["stderr"]["error"] == pytest.approx(0.5)
    assert found["hybrid"]["pooled head, weight 0"]["mean"]["bits_per_dim"] is None
    printed = capsys.readouterr().out
    assert "| mixture, weight 1 | 1.50 ± 0.50 | 2.000 | 0.1000 | 0.0100 | 0.900 | 1.000 |" in printed
    assert "| pooled head, weight 0 | 1.50 ± 0.50 |  | 0.1000 |" in printed and "up to 0.50 %" in printed

    both = classification.run(replace(config, part="labels"))
    assert list(both) == ["hybrid", "labels"] and next(iter(both["labels"])) == "50 labels: supervised alone"
    assert json.loads((tmp_path / "digits" / "results.json").read_text()) == both
    assert (tmp_path / "digits" / "classification.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_spread(tmp_path, figures_by_name):
    config = ClassificationConfig(workdir=tmp_path, seeds=1)
    row = over_seeds(config, Variant("a", "a", config.common.base))
    assert row["mean"]["error"] == 1 and row["stderr"]["error"] is None


def test_figures_of_a_run(tmp_path, monkeypatch):
    """Made, measured and timed once; then they are read from its directory."""
    monkeypatch.setattr(class_runs, "run_config", finish_untrained)
    config = ClassificationConfig(workdir=tmp_path, small=True)
    settings = config.common.run(config.common.base, "c0.9_seed0")
    found = measured(settings)
    assert found["error"] == 90 and found["error_stderr"] == 1
    assert found["cross_entropy"] > 0 and 0 <= found["ece"] <= 1 and found["step_seconds"] > 0
    assert found["parameters"] > 0 and found["bits_per_dim"] > 0 and "radius" in found
    monkeypatch.setattr(class_runs, "run_config", lambda config: pytest.fail("was run again"))
    monkeypatch.setattr(class_runs, "figures", lambda saved: pytest.fail("was measured again"))
    assert measured(settings) == found


def test_figures_of_a_mixture(tmp_path):
    """Bits/dim, and no certified radius, since the logits have no Lipschitz constant."""
    config = ClassificationConfig(workdir=tmp_path, small=True)
    (variant,) = variants(config)["hybrid"]
    settings = config.common.run(variant.settings, "mixture")
    with pytest.raises(ValueError, match=r"workdir: expected a finished run, got .* without a test error"):
        class_runs.test_error(settings.workdir)
    finish_untrained(settings)
    found = figures(saved_flow(settings.workdir))
    assert "radius" not in found and found["error"] == 90
    assert np.isfinite([found["bits_per_dim"], found["auroc_density"], found["auroc_classes"]]).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"part": "nothing"}, "part: expected one of .*got 'nothing'"),
        ({"seeds": 0}, "seeds: expected an integer of at least 1, got 0"),
        ({"labels": ()}, r"labels: expected some numbers in increasing order, got \(\)"),
        ({"data": "cifar10"}, "data: expected one of .*got 'cifar10'"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        ClassificationConfig(**setting)
