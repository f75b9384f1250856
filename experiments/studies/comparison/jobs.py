"""One search candidate or one run as settings, and its files: NAME.json, and for runs NAME.npz with samples.

A finished job is a JSON file, so that a command that was stopped goes on with what is missing. The budget is part of
the name. A file of other settings is replaced.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.runs.metrics_file import without_nan
from experiments.runs.workdir import write_arrays, write_atomically
from experiments.studies.comparison.contenders import Candidate


@dataclass(frozen=True)
class Job:
    """A search candidate or a run.

    Attributes:
      data: name of the data set.
      model: name of the model.
      seed: random seed.
      seconds: budget of CPU time; of a candidate for updates alone, of a run with its set-up.
      width: factor on the widths of the networks.
      learning_rate: peak learning rate.
      is_search: whether it is a candidate, which never reads the test split.
      examples: maximum number of test examples; None for that of the config.
      small: whether the model is as small as those of `--tiny`.
      config: what `contenders.fingerprint` says of the other settings of the model and its training.
    """

    data: str
    model: str
    seed: int
    seconds: float
    width: float
    learning_rate: float
    is_search: bool
    examples: int | None = None
    small: bool = False
    config: str = ""

    @property
    def candidate(self) -> Candidate:
        """The settings of the model."""
        return Candidate(self.width, self.learning_rate)

    @property
    def name(self) -> str:
        """The name of its files."""
        what = f"search_w{self.width:g}_lr{self.learning_rate:g}" if self.is_search else f"seed{self.seed}"
        return f"{what}_{self.seconds:g}s"

    def path(self, workdir: Path) -> Path:
        """The JSON file under a work directory."""
        return workdir / self.data / self.model / f"{self.name}.json"

    def as_line(self) -> str:
        """The job in a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Job":
        """The job of `as_line`."""
        return cls(**json.loads(line))


def found(job: Job, workdir: Path) -> dict[str, Any] | None:
    """The result of a job; None if there is none, or that of other settings.

    Raises:
      ValueError: if the file is no JSON; the message names it.
    """
    path = job.path(workdir)
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"workdir: expected the result of a run in {path}, could not read it: {error}") from error
    return result if isinstance(result, dict) and result.get("job") == asdict(job) else None


def save(job: Job, workdir: Path, result: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
    """Writes the arrays, and then the result, each as a whole."""
    path = job.path(workdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrays is not None:
        write_arrays(path.with_suffix(".npz"), **arrays)
    write_atomically(path, json.dumps(without_nan({"job": asdict(job), **result}), indent=2) + "\n")


def restore(results: Iterable[dict[str, Any]], workdir: Path) -> None:
    """Writes the files of jobs from results that were kept elsewhere; files of the same jobs stay."""
    for result in results:
        job = Job(**result["job"])
        path = job.path(workdir)
        if found(job, workdir) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(result, indent=2) + "\n")


def is_good(result: dict[str, Any] | None) -> bool:
    """Whether a result is that of a job that ended well."""
    return result is not None and result.get("error") is None
