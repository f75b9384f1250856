"""Compares log-det estimators by the variance of the gradient times its cost.

    python -m experiments.studies.estimators [--workdir DIR] [--targets synthetic digits fashion_mnist] [--keys N] ...

The figure of merit is the work-normalised variance: the trace of the covariance over keys of the full parameter
gradient, for one fixed batch, times the mean number of vjps of the series. It is measured in two ways: by drawing keys,
as a training run does, and by drawing only probes and summing over the lengths up to 24 with their probabilities. The
sum shows heavy tails that hundreds of draws miss; it is for estimators that take all examples alike. Besides, it
prints variance times time in four senses: of the whole gradient, of the gradient along its mean, of the mean log p of
the batch, and of log p of one example. Targets:

  synthetic       linear contractions of 64 dimensions with chosen spectra, batches of 64
  digits          the flow of `python -m experiments.density digits_uniform`
  fashion_mnist   the flow of `python -m experiments.density fashion_mnist_small`; left out if its data are not found

Missing flows are trained first, under the work directory. Writes estimators.json and estimators.png, and prints a
table. It takes about an hour on 2 CPU cores, and 15 more to train the flows.
"""

import dataclasses
import json
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache
from experiments.runs.pictures import save_figure
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.competitors import TRAINING
from experiments.studies.parts.estimator_targets import Target, flow_target, synthetic_targets
from experiments.studies.parts.trained import NAMES, trained_runs
from resflow_jax import Defensive, Fitted, Geometric, LengthLaw, Roulette
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.estimators import Probe, fit_law, subsampling
from resflow_jax.training.parallel import STRATEGIES, Strategy

Array = jax.Array

PAPERS = "papers: power series, Poisson(2) + 2, Gaussian"
PLAIN = "no exact terms, Rademacher probes"
DEFAULT = "default: Roulette()"
FITTED = {"no exact terms, fitted lengths": PLAIN, "default with fitted lengths": DEFAULT}
REFERENCE = "40 exact terms (noise of the probes)"
TERMS = 24


def _whole_batch(length: LengthLaw, exact_terms: int = 0, probe: Probe = "rademacher", **options) -> Roulette:
    """A roulette all of whose examples have all terms, by default with Rademacher probes."""
    return Roulette(length, exact_terms, probe=probe, subsample=1, **options)


ESTIMATORS: dict[str, Roulette] = {
    PAPERS: TRAINING,
    "power series, Geometric(0.5) + 2": _whole_batch(Geometric(0.5), exact_terms=2, minres_steps=0),
    "2 minimal-residual steps, then power series": _whole_batch(Geometric(0.5), exact_terms=2, minres_steps=2),
    "minimal residual, Geometric(0.5) + 2": _whole_batch(Geometric(0.5), exact_terms=2),
    PLAIN: _whole_batch(Defensive()),
    "no exact terms, fitted lengths": _whole_batch(Defensive()),
    "no exact terms, 2 probes": _whole_batch(Defensive(), probes=2),
    "no exact terms, 2 orthogonal probes": _whole_batch(Defensive(), probe="orthogonal", probes=2),
    "no exact terms, Hadamard probes": _whole_batch(Defensive(), probe="hadamard"),
    "1 exact term, then 1 of 4": Roulette(exact_terms=1, subsample=4),
    "2 exact terms, then 1 of 4": Roulette(exact_terms=2, subsample=4),
    "3 exact terms, then 1 of 4": Roulette(exact_terms=3, subsample=4),
    "3 exact terms, then all": Roulette(exact_terms=3, subsample=1),
    DEFAULT: Roulette(),
    "default with 2 trace probes": Roulette(trace_probes=2),
    "default with 4 trace probes": Roulette(trace_probes=4),
    "default with fitted lengths": Roulette(),
    REFERENCE: _whole_batch(Geometric(0.5), exact_terms=40),
}
TARGETS = ("synthetic", "digits", "fashion_mnist")
# The variances that a user can notice, as fields of a measurement, and their heads in the table.
SENSES = {
    "variance": "  whole gradient",
    "along_mean": "  along its mean",
    "mean_value": "  mean of a batch",
    "one_value": "  of one example",
}


