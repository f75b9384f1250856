"""Resumes a run of training, by any command, from its last checkpoint.

    python -m experiments.resume RUN_DIR [--data.path PATH] [--mesh.data N] [--distributed.auto] [--tiny]

Does the same as the run's original command, which need not be known, but for the devices: the run goes on in one
process, on all of its devices, unless `--distributed` and `--mesh` say otherwise. On another number of devices the
results are the same up to rounding. Data that were moved are named by `--data.path` or `--data.dir`; other data than
those of the run are refused.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from experiments.configs.base import DistributedConfig, MeshConfig
from experiments.runs.command import Command
from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch
from experiments.runs.saved import MovedData, saved_config
from experiments.runs.tiny_run import TINY_RUN, make_if_missing


@dataclass(frozen=True)
class ResumeConfig:
    """One call of `python -m experiments.resume`.

    Attributes:
      run_dir: work directory of the run.
      data: present place of the run's data, if they have been moved.
      mesh: how the devices are divided; by default parameters as in the run, and batches among all devices.
      distributed: how the processes find each other; by default there is one, whatever the run had.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    data: MovedData = MovedData()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()


COMMAND = Command(
    "experiments.resume", __doc__, ResumeConfig(tyro.MISSING), tiny=lambda config: replace(config, run_dir=TINY_RUN)
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(run, arguments)


def run(config: ResumeConfig) -> None:
    """Resumes the run."""
    make_if_missing(config.run_dir)
    saved = saved_config(config.run_dir, config.data)
    is_of_run = replace(config.mesh, data=None) == MeshConfig()  # a number alone keeps the layout of parameters
    mesh = replace(saved.mesh, data=config.mesh.data) if is_of_run else config.mesh
    launch(replace(saved, mesh=mesh, distributed=config.distributed))


if __name__ == "__main__":
    main()
