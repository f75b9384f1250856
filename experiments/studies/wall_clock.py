"""Bits/dim against wall-clock: this library, normflows and the authors' code.

    python -m experiments.studies.wall_clock [digits | fashion_mnist] [--minutes M] [--authors CHECKOUT]
        [--learning-rate R] [--runs NAME ...] [--workdir DIR] ...

trains residual flows one after the other, each in a process of its own, and judges each at 10 and 30 seconds, and at 1,
2, 5, 10 and 30 minutes, up to M. The runs:

    shipped    the config NAME of `experiments.density`, with its own learning rates
    papers     the config NAME_uniform in this library, with the estimator and the optimiser of the papers
    normflows  the flow of NAME_uniform in normflows, with the extra `bench`
    authors    the flow of NAME_uniform in the authors' PyTorch code, of which CHECKOUT is a copy

The last three have the papers' Adam with the constant learning rate R, without its warm-up of 1000 updates, which would
be most of such a run, and go on until the clock ends them. All have batches of 64.

The clock stands still while a flow is judged. For this library it starts with the process: imports, the reading of
data, initialisation and compilation count, without a cache of compiled programs. For PyTorch it starts with the first
update. Each code has all cores: this library as one JAX device for each, PyTorch by its threads.

A flow is judged by the same test images at each time, with averaged or with current weights, as 300 validation images
choose: averages over few updates are poor. Each code has its own unbiased estimator of evaluations. The dequantisation
of the shipped digits is variational, so that their figure is a bound. Choose settings by "validation" in the files.

It prints a Markdown table, and writes NAME/RUN.json for each run, and NAME/wall_clock.png. Finished runs are only read.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import tyro

from experiments.runs.command import NamedCommand, Output
from experiments.runs.pictures import save_figure
from experiments.runs.tables import markdown_table
from experiments.runs.workdir import make_workdir, write_atomically
from experiments.studies.parts.kept import kept
from experiments.studies.parts.wall_clock_run import PEERS, RUNS, Settings
from resflow_jax.functional.checks import check_choice, check_count, check_positive

SECONDS = (10, 30, 60, 120, 300, 600, 1800)
DATA = ("digits", "fashion_mnist")
TITLES = {
    "shipped": "as it ships",
    "papers": "the papers' settings",
    "normflows": "normflows",
    "authors": "the authors' code",
}


@dataclass(frozen=True)
class WallClockConfig:
    """One run of `python -m experiments.studies.wall_clock`.

    Attributes:
      data: name of the data set.
      minutes: length of a run.
      runs: names of the runs; by default all whose code is there.
      authors: directory with a copy of the authors' repository, rtqichen/residual-flows.
      learning_rate: that of all runs but "shipped".
      examples: number of test images.
      validated: number of validation images.
      workdir: directory that everything is written to, under the name of the data.
      data_dir: directory of TensorFlow data sets, as `--data.dir` of `experiments.density`.
      small: whether to use the small runs of `--tiny`.
    """

    data: tyro.conf.Suppress[tyro.conf.Fixed[Literal[DATA]]] = "digits"
    minutes: float = 30
    runs: tuple[str, ...] = ()
    authors: Path | None = None
    learning_rate: float = 1e-3
    examples: int = 1000
    validated: int = 300
    workdir: Path = Path("runs/wall_clock")
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("data", self.data, DATA)
        check_positive("minutes", self.minutes)
        check_positive("learning_rate", self.learning_rate)
        check_count("examples", self.examples, 2)
        check_count("validated", self.validated, 2)
        for name in self.runs:
            check_choice("runs", name, RUNS)
            if (lack := self._lack(name)) is not None:
                raise ValueError(f"runs: {lack}")
        if self.authors is not None and not (self.authors / "resflows").is_dir():
            raise ValueError(f"authors: expected a copy of rtqichen/residual-flows, got {self.authors}")

    def _lack(self, name: str) -> str | None:
        """What a run needs that is not there, in words."""
        if name in PEERS and (find_spec("normflows") is None or find_spec("torch") is None):
            return f"{name} needs torch and normflows: pip install resflow_jax[bench]"
        if name == "authors" and self.authors is None:
            return "authors needs a copy of rtqichen/residual-flows: --authors CHECKOUT"
        return None

    def settings(self) -> list[Settings]:
        """Those of each run."""
        until = 60 * self.minutes
        seconds = (*(second for second in SECONDS if second < until), until)
        common = {"learning_rate": self.learning_rate, "examples": self.examples, "validated": self.validated}
        common |= {"data_dir": self.data_dir, "small": self.small}
        names = self.runs or [name for name in RUNS if self._lack(name) is None]
        places = {name: str(self.authors.resolve()) if name == "authors" else None for name in names}
        return [Settings(self.data, name, seconds, authors=places[name], **common) for name in names]


def tiny(config: WallClockConfig) -> WallClockConfig:
    """Two updates of a tiny flow of this library."""
    directory = Path("runs/wall_clock_tiny")
    return replace(config, minutes=10, runs=("shipped",), examples=8, validated=8, workdir=directory, small=True)


COMMAND = NamedCommand(
    "experiments.studies.wall_clock",
    __doc__,
    {name: WallClockConfig(name) for name in DATA},
    tiny,
    lambda config: Output(config.workdir / config.data, ("*.json", "wall_clock.png")),
    first="digits",
    summaries={"digits": "The 8x8 digits of scikit-learn.", "fashion_mnist": "Fashion-MNIST, 28x28."},
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: WallClockConfig) -> dict[str, list[dict[str, Any]]]:
    """Does what is missing, prints and draws; returns the rows of each run."""
    directory = config.workdir / config.data
    make_workdir(directory)
    paths = {settings: directory / f"{settings.run}.json" for settings in config.settings()}
    found = {of.run: kept(path, {"settings": asdict(of)}, "rows") for of, path in paths.items()}
    for settings, path in paths.items():
        if found[settings.run] is None:
            found[settings.run] = _done(settings)
            document = {"settings": asdict(settings), "rows": found[settings.run]}
            write_atomically(path, json.dumps(document, indent=1) + "\n")
    print(f"\n{config.data}, test bits/dim:\n\n{table(found)}", flush=True)
    save_curves(directory / "wall_clock.png", found, config.data)
    return found


def _done(settings: Settings) -> list[dict[str, Any]]:
    """Does a run in a process of its own, and says how it goes."""
    command = [sys.executable, "-m", "experiments.studies.parts.wall_clock_run"]
    given = {"settings": asdict(settings), "began": time.time()}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write(json.dumps(given) + "\n")
        process.stdin.close()
        rows = []
        for line in process.stdout:
            rows.append(json.loads(line))
            print(f"{settings.run}, {_words(rows[-1])}", flush=True)
    if process.returncode:
        status = process.returncode
        raise RuntimeError(f"{settings.run}: expected a process that trains, got exit status {status}")
    return rows


def _words(row: Mapping[str, Any]) -> str:
    words = f"{row['elapsed']:.1f} s, {row['steps']} updates"
    return f"{words}: {row['test']:.3f} bits/dim ({row['weights']} weights)" if "test" in row else words


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: a line for each run, a column for each time, and the time of an update."""
    times = sorted({row["seconds"] for rows in found.values() for row in rows})
    head = ["", *(f"{time:g} s" if time < 60 else f"{time / 60:g} min" for time in times), "ms an update"]
    cells = []
    for name, rows in found.items():
        scores = {row["seconds"]: f"{row['test']:.3f}" if "test" in row else "-" for row in rows}
        ended = f"ended at {rows[-1]['elapsed']:.0f} s" if rows[-1]["ended"] else "-"
        cells.append([TITLES[name], *(scores.get(time, ended) for time in times), _pace(rows)])
    return markdown_table(head, cells)


def _pace(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of an update between the first time with updates and the last one."""
    first, last = next((row for row in rows if row["steps"]), rows[-1]), rows[-1]
    if last["steps"] == first["steps"]:
        return "-"
    return f"{1e3 * (last['elapsed'] - first['elapsed']) / (last['steps'] - first['steps']):.3g}"


def save_curves(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> None:
    """Draws bits/dim against wall-clock, with the standard error over test images."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run, rows in found.items():
        shown = [row for row in rows if "test" in row]
        x, y, error = ([row[what] for row in shown] for what in ("elapsed", "test", "stderr"))
        axis.errorbar(x, y, error, fmt="o-", ms=4, capsize=2, label=TITLES[run])
    axis.set(xscale="log", xlabel="wall-clock, s", ylabel="test bits/dim", title=name)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
