"""What `experiments.resume` takes from the run, and what it takes from its own command line."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import resume
from experiments.configs.base import DataConfig, DistributedConfig, MeshConfig
from experiments.runs.workdir import claim_workdir
from tests.experiments.tiny import TINY

AWAY = DistributedConfig(coordinator="gone:1", num_processes=2, process_id=0)


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """The config that is launched for a run of two processes on eight devices, with arguments of `resume`."""
    launched = []
    monkeypatch.setattr(resume, "launch", launched.append)
    run = replace(TINY, workdir=tmp_path, data=DataConfig("images", path=Path("old")), distributed=AWAY)
    run = replace(run, mesh=MeshConfig(data=8, parameters="full"))
    claim_workdir(tmp_path, run)

    def config(*arguments):
        resume.run(resume.COMMAND.parse([str(tmp_path), *arguments]))
        return launched.pop()

    return run, config


def test_other_devices(resumed):
    """By default the run goes on in one process on all devices, else as the command line says."""
    run, config = resumed
    here = replace(run, distributed=DistributedConfig(), mesh=MeshConfig(parameters="full"))
    assert config() == here
    assert config("--mesh.data", "4") == replace(here, mesh=MeshConfig(data=4, parameters="full"))
    cluster = {"coordinator": "here:2", "num-processes": "4", "process-id": "3"}
    arguments = [word for name, value in cluster.items() for word in (f"--distributed.{name}", value)]
    assert config(*arguments) == replace(here, distributed=DistributedConfig(False, "here:2", 4, 3))


def test_moved_data(resumed):
    """Their present place is named as for `evaluate`; a place that the run does not have is refused."""
    run, config = resumed
    assert config("--data.path", "new").data == replace(run.data, path=Path("new"))
    with pytest.raises(ValueError, match=r"data\.dir: expected a run on a TensorFlow data set"):
        config("--data.dir", "there")