@dataclass(frozen=True)
class EstimatorsConfig:
    """One run of `python -m experiments.studies.estimators`.

    Attributes:
      workdir: directory that everything is written to.
      targets: any of synthetic, digits and fashion_mnist.
      keys: number of gradients drawn for each estimator on a flow; 50 times as many on a synthetic contraction.
      probes: number of probes drawn for the sum over lengths.
      batch_size: examples per batch; a quarter of them for fashion_mnist, whose gradients are slow.
      digits: work directory of a run of `experiments.density digits_uniform`; by default it is trained under `workdir`.
      fashion_mnist: the same for fashion_mnist.
      seed: random seed of batch, noise and keys.
      parallel: how training steps are divided among devices, as in `experiments.density`.
      small: whether to use only one spectrum, five estimators and the flows of `--tiny`.
    """

    workdir: Path = Path("runs/estimators")
    targets: tuple[Literal["synthetic", "digits", "fashion_mnist"], ...] = TARGETS
    keys: int = 200
    probes: int = 8
    batch_size: int = 64
    digits: Path | None = None
    fashion_mnist: Path | None = None
    seed: int = 0
    parallel: Strategy = "jit"
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("parallel", self.parallel, STRATEGIES)
        for target in self.targets:
            check_choice("targets", target, TARGETS)
        check_count("keys", self.keys, 20)
        check_count("probes", self.probes, 2)
        check_count("batch_size", self.batch_size, 2)
        check_count("seed", self.seed, 0)


def tiny(config: EstimatorsConfig) -> EstimatorsConfig:
    """One spectrum and a tiny flow of the digits."""
    return dataclasses.replace(
        config,
        workdir=Path("runs/estimators_tiny"),
        targets=("synthetic", "digits"),
        keys=20,
        probes=2,
        batch_size=4,
        small=True,
    )


COMMAND = Command(
    "experiments.studies.estimators",
    __doc__,
    EstimatorsConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("estimators.json", "estimators.png", *config.targets)),
)


class Measurement(NamedTuple):
    """One estimator on one target.

    Attributes:
      variance: trace of the covariance of the gradient, over keys.
      variance_stderr: standard error of `variance`; both are meaningless if the tail is heavy.
      summed: the variance by a sum over all lengths up to 24 terms, one length for all blocks; None if not computed.
      cost: mean number of vjps of the series, summed over probes.
      work: variance * cost.
      kurtosis: mean kurtosis of the gradient along random directions; 3 for a normal distribution.
      milliseconds: median time of one gradient.
      along_mean: variance of the gradient along its mean, the direction that all examples have in common.
      mean_value: variance of the batch's mean of log p or of the log-det.
      one_value: variance of log p or of the log-det of one example, averaged over the batch.
    """

    variance: float
    variance_stderr: float
    summed: float | None
    cost: float
    work: float
    kurtosis: float
    milliseconds: float
    along_mean: float
    mean_value: float
    one_value: float


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: EstimatorsConfig) -> dict[str, dict[str, Measurement]]:
    """Measures every estimator on every target: {target: {estimator: measurement}}."""
    use_compilation_cache()
    config.workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Measurement]] = {}
    for target in find_targets(config):
        results[target.name] = measure_all(target, config)
        print_table(target.name, results[target.name])
        serial = {name: {e: m._asdict() for e, m in rows.items()} for name, rows in results.items()}
        write_atomically(config.workdir / "estimators.json", json.dumps(serial, indent=2) + "\n")
    relative = {
        name: {e: m.work / rows[PAPERS].work for e, m in rows.items() if e != REFERENCE}
        for name, rows in results.items()
    }
    _save_bars(
        config.workdir / "estimators.png",
        relative,
        "variance of the gradient x cost, relative to the papers' estimator",
    )
    return results


