"""Compares log-det estimators by the noise of a likelihood, and by its time.

    python -m experiments.studies.evaluation [--workdir DIR] [--targets digits fashion_mnist] [--keys N] ...

For a fixed batch of test images it draws log p with many keys, without gradients, as an evaluation does. The standard
error of the mean is that of the batch's mean log p over the keys, in nats; that of one image is the root of the mean
variance. At equal cost a mean over n draws takes n times as long, so the last columns compare standard error times the
root of the time with that of the papers' training setting. Targets:

  digits          the flow of `python -m experiments.density digits_uniform`
  fashion_mnist   the flow of `python -m experiments.density fashion_mnist_small`; left out if its data are not found

Missing flows are trained first, under the work directory. Times are CPU seconds of this process. Writes evaluation.json
and prints a table. On one CPU core it takes 5 minutes, and some 10 more to train both flows.
"""

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx

from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache, use_xla_flags
from experiments.runs.tables import markdown_table
from experiments.runs.tasks.images import load
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.competitors import EVALUATION, TRAINING
from experiments.studies.parts.trained import NAMES, trained_flow, trained_runs
from resflow_jax import Defensive, Flow, Roulette
from resflow_jax.data.images import to_unit_interval
from resflow_jax.functional.checks import check_choice, check_count

Array = jax.Array

PAPERS = "papers, training: Poisson(2), 2 exact terms"
DEFAULT = "default: Roulette()"
ESTIMATORS: dict[str, Roulette] = {
    PAPERS: TRAINING,
    "papers, evaluation: Poisson(2), 20 exact terms": EVALUATION,
    "no exact terms, Rademacher probes": Roulette(Defensive(), exact_terms=0, probe="rademacher"),
    "1 exact term, then 1 of 4": Roulette(exact_terms=1, subsample=4),
    "2 exact terms, then 1 of 4": Roulette(exact_terms=2, subsample=4),
    DEFAULT: Roulette(),
    "default with 2 trace probes": Roulette(trace_probes=2),
    "default with 4 trace probes": Roulette(trace_probes=4),
    "8 exact terms": Roulette(exact_terms=8),
}


@dataclass(frozen=True)
class EvaluationStudyConfig:
    """One run of `python -m experiments.studies.evaluation`.

    Attributes:
      workdir: directory that everything is written to.
      targets: digits, fashion_mnist or both.
      keys: number of evaluations drawn for each estimator on the digits; a quarter of them on fashion_mnist.
      images: number of test images.
      digits: work directory of a run of `experiments.density digits_uniform`; by default it is trained under `workdir`.
      fashion_mnist: the same for fashion_mnist.
      seed: random seed of the keys.
      small: whether to use the flows of `--tiny`.
    """

    workdir: Path = Path("runs/evaluation_study")
    targets: tuple[Literal["digits", "fashion_mnist"], ...] = NAMES
    keys: int = 80
    images: int = 128
    digits: Path | None = None
    fashion_mnist: Path | None = None
    seed: int = 0
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        for target in self.targets:
            check_choice("targets", target, NAMES)
        check_count("keys", self.keys, 8)
        check_count("images", self.images, 2)
        check_count("seed", self.seed, 0)


class Noise(NamedTuple):
    """One estimator on one flow.

    Attributes:
      milliseconds: median CPU time of an evaluation of all images.
      mean: standard error of the mean log p over the images, in nats.
      one: standard error of the log p of one image, in nats.
    """

    milliseconds: float
    mean: float
    one: float


def tiny(config: EvaluationStudyConfig) -> EvaluationStudyConfig:
    """A few draws of a tiny flow of the digits."""
    directory = Path("runs/evaluation_study_tiny")
    return replace(config, workdir=directory, targets=("digits",), keys=8, images=8, small=True)


COMMAND = Command(
    "experiments.studies.evaluation",
    __doc__,
    EvaluationStudyConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("evaluation.json", *config.targets)),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(run, arguments)


def run(config: EvaluationStudyConfig) -> dict[str, dict[str, Noise]]:
    """Measures every estimator on every flow: {target: {estimator: noise}}."""
    use_compilation_cache()
    config.workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Noise]] = {}
    for name, flow, x, keys in find_targets(config):
        results[name] = {
            estimator: measure(flow, x, settings, keys, config.seed) for estimator, settings in ESTIMATORS.items()
        }
        print(f"\n{name}, {len(x)} test images\n\n{table(results[name])}", flush=True)
        serial = {name: {e: noise._asdict() for e, noise in rows.items()} for name, rows in results.items()}
        write_atomically(config.workdir / "evaluation.json", json.dumps(serial, indent=2) + "\n")
    return results


def find_targets(config: EvaluationStudyConfig) -> Iterator[tuple[str, Flow, Array, int]]:
    """Yields name, flow, images in [0, 1] and number of keys; each flow is trained only when it is needed."""
    given = {name: getattr(config, name) for name in NAMES}
    names = [name for name in NAMES if name in config.targets]
    for run_config in trained_runs(names, given, config.workdir, small=config.small):
        splits, name = load(run_config.data), run_config.data.name
        keys = config.keys if name == "digits" else max(config.keys // 4, 8)
        yield name, trained_flow(run_config), to_unit_interval(splits.test[: config.images], splits.levels), keys


def measure(flow: Flow, x: Array, estimator: Roulette, keys: int, seed: int) -> Noise:
    """Draws log p of all images with different keys."""
    graphdef, state = nnx.split(flow)

    @jax.jit
    def log_prob(state, x, key, estimator):
        return nnx.merge(graphdef, state).log_prob(x, key=key, estimator=estimator)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="length: .* infinite variance")  # of the papers' law
        jax.block_until_ready(log_prob(state, x, jax.random.key(seed), estimator))  # compiles before the timing starts
    values, seconds = [], []
    for key in jax.random.split(jax.random.key(seed), keys):
        began = time.process_time()
        values.append(np.asarray(log_prob(state, x, key, estimator), np.float64))
        seconds.append(time.process_time() - began)
    drawn = np.stack(values)
    mean, one = drawn.mean(axis=1).std(ddof=1), np.sqrt(drawn.var(axis=0, ddof=1).mean())
    return Noise(1e3 * float(np.median(seconds)), float(mean), float(one))


def table(rows: dict[str, Noise]) -> str:
    """A row for each estimator; the last columns say how many times smaller a standard error is at equal cost."""
    head = ["estimator", "ms", "mean log p, nats", "one log p, nats", "mean, at equal cost", "one, at equal cost"]
    papers = rows[PAPERS]
    cells = []
    for name, noise in rows.items():
        root = np.sqrt(papers.milliseconds / noise.milliseconds)
        gains = (root * papers.mean / noise.mean, root * papers.one / noise.one)
        cells.append([name, f"{noise.milliseconds:.3g}", f"{noise.mean:.3g}", f"{noise.one:.3g}"])
        cells[-1] += [f"{gain:.3g}" for gain in gains]
    return markdown_table(head, cells)


if __name__ == "__main__":
    main()
