"""Goes on with a run of `experiments.density`, or one that `experiments.import_torch` wrote, by its own config.json.

    python -m experiments.resume RUN_DIR

The same as the run's own command once more, for those who no longer have it.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch
from experiments.runs.saved import saved_config


@dataclass(frozen=True)
class ResumeConfig:
    """One call of `python -m experiments.resume`.

    Attributes:
      run_dir: work directory of the run.
    """

    run_dir: tyro.conf.Positional[Path]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    parsed = tyro.cli(ResumeConfig, args=arguments, prog="python -m experiments.resume", description=__doc__)
    launch(saved_config(parsed.run_dir))


if __name__ == "__main__":
    main()
