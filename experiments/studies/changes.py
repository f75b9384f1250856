"""What each change of the shipped settings brings, with error bars over seeds.

    python -m experiments.studies.changes [digits | fashion_mnist] [--seconds S] [--seeds 0 1 2] [--workdir DIR] ...
    python -m experiments.studies.changes [digits | fashion_mnist] --without 4 5 ...

trains the flow of NAME_uniform, then with one change more at a time, up to that of NAME, each with every seed. With
`--without` it trains the flow of NAME instead, and then the same without one change, for each of these numbers; change
1 is the first after NAME_uniform.

A run has S seconds of updates, in CPU time of one core, after its compilation. The learning rate rises in the first
twentieth of them, and falls along a cosine. The bits/dim are the least of four validations of averaged weights, on
images that are not trained on; the test split is not read. With a variational dequantisation they are a bound.

Every core does one run at a time. Finished runs are files, DIR/NAME/change0_seed0.json and so on, which are only read:
a command that was stopped goes on with what is missing. It prints a Markdown table of means with their standard errors
over seeds, and of the differences from the row above (with `--without`, from the first row), seed by seed. It writes
the results as DIR/NAME/changes.json, or without.json.

With three seeds there are 21 runs of the digits and 24 of fashion_mnist, of S seconds and some 40 of compilation and
validation each. That is 38 and 44 minutes on 2 cores, with the default S. With `--without` there are three runs for
each number, and three more.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments.runs.command import NamedCommand, Output
from experiments.runs.tables import markdown_table
from experiments.runs.workdir import make_workdir, write_atomically
from experiments.studies.comparison.contenders import hash_of
from experiments.studies.comparison.running import cores, environment
from experiments.studies.parts.change_run import Job
from experiments.studies.parts.config_changes import CHANGES
from experiments.studies.parts.kept import kept
from resflow_jax.functional.checks import check_choice, check_count, check_positive

DATA = tuple(CHANGES)
Runs = dict[str, list[dict[str, Any]]]  # the results of all seeds for each config, by its title


@dataclass(frozen=True)
class ChangesConfig:
    """One run of `python -m experiments.studies.changes`.

    Attributes:
      data: name of the data set.
      seconds: CPU time for the updates of a run.
      seeds: random seeds; each config is trained once with each.
      without: numbers of changes that are left out, one at a time. If empty, the changes are made one after the other.
      validated: maximum number of validation images.
      parallel_runs: number of runs at the same time, each on a core of its own; all cores by default.
      workdir: directory that everything is written to, under the name of the data.
      data_dir: directory of TensorFlow data sets, as `--data.dir` of `experiments.density`.
      small: whether to use the small runs of `--tiny`.
    """

    data: tyro.conf.Suppress[tyro.conf.Fixed[Literal[DATA]]] = "digits"
    seconds: float = 180
    seeds: tuple[int, ...] = (0, 1, 2)
    without: tuple[int, ...] = ()
    validated: int = 500
    parallel_runs: int | None = None
    workdir: Path = Path("runs/changes")
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("data", self.data, DATA)
        check_positive("seconds", self.seconds)
        check_count("validated", self.validated, 1)
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ValueError(f"seeds: expected two or more different numbers, got {self.seeds}")
        last = len(CHANGES[self.data])
        if len(set(self.without) & set(range(1, last + 1))) < len(self.without):
            raise ValueError(f"without: expected different numbers from 1 to {last}, got {self.without}")
        cores(self.parallel_runs)

    def jobs(self) -> dict[str, list[Job]]:
        """Those of all seeds for each config, by its title."""
        settings = {"seconds": self.seconds, "validated": self.validated, "data_dir": self.data_dir}
        last = len(CHANGES[self.data])
        if self.without:
            kinds = [(last, False), *((number, True) for number in self.without)]
        else:
            kinds = [(number, False) for number in ((0, 1) if self.small else range(last + 1))]
        found = {}
        for change, without in kinds:
            jobs = [Job(self.data, change, seed, small=self.small, without=without, **settings) for seed in self.seeds]
            found[f"`{self.data}`" if self.without and not without else jobs[0].variant().title] = jobs
        return found


def tiny(config: ChangesConfig) -> ChangesConfig:
    """Two updates of two tiny flows, with two seeds."""
    return replace(config, seconds=1e-6, seeds=(0, 1), validated=8, workdir=Path("runs/changes_tiny"), small=True)


COMMAND = NamedCommand(
    "experiments.studies.changes",
    __doc__,
    {name: ChangesConfig(name) for name in DATA},
    tiny,
    lambda config: Output(config.workdir / config.data, ("*.json",)),
    first="digits",
    summaries={"digits": "The 8x8 digits of scikit-learn.", "fashion_mnist": "Fashion-MNIST, 28x28."},
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: ChangesConfig) -> Runs:
    """Does what is missing, prints and writes the table, and returns the results."""
    directory = config.workdir / config.data
    make_workdir(directory)
    free: SimpleQueue[str] = SimpleQueue()
    places = cores(config.parallel_runs)
    for core in places:
        free.put(core)

    def result(job: Job) -> dict[str, Any]:
        path, found = directory / _name(job), finished[job]
        if found is None:
            core = free.get()
            try:
                found = _done(job, core)
            finally:
                free.put(core)
            write_atomically(path, json.dumps({**_settings(job), "result": found}, indent=1) + "\n")
            print(f"{path.stem}: {found['bits_per_dim']:.4f} bits/dim, {found['steps']} steps", flush=True)
        return found

    jobs = config.jobs()
    in_order = [job for of_config in jobs.values() for job in of_config]
    finished = {job: kept(directory / _name(job), _settings(job), "result") for job in in_order}
    with ThreadPoolExecutor(len(places)) as pool:
        results = pool.map(result, in_order)
        runs = {title: [next(results) for _ in of_config] for title, of_config in jobs.items()}
    name, against = ("without", "first") if config.without else ("changes", "above")
    write_atomically(directory / f"{name}.json", json.dumps(runs, indent=1) + "\n")
    print(f"\n{config.data}, validation bits/dim:\n\n{table(runs, against)}", flush=True)
    return runs


def _name(job: Job) -> str:
    return f"{'without' if job.without else 'change'}{job.change}_seed{job.seed}.json"


def _settings(job: Job) -> dict[str, Any]:
    """What the file of a job has beside its result."""
    return {"job": asdict(job), "config": fingerprint(job)}


def fingerprint(job: Job) -> str:
    """A hash of the config of a job: a file of another one is not its result."""
    return hash_of(replace(job.config(), workdir=Path()))


def _done(job: Job, core: str) -> dict[str, Any]:
    """Does a job in a process of its own."""
    command = [sys.executable, "-m", "experiments.studies.parts.change_run", core]
    options = {"env": environment(), "capture_output": True, "text": True}
    process = subprocess.run(command, input=json.dumps(asdict(job)) + "\n", **options)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise RuntimeError(f"{Path(_name(job)).stem}: expected a process that trains, got: {last}")
    return json.loads(process.stdout)


def table(runs: Runs, against: Literal["above", "first"]) -> str:
    """A Markdown table with a line for each config, and its difference from the line above or from the first."""
    rows, other = [], None
    for title, of_config in runs.items():
        bits = np.array([result["bits_per_dim"] for result in of_config])
        steps = np.mean([result["steps"] for result in of_config])
        rows.append([title, f"{steps:.0f}", _mean(bits), "" if other is None else _mean(bits - other)])
        other = bits if against == "above" or other is None else other
    first = "change, after those above" if against == "above" else "config"
    return markdown_table([first, "steps", "bits/dim", "difference, seed by seed"], rows)


def _mean(values: np.ndarray) -> str:
    """The mean with its standard error."""
    return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
