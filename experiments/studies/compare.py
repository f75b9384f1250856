"""Compares residual flows with other flows under one budget of time on one core.

    python -m experiments.studies.compare [digits | fashion_mnist | diamonds | toy | 8gaussians | ...] [--minutes M]
        [--seeds N] [--models NAME ...] [--search-minutes S] [--parallel-runs P] [--workdir DIR] ...

trains every model N times under DIR/NAME/MODEL. `toy` stands for all eight toy densities. The models:

    residual                                        the residual flow of the shipped config of the data
    nice, real_nvp, glow, flow_pp, neural_spline    coupling flows, as `experiments.density --model`
    made, maf                                       autoregressive flows, of vectors
    ffjord                                          a continuous flow, with the extra `diffrax`
    zuko_nsf, zuko_maf                              outside witnesses with the extra `bench`, of flattened images too
    normflows_glow                                  another, of images

A run is one process on one core, with one thread. Its budget is CPU time of this process: on an idle core this is
wall-clock, and it does not count what other programs take. Building the flow, its initialisation on data and its
compilation count, without a cache of compiled programs; imports, reading of data, validation and evaluation do not.

All train alike: batches, clipping, Adam, and the moving average of the weights are those of the shipped config of the
data. The learning rate rises over the first twentieth of the time for updates, and falls to 0 as half a cosine at its
end. The averaged weights are validated twenty times. The best of them are scored, so a model that overfits is scored
at its best. For each model, a search comes first: the learning rate that ships, a third of it and three times it, and
with the best of them two other widths, each for S minutes of updates with seed 0, set-up not counted. The settings of
least validation loss are used with all seeds. The toy densities share one search, on the checkerboard. The test split
is read once, at the end of a run.

log p of the residual flow and of ffjord on images is an unbiased estimate, as in `experiments.density`. That of flow_pp
on images, and of the residual flow of the digits, is a lower bound, by a variational dequantisation. Failed and
diverged runs stay in the table; a process that cannot start ends the command.

It prints Markdown tables, and writes them as DIR/NAME/compare.json and samples.png. Finished jobs are JSON files, which
are only read: a command that was stopped goes on with what is missing. To repeat a job, remove its file. `--table-only`
makes tables and picture of what there is. `--results FILE` also keeps the figures of all data sets in one JSON file,
and the command goes on from the jobs in it. Those of other budgets, seeds or examples stay in the file. It leaves out
jobs whose model had another config then. Without this option, all is trained anew in an empty DIR.

On two cores all models take about 2 hours on the digits, 4 on diamonds and on the toy densities, 8 on fashion_mnist.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments.configs.base import DensityConfig
from experiments.runs.command import NamedCommand, Output
from experiments.runs.workdir import make_workdir, write_atomically
from experiments.studies.comparison.contenders import MODELS, gives_bound, lack, models_for
from experiments.studies.comparison.datasets import DEFAULTS, TABLE, config_of, names_in, searched_on
from experiments.studies.comparison.diamonds import RESOLUTIONS, load_diamonds
from experiments.studies.comparison.jobs import Job, found, restore
from experiments.studies.comparison.pictures import save_densities, save_image_rows
from experiments.studies.comparison.plan import Plan, fingerprint_of
from experiments.studies.comparison.running import cores, run_all
from experiments.studies.comparison.tables import NOTE, Results, compact, grid, search_table, summary, table
from resflow_jax.functional.checks import check_choice, check_count, check_positive


@dataclass(frozen=True)
class CompareConfig:
    """One run of `python -m experiments.studies.compare`.

    Attributes:
      data: name of the data set; "toy" for all toy densities.
      minutes: budget of a run.
      search_minutes: budget of a candidate of the search.
      seeds: number of random seeds, from 0 on, that every model is trained with.
      models: names of the models; by default all that the data allow, without those whose library is missing.
      workdir: directory that everything is written to, under the name of the data.
      parallel_runs: number of runs at a time, each on a core of its own; by default the number of cores.
      examples: maximum number of test examples; by default that of the config of the data.
      data_dir: directory of TensorFlow data sets, as `--data.dir` of `experiments.density`.
      table_only: whether to make tables and picture of what there is, without any run.
      results: a JSON file of all data sets that the figures are kept in besides, and whose jobs are not done again.
      small: whether to use the small runs of `--tiny`.
    """

    data: tyro.conf.Suppress[tyro.conf.Fixed[Literal[tuple(DEFAULTS)]]] = "digits"
    minutes: float = DEFAULTS["digits"].minutes
    search_minutes: float = DEFAULTS["digits"].search_minutes
    seeds: int = DEFAULTS["digits"].seeds
    models: tuple[str, ...] = ()
    workdir: Path = Path("runs/compare")
    parallel_runs: int | None = None
    examples: int | None = None
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
    table_only: bool = False
    results: Path | None = None
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("data", self.data, tuple(DEFAULTS))
        check_positive("minutes", self.minutes)
        check_positive("search_minutes", self.search_minutes)
        check_count("seeds", self.seeds, 1)
        if self.parallel_runs is not None:
            check_count("parallel_runs", self.parallel_runs, 1)
        if self.examples is not None:
            check_count("examples", self.examples, 2)
        if self.small and self.results is not None:
            raise ValueError(f"results: expected none with --tiny, got {self.results}")
        for model in self.models:
            check_choice("models", model, MODELS)
            if model not in self.allowed:
                kind = "images" if isinstance(config_of(self.names[0]), DensityConfig) else "vectors"
                raise ValueError(f"models: expected some of {', '.join(self.allowed)} for {kind}, got {model!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets."""
        return names_in(self.data)

    @property
    def allowed(self) -> tuple[str, ...]:
        """The models that the data allow."""
        return models_for(config_of(self.names[0]))

    def plans(self) -> list[Plan]:
        """A plan for each data set, with the models whose libraries are installed."""
        models = tuple(model for model in dict.fromkeys(self.models or self.allowed) if lack(model) is None)
        settings = {"seeds": self.seeds, "seconds": 60 * self.minutes, "search_seconds": 60 * self.search_minutes}
        settings |= {"examples": self.examples, "small": self.small}
        return [Plan(name, models, self.workdir, **settings) for name in self.names]


