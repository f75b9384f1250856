"""The run that commands on runs use with `--tiny`: that of `python -m experiments.density digits --tiny`."""

import subprocess
import sys
from pathlib import Path

from experiments.configs import CONFIGS
from experiments.configs.tiny import tiny

TINY_RUN = tiny(CONFIGS["digits"]).workdir


def make_if_missing(run_dir: Path) -> None:
    """Makes the tiny run in a separate process, if `run_dir` is its work directory and holds no run yet.

    Raises:
      RuntimeError: if the process fails; its own message is on standard error.
    """
    if run_dir != TINY_RUN or (run_dir / "checkpoints").exists():
        return
    print(f"{run_dir} holds no run yet: first runs python -m experiments.density digits --tiny", flush=True)
    command = [sys.executable, "-m", "experiments.density", "digits", "--tiny"]
    if status := subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"run_dir: expected a run in {run_dir}; making it ended with status {status}")
