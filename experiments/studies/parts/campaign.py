"""What the campaigns of `experiments.studies.stress` share: the rows of the table, and runs that are started apart."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      what: what was done.
      tries: how often.
      found: what came of it.
      is_good: whether that is what should come of it.
    """

    what: str
    tries: int
    found: str
    is_good: bool


class Deadline:
    """The end of the time that a study has."""

    def __init__(self, seconds: float):
        """seconds: from now."""
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return not self.left


@dataclass(frozen=True)
class Campaign:
    """One kind of fault.

    Attributes:
      summary: what is tried, in a few words.
      run: from the settings of the study, a directory of its own and the deadline to rows.
    """

    summary: str
    run: Callable[..., list[Row]]


SMALL_RUN = ("vectors", "--tiny", "--steps", "16", "--log-every", "1", "--evaluation.every", "4", "--save-every", "2")


def start(workdir: Path, *arguments: str, **options) -> subprocess.Popen:
    """Starts `python -m experiments.density` with these arguments; its output goes to a file beside the directory."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.density", *(arguments or SMALL_RUN), "--workdir", str(workdir)]
    with output_of(workdir).open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=dict(os.environ), **options)


def output_of(workdir: Path) -> Path:
    """The file with the output of the last run that was started in a directory."""
    return workdir.with_name(f"{workdir.name}.out")


def finish(workdir: Path, *arguments: str, limit: float = 600, **options) -> tuple[int, str]:
    """Runs to the end. Returns the exit status and the last line of the output.

    Raises:
      TimeoutError: if it takes longer than `limit` seconds; the process is ended.
    """
    process = start(workdir, *arguments, **options)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise TimeoutError(
            f"expected the run in {workdir} to end within {limit:.0f} s; see {output_of(workdir)}"
        ) from error
    return status, last_error(workdir)


def last_error(workdir: Path) -> str:
    """The last line of the output that tells of an error, or the last line."""
    lines = output_of(workdir).read_text(errors="replace").strip().splitlines()
    told = [line for line in lines if ": error: " in line]
    return (told or lines or [""])[-1]


def files_of(workdir: Path) -> dict[str, bytes]:
    """What must be the same in two runs: the metrics and all pictures, by name."""
    names = ["metrics.jsonl", *(path.relative_to(workdir).as_posix() for path in workdir.rglob("*.png"))]
    return {name: (workdir / name).read_bytes() for name in sorted(names) if (workdir / name).exists()}


def checkpoints_of(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    directory = workdir / "checkpoints"
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit()) if directory.is_dir() else []
