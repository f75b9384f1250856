"""Resumes a run of training, by any command, from its last checkpoint.

    python -m experiments.resume RUN_DIR [--tiny]

Does the same as the run's original command, which need not be known.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from experiments.runs.command import Command
from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch
from experiments.runs.saved import saved_config
from experiments.runs.tiny_run import TINY_RUN, make_if_missing


@dataclass(frozen=True)
class ResumeConfig:
    """One call of `python -m experiments.resume`.

    Attributes:
      run_dir: work directory of the run.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]


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
    launch(saved_config(config.run_dir))


if __name__ == "__main__":
    main()