def tiny(config: CompareConfig) -> CompareConfig:
    """Two updates of one tiny model, with one candidate and one seed."""
    directory = Path("runs/compare_tiny")
    return replace(config, minutes=1e-6, search_minutes=1e-6, seeds=1, models=("nice",), workdir=directory, small=True)


def output(config: CompareConfig) -> Output:
    """The figures and the picture, and a directory for each model."""
    return Output(config.workdir / config.data, ("compare.json", "samples.png", "*/"))


COMMAND = NamedCommand(
    "experiments.studies.compare",
    __doc__,
    {name: CompareConfig(name, of.minutes, of.search_minutes, of.seeds) for name, of in DEFAULTS.items()},
    tiny,
    output,
    first="digits",
    summaries={name: of.summary for name, of in DEFAULTS.items()},
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: CompareConfig) -> dict[str, Any]:
    """Does what is missing, prints, draws; returns the content of compare.json."""
    plans = config.plans()
    if config.data == TABLE and not config.table_only:
        load_diamonds()  # raises before any job if the table is not there
    for model in config.models or config.allowed:
        if (lacking := lack(model)) is not None:
            print(f"skipped: {lacking}", flush=True)
    make_workdir(config.workdir / config.data)
    stored = _stored(config.results)
    kept = _kept(stored, config)
    plans_of_all = [
        replace(plan, models=tuple(dict.fromkeys((*kept.get(plan.data, ()), *plan.models)))) for plan in plans
    ]
    _restore(kept, plans_of_all, config.workdir)
    if not config.table_only:
        places = cores(config.parallel_runs)
        run_all(lambda: [job for plan in plans for job in plan.missing()], config.workdir, places, config.data_dir)
    results = {plan.data: plan.results() for plan in plans_of_all}
    _report(config, results)
    document = {
        name: {model: of | {"summary": summary(of["runs"])} for model, of in models.items()}
        for name, models in results.items()
    }
    write_atomically(config.workdir / config.data / "compare.json", json.dumps(document, indent=2) + "\n")
    if config.results is not None:
        config.results.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(config.results, json.dumps(_joined(stored, compact(results)), indent=1) + "\n")
    _draw(config)
    return document