def find_targets(config: EstimatorsConfig) -> Iterator[Target]:
    """The targets of the config; each flow is trained only when it is needed."""
    if "synthetic" in config.targets:
        yield from synthetic_targets(config.batch_size, 50 * config.keys, config.seed, 1 if config.small else None)
    names = [name for name in NAMES if name in config.targets]
    for run_config in trained_runs(
        names, {name: getattr(config, name) for name in NAMES}, config.workdir, config.parallel, config.small
    ):
        batch_size = config.batch_size if run_config.data.name == "digits" else max(config.batch_size // 4, 2)
        yield flow_target(run_config, batch_size, config.keys, config.seed)


def measure_all(target: Target, config: EstimatorsConfig) -> dict[str, Measurement]:
    """Measures every estimator on one target; lengths are fitted to the norms of the terms of another one."""
    results: dict[str, Measurement] = {}
    moments: dict[tuple[int | None, str], tuple[np.ndarray, float]] = {}
    norms: dict[str, Array] = {}
    for name, estimator in ESTIMATORS.items():
        if config.small and name not in (PAPERS, DEFAULT, *FITTED, *FITTED.values()):
            continue
        if name in FITTED:
            law = fit_law(estimator, norms[FITTED[name]], target.batch_size)
            estimator = dataclasses.replace(estimator, length=law)
        measured, norms[name] = measure(target, estimator, jax.random.key(config.seed))
        if estimator.probes == subsampling(estimator) == 1 and name not in (REFERENCE, *FITTED):
            series = estimator.minres_steps, estimator.probe
            if series not in moments:
                moments[series] = length_moments(target, estimator, jax.random.key(config.seed + 1), config.probes)
            measured = measured._replace(summed=summed_variance(target, estimator, *moments[series]))
        results[name] = measured
    return results


def measure(target: Target, estimator: Roulette, key: Array) -> tuple[Measurement, Array]:
    """Draws gradients; returns the measurement, and the mean norms of the first terms."""
    draw = jax.jit(target.gradient)
    jax.block_until_ready(draw(key, estimator))  # compiles before the timing starts
    gradients, values, lengths, norms, seconds = [], [], [], [], []
    for subkey in jax.random.split(key, target.keys):
        began = time.perf_counter()
        gradient, value, diagnostics = jax.block_until_ready(draw(subkey, estimator))
        seconds.append(time.perf_counter() - began)
        gradients.append(np.asarray(gradient))
        values.append(np.asarray(value, np.float64))
        lengths.append(np.mean(diagnostics.length))
        norms.append(diagnostics.term_norms)
    centred = np.stack(gradients)
    mean = centred.mean(axis=0)
    centred -= mean
    squares = np.square(centred).sum(axis=1, dtype=np.float64) * target.keys / (target.keys - 1)
    cost = float(np.mean(lengths)) * estimator.probes
    measurement = Measurement(
        variance=float(squares.mean()),
        variance_stderr=float(squares.std() / np.sqrt(target.keys)),
        summed=None,
        cost=cost,
        work=float(squares.mean()) * cost,
        kurtosis=mean_kurtosis(centred),
        milliseconds=1e3 * float(np.median(seconds)),
        along_mean=float(np.var(centred @ (mean / np.linalg.norm(mean)), ddof=1)),
        mean_value=float(np.var(np.mean(values, axis=1), ddof=1)),
        one_value=float(np.var(values, axis=0, ddof=1).mean()),
    )
    return measurement, jnp.mean(jnp.stack(norms), axis=0)


def length_moments(target: Target, estimator: Roulette, key: Array, probes: int) -> tuple[np.ndarray, float]:
    """The moments E<d_k, d_k + 2 sum_{j>k} d_j> and |E d|^2, which give the variance under any length distribution.

    d_k is term k = 0..24 of the gradient's series, and d is their sum; expectations are over the probes.
    """
    draw = jax.jit(target.gradient)
    terms = np.arange(1, TERMS + 2)
    moments, sums = [], []
    for subkey in jax.random.split(key, probes):
        gradients = []
        for number in range(TERMS + 1):  # this law gives exactly `number` terms without recompilation
            length = Fitted(jnp.asarray(np.where(terms <= number, 1.0, 1e-30), float))
            cut = dataclasses.replace(estimator, length=length, exact_terms=0, trace_probes=0)
            gradients.append(np.asarray(draw(subkey, cut)[0], np.float64))
        total = gradients[-1]
        tails = np.square([total, *(total - g for g in gradients)]).sum(axis=1)
        moments.append(tails[:-1] - tails[1:])
        sums.append(total)
    mean, each = np.sum(sums, axis=0), np.square(sums).sum()
    return np.mean(moments, axis=0), float((mean @ mean - each) / (probes * (probes - 1)))


def summed_variance(target: Target, estimator: Roulette, moments: np.ndarray, mean_square: float) -> float:
    """The variance over probes and lengths up to 24: sum_k moments_k / P(N >= k - m) - |mean|^2."""
    survival = estimator.length.within(target.lipschitz).survival(np.arange(TERMS + 1) - estimator.exact_terms)
    return float(np.sum(moments / np.asarray(survival, np.float64)) - mean_square)


def mean_kurtosis(centred: np.ndarray, directions: int = 64) -> float:
    """Mean kurtosis of the centred gradients [keys, P] along random directions: fourth moment over squared second."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(centred.shape[1], directions))
    along = centred @ signs.astype(centred.dtype)
    return float(np.mean((along**4).mean(axis=0) / (along**2).mean(axis=0) ** 2))


def print_table(name: str, rows: dict[str, Measurement]) -> None:
    """Prints the measurements of one target; the last columns divide the work of the papers' estimator by each work."""
    width = max(map(len, ESTIMATORS))
    columns = {"variance": 22, "all lengths": 13, "cost": 7, "kurtosis": 10, "ms": 8, "work": 11, "gain": 9}
    head = "".join(f"{column:>{size}}" for column, size in columns.items()) + f"{'all lengths':>13}"
    print(f"\n{name}\n{'':<{width}}{head}")
    papers = rows[PAPERS]
    for estimator, m in rows.items():
        variance = f"{m.variance:.4g} +- {m.variance_stderr:.2g}"
        summed = "" if m.summed is None else f"{m.summed:.4g}"
        summed_gain = "" if m.summed is None else f"{papers.summed * papers.cost / (m.summed * m.cost):.3g}"
        print(
            f"{estimator:<{width}}{variance:>22}{summed:>13}{m.cost:>7.2f}{m.kurtosis:>10.1f}{m.milliseconds:>8.1f}"
            f"{m.work:>11.4g}{papers.work / m.work:>9.3g}{summed_gain:>13}"
        )
    print(f"\nvariance times time, how many times smaller than the papers'\n{'':<{width}}" + "".join(SENSES.values()))
    for estimator, m in rows.items():
        cells = (f"{_gain(papers, m, sense):>{len(head)}.3g}" for sense, head in SENSES.items())
        print(f"{estimator:<{width}}" + "".join(cells))


def _gain(papers: Measurement, m: Measurement, sense: str) -> float:
    """How many times smaller a variance times the time of a gradient is than that of the papers' estimator."""
    work = getattr(m, sense) * m.milliseconds
    return getattr(papers, sense) * papers.milliseconds / work if work else float("inf")


def _save_bars(path: Path, values: dict[str, dict[str, float]], title: str) -> None:
    """Draws {group: {name: value}} as one panel of horizontal bars per group, on a common logarithmic axis.

    The axis begins at 1e-3, or at the least value if that is larger. There are at most five panels in a row.
    """
    found = [value for bars in values.values() for value in bars.values()]
    columns = min(len(values), 5)
    rows = -(-len(values) // columns)
    size = 3 + 2.6 * columns, 4.2 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(values) :]:
        axis.set_visible(False)
    for number, (group, bars) in enumerate(values.items()):
        axis, names = axes.flat[number], list(bars)
        axis.barh(names, list(bars.values()), color=[f"C{n}" for n in range(len(names))])
        axis.set_xscale("log")
        axis.set_xlim(max(min(found) / 2, 1e-3), 2 * max(found))
        axis.axvline(1, color="black", lw=0.8)
        axis.invert_yaxis()
        axis.set_title(textwrap.fill(group, 24), fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", labelleft=number % columns == 0)
    figure.suptitle(title)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
