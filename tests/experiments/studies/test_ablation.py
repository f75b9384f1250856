"""The ablation: which runs it makes, and its table. It is really made in test_evaluate.py."""

import json

import numpy as np
import pytest

from experiments.studies import ablation
from experiments.studies.ablation import AblationConfig
from resflow_jax import Estimate, Truncated


def test_runs_and_table(tmp_path, monkeypatch, capsys):
    """Three variants that differ in estimator and activation alone, each with every seed, in places of their own."""
    configs = []

    def run(config):
        configs.append(config)
        return Estimate(len(config.model.activation) + config.seed / 10, 0.01, 0.01, 0.0)

    monkeypatch.setattr(ablation, "run_config", run)
    for name in ("use_xla_flags", "use_all_cores"):
        monkeypatch.setattr(ablation, name, lambda *_: None)
    ablation.main(["mnist", "--seeds", "0", "3", "--workdir", str(tmp_path), "--data.dir", "there"])
    assert [config.seed for config in configs] == [0, 3] * 3
    assert len({config.workdir for config in configs}) == 6
    assert [config.model.activation for config in configs[::2]] == ["elu", "elu", "lipswish"]
    assert configs[0].estimator == Truncated(5) and configs[2].estimator == configs[4].estimator
    for config in configs:
        assert config.data.dir == "there" and config.data.name == "mnist" and config.optimizer == configs[0].optimizer
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert list(table) == list(ablation.VARIANTS)
    row = table["Residual flow, LipSwish"]
    assert row["mean"] == pytest.approx(8.15) and row["deviation"] == pytest.approx(np.std([8, 8.3], ddof=1))
    assert row["runs"]["3"]["mean"] == pytest.approx(8.3)
    assert "Residual flow, LipSwish     8.1500 +- 0.2121   (8.0000, 8.3000)" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [(0,), (1, 1)])
def test_one_seed_has_no_deviation(seeds):
    with pytest.raises(ValueError, match="seeds: expected two or more different numbers, got"):
        AblationConfig(seeds=seeds)