def _stored(path: Path | None) -> dict[str, Results]:
    """The content of a file of `--results`; nothing if it is not there yet."""
    if path is None or not path.exists():
        return {}
    try:
        stored = dict(json.loads(path.read_text()))
        for result in _all_of(stored):
            Job(**result["job"])
        return stored
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"results: expected a file that this command has written, got {path}: {error}") from error


def _all_of(stored: dict[str, Results]) -> Iterator[dict[str, Any]]:
    for of in stored.values():
        for kinds in of.values():
            yield from itertools.chain(*kinds.values())


def _kept(stored: dict[str, Results], config: CompareConfig) -> dict[str, Results]:
    """The stored results whose models have the config of today."""
    kept: dict[str, Results] = {}
    for data, of in stored.items():
        kept[data] = {}
        for model, kinds in of.items():
            current = {kind: _current(data, model, results) for kind, results in kinds.items()}
            if any(current.values()):
                kept[data][model] = current
            elif data in config.names and any(kinds.values()):
                print(f"left out of {config.results}: {model} on {data}, which had another config", flush=True)
    return kept


def _restore(kept: dict[str, Results], plans: list[Plan], workdir: Path) -> None:
    """Writes the files of the stored jobs that the plans have; the candidates first, since they choose the runs."""
    results = {Job(**result["job"]): result for result in _all_of(kept)}
    restore((result for job, result in results.items() if job.is_search), workdir)
    runs = [job for plan in plans for model in plan.models for job in plan.runs(model)]
    restore((results[job] for job in runs if job in results), workdir)


def _joined(stored: dict[str, Results], results: dict[str, Results]) -> dict[str, Results]:
    """All that was stored, with new results in the place of those of the same jobs, and of earlier configs."""
    joined = dict(stored)
    for data, models in results.items():
        joined[data] = dict(stored.get(data, {}))
        for model, of in models.items():
            before = joined[data].get(model, {})
            both = {kind: _current(data, model, before.get(kind, ())) + new for kind, new in of.items()}
            by_job = {kind: {Job(**one["job"]): one for one in ones} for kind, ones in both.items()}
            joined[data][model] = {kind: list(of_job.values()) for kind, of_job in by_job.items()}
    return joined


def _current(data: str, model: str, results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a model with the config of today."""
    return [result for result in results if result["job"].get("config") == fingerprint_of(data, model)]


def _report(config: CompareConfig, found: dict[str, Results]) -> None:
    """Prints the tables."""
    of_images = isinstance(config_of(config.names[0]), DensityConfig)
    unit, sign = ("bits/dim", 1) if of_images else ("nats", -1)
    for name, results in found.items():
        bounds = {model for model in results if gives_bound(model, config_of(name))}
        print(f"\n{name}: {config.minutes:g} minutes a run\n\n{table(results, unit, sign, bounds)}")
    for name, results in {searched_on(name): results for name, results in found.items()}.items():
        print(f"\nSearch on {name}, {config.search_minutes:g} minutes a candidate:\n\n{search_table(results, unit)}")
    if len(found) > 1:
        print(f"\nTest log p in nats:\n\n{grid(found)}")
    print(f"\n{NOTE}", flush=True)


def _draw(config: CompareConfig) -> None:
    """Draws samples of the first finished run of each model."""
    rows: dict[str, dict[str, np.ndarray]] = {}
    for plan in config.plans():
        drawn = {}
        for model in plan.models:
            done = [job for job in plan.runs(model) if found(job, config.workdir) is not None]
            paths = [job.path(config.workdir).with_suffix(".npz") for job in done]
            there = [path for path in paths if path.exists()]
            if there:
                with np.load(there[0]) as arrays:
                    drawn.setdefault("data", arrays["data"])
                    drawn[model] = arrays["samples"]
        if drawn:
            rows[plan.data] = drawn
    path = config.workdir / config.data / "samples.png"
    if not rows:
        return
    if isinstance(config_of(config.names[0]), DensityConfig):
        save_image_rows(path, rows[config.data])
    elif config.data == TABLE:
        save_densities(path, rows, ((0, 3), (1, 2), (4, 6)), tuple(RESOLUTIONS))
    else:
        save_densities(path, rows)


if __name__ == "__main__":
    main()
