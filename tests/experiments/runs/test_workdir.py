"""Work directories that a run refuses, and what it leaves there."""

import dataclasses
import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.conditional import ConditionalConfig
from experiments.configs import CONFIGS
from experiments.configs.base import VectorDataConfig
from experiments.configs.classes import CLASS_CONFIGS
from experiments.configs.classification import ImportedClassifyConfig
from experiments.runs import workdir
from experiments.runs.launch import run_config
from experiments.runs.workdir import check_still_there, claim_workdir, write_arrays
from experiments.studies.bias import BiasConfig
from experiments.studies.steep import SteepConfig
from experiments.variational import VariationalConfig
from resflow_jax import (
    VectorFlowConfig,
)
from tests.experiments.tiny import TINY


def test_a_directory_that_is_not_of_a_run(tmp_path):
    """Metrics that no config accounts for are not overwritten."""
    (tmp_path / "metrics.jsonl").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="workdir: expected a new directory or that of a run"):
        run_config(dataclasses.replace(TINY, workdir=tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    "content",
    [
        '{"architectures": ["Other"], "hidden_size": 768}',
        "[1, 2]",
        '{"type": 3}',
        '{"type": "lstm", "hidden": 3}',
        '{"type": "VectorFlowConfig", "dim": 2}',
    ],
)
def test_a_config_of_another_program(content, tmp_path):
    """Is not overwritten, whatever else the directory holds."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((FileExistsError, ValueError), match="workdir: expected"):
        claim_workdir(tmp_path, TINY)
    assert (tmp_path / "config.json").read_text() == content


def test_a_run_of_another_kind(tmp_path):
    """Is replaced as long as it has not been trained, whichever command made the directory."""
    kinds = {type(config): config for config in (*CONFIGS.values(), *CLASS_CONFIGS.values())}
    kinds |= {cls: cls() for cls in (BiasConfig, ConditionalConfig, SteepConfig, VariationalConfig)}
    for config in (*kinds.values(), TINY):
        claim_workdir(tmp_path, config)
        assert json.loads((tmp_path / "config.json").read_text())["type"] == type(config).__name__
    assert {cls.__name__ for cls in (*kinds, ImportedClassifyConfig)} == {*workdir._TYPES}


def test_images_of_another_shape(tmp_path):
    """A model that does not fit the data is refused before anything is written."""
    model = dataclasses.replace(TINY.model, shape=(4, 4, 1))
    with pytest.raises(ValueError, match=r"model.shape: expected \(8, 8, 1\).*got \(4, 4, 1\)"):
        run_config(dataclasses.replace(TINY, model=model, workdir=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_workdir_that_is_a_file(tmp_path):
    """The error names the argument and the file is left alone."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="workdir: expected a directory, got the file"):
        run_config(dataclasses.replace(TINY, workdir=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_start_that_failed_leaves_the_directory_free(tmp_path):
    """Impossible settings are refused before anything is written; an untrained run may be given another config."""
    config = dataclasses.replace(TINY, workdir=tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size: expected between 1 and 1347"):
        run_config(dataclasses.replace(config, batch_size=5000))
    assert not config.workdir.exists()
    claim_workdir(config.workdir, dataclasses.replace(config, batch_size=8))
    claim_workdir(config.workdir, config)
    assert json.loads((config.workdir / "config.json").read_text())["batch_size"] == 16
    (config.workdir / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another config.*\n.*batch_size: 16 there, 8 now"):
        claim_workdir(config.workdir, dataclasses.replace(config, batch_size=8))
    (config.workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"workdir: expected the config of a run in .*config\.json"):
        claim_workdir(config.workdir, config)


def test_too_few_examples_to_test_on(tmp_path):
    """One test example gives no standard error."""
    np.save(tmp_path / "few.npy", np.random.default_rng(0).normal(size=(12, 2)))
    config = dataclasses.replace(
        CONFIGS["vectors"], data=VectorDataConfig(tmp_path / "few.npy"), model=VectorFlowConfig(2), batch_size=4
    )
    with pytest.raises(ValueError, match="data: expected two or more examples to test on, got 1 in"):
        run_config(config)


def test_a_work_directory_that_cannot_be_made():
    """The error names the argument and the path."""
    with pytest.raises(OSError, match=r"workdir: could not make /proc/nowhere"):
        run_config(dataclasses.replace(TINY, workdir=Path("/proc/nowhere")))


def test_a_work_directory_that_is_removed(tmp_path):
    """A run notices it by its config.json."""
    (tmp_path / "config.json").write_text("{}")
    check_still_there(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="removed, or moved, while the run went on"):
        check_still_there(tmp_path)


def test_arrays_are_written_as_a_whole(tmp_path, monkeypatch):
    """An error leaves the file that was there."""
    path = tmp_path / "scores.npz"
    write_arrays(path, a=np.arange(3), path=np.arange(2))

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="could not write it, earlier files are intact"):
        write_arrays(path, a=np.arange(4))
    assert np.load(path)["a"].tolist() == [0, 1, 2] and [file.name for file in tmp_path.iterdir()] == ["scores.npz"]


def test_commands_write_as_a_whole():
    """No command or part of one replaces a file of results in place; what makes files to be read or tried may."""
    root = Path(workdir.__file__).parents[1]
    in_place = r"np\.savez?\(|\.write_(?:text|bytes)\(|(?:\.savefig|\)\.save)\((?!temporary)"
    for path in (*root.glob("*.py"), *root.glob("studies/*.py"), *root.glob("runs/**/*.py")):
        found = re.findall(in_place, path.read_text())
        assert not found or path == Path(workdir.__file__), path
