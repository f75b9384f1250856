"""One run in a work directory at a time."""

import dataclasses
import os
import subprocess
import sys

import pytest

from experiments.runs.launch import run_config
from experiments.runs.lock import locked
from tests.experiments.tiny import TINY
from tests.paths import ROOT

HOLD = """
import sys, time
from pathlib import Path
from experiments.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    """The error names the directory and the process; a killed process leaves no lock."""
    config = dataclasses.replace(TINY, workdir=tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(config.workdir)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=rf"workdir: {config.workdir} is in use by process {other.pid}; wait"):
            run_config(config)
        assert [path.name for path in config.workdir.iterdir()] == [".lock"]
        other.kill()
    with locked(config.workdir):
        assert (config.workdir / ".lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"), locked(config.workdir):
            pass
    with locked(config.workdir):
        pass


def test_a_directory_that_cannot_be_written_to():
    """The error names it."""
    with pytest.raises(OSError, match=r"workdir: could not write to /proc: "), locked(TINY.workdir.__class__("/proc")):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """The run goes on, with a warning."""

    def fail(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("experiments.runs.lock.fcntl.flock", fail)
    with pytest.warns(UserWarning, match="has no lock|could not be locked"), locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
