"""Estimators of the log-det: variance of the gradient times cost, side by side.

    python -m experiments.studies.estimators [--workdir DIR] [--targets synthetic digits fashion_mnist] [--keys N] ...

The figure of merit is the work-normalised variance: the trace of the covariance of the full parameter
gradient over the key, for one fixed batch, times the mean number of vjps of the series. It is measured twice:
by drawing keys, as a training run would meet it, and by drawing probes only and summing over the lengths
up to 24 with their probabilities, which shows the heavy tails that hundreds of draws miss. Targets:

  synthetic       linear contractions of 64 dimensions with chosen spectra, batches of 64
  digits          the default flow, trained by `python -m experiments.density`
  fashion_mnist   that of `python -m experiments.density fashion_mnist_small`; left out where the data are not found

The flows are trained first, under the work directory, unless they are there. Writes estimators.json and
estimators.png, and prints a table. On 2 CPU cores: about 40 minutes, and 15 more where the flows are to be
trained.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.flatten_util import ravel_pytree

from experiments.configs.base import DensityConfig
from experiments.runs import pictures
from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache
from experiments.runs.tasks.images import load
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.trained import NAMES, trained_flow, trained_runs
from resflow_jax import (
    Diagnostics,
    Estimator,
    Fitted,
    Geometric,
    Poisson,
    Roulette,
    certify,
    fit_lengths,
    residual,
)
from resflow_jax.data.batches import Batches
from resflow_jax.data.images import dequantize
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.training.parallel import STRATEGIES, Strategy

Array = jax.Array
Gradient = Callable[[Array, Estimator], tuple[Array, Diagnostics]]

PAPERS = "papers: power series, Poisson(2) + 2, Gaussian"
DEFAULT = "default: Roulette()"
FITTED = "default with fitted lengths"
REFERENCE = "no roulette: 40 terms (noise of the probes)"
TERMS = 24
ESTIMATORS: dict[str, Roulette] = {
    PAPERS: Roulette(Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian"),
    "power series, Geometric(0.5) + 2": Roulette(Geometric(0.5), exact_terms=2, minres_steps=0),
    "2 minimal-residual steps, then power series": Roulette(Geometric(0.5), exact_terms=2, minres_steps=2),
    "minimal residual, Geometric(0.5) + 2": Roulette(Geometric(0.5), exact_terms=2),
    DEFAULT: Roulette(),
    FITTED: Roulette(),
    "default, 2 probes": Roulette(probes=2),
    "default, 2 orthogonal probes": Roulette(probe="orthogonal", probes=2),
    REFERENCE: Roulette(Geometric(0.999), exact_terms=39),
}
TARGETS = ("synthetic", "digits", "fashion_mnist")


@dataclass(frozen=True)
class EstimatorsConfig:
    """One run of `python -m experiments.studies.estimators`.

    Attributes:
      workdir: where everything is written.
      targets: which of synthetic, digits and fashion_mnist.
      keys: gradients drawn for each estimator on a flow; 50 times as many on a synthetic contraction.
      probes: probes drawn where lengths are summed over.
      batch_size: examples of a batch; a quarter of them for fashion_mnist, whose gradients take long.
      digits: work directory of a run of `experiments.density digits`; by default trained under `workdir`.
      fashion_mnist: the same for fashion_mnist.
      seed: of batch, noise and keys.
      parallel: how steps are divided among devices where flows are trained, as in `experiments.density`.
      small: whether one spectrum, three estimators and flows as of `--tiny` are enough.
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


class Target(NamedTuple):
    """What gradients are drawn of.

    Attributes:
      name: for the table.
      gradient: (key, estimator) -> (flat gradient [P], diagnostics).
      keys: how many to draw.
      lipschitz: bound on that of its residual blocks.
      batch_size: examples that share a length.
    """

    name: str
    gradient: Gradient
    keys: int
    lipschitz: float
    batch_size: int


class Measurement(NamedTuple):
    """One estimator on one target.

    Attributes:
      variance: trace of the covariance of the gradient, over keys.
      variance_stderr: its standard error; meaningless, as the variance is, where the tail is heavy.
      summed: the same with all lengths up to 24 terms summed over, one length for all blocks; None if
        not computed.
      cost: mean vjps of the series, probes counted.
      work: variance * cost.
      kurtosis: of the gradient along random directions, on average; 3 for a normal law.
      milliseconds: median time of one gradient.
    """

    variance: float
    variance_stderr: float
    summed: float | None
    cost: float
    work: float
    kurtosis: float
    milliseconds: float


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
    pictures.save_bars(
        config.workdir / "estimators.png",
        relative,
        "variance of the gradient x cost, relative to the papers' estimator",
    )
    return results


def find_targets(config: EstimatorsConfig) -> Iterator[Target]:
    """The targets asked for; a flow is trained when its turn comes."""
    if "synthetic" in config.targets:
        yield from synthetic_targets(config)
    names = [name for name in NAMES if name in config.targets]
    for run_config in trained_runs(
        names, {name: getattr(config, name) for name in NAMES}, config.workdir, config.parallel, config.small
    ):
        batch_size = config.batch_size if run_config.data.name == "digits" else max(config.batch_size // 4, 2)
        yield flow_target(run_config, batch_size, config)


def spectra(dim: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Jacobians [D, D] of norm below one: {name: J}."""

    def symmetric(eigenvalues: np.ndarray) -> np.ndarray:
        q = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        return (q * eigenvalues) @ q.T

    def random(norm: float) -> np.ndarray:
        j = rng.normal(size=(dim, dim))
        return norm * j / np.linalg.norm(j, 2)

    return {
        "symmetric, spectrum in [-0.9, -0.1]": symmetric(np.linspace(-0.9, -0.1, dim)),
        "saturated, half of the spectrum at -0.98": symmetric(np.where(np.arange(dim) % 2, -0.98, 0.49)),
        "symmetric, spectrum in [-0.98, 0.98]": symmetric(np.linspace(-0.98, 0.98, dim)),
        "random, norm 0.9": random(0.9),
        "random, norm 0.3": random(0.3),
    }


def synthetic_targets(config: EstimatorsConfig) -> Iterator[Target]:
    """g(x) = J x with J as its parameter: the gradient of the mean log-det of a batch is that in J."""
    dim = 64
    chosen = spectra(dim, np.random.default_rng(config.seed)).items()
    for name, jacobian in islice(chosen, 1 if config.small else None):
        params, x = jnp.asarray(jacobian, float), jnp.zeros((config.batch_size, dim))
        lipschitz = float(np.linalg.norm(jacobian, 2)) * (1 + 1e-6)

        def gradient(
            key: Array, estimator: Estimator, params: Array = params, x: Array = x, lipschitz: float = lipschitz
        ):
            def loss(params):
                _, log_det, diagnostics = residual(
                    lambda j, x: x @ j.T,
                    params,
                    x,
                    key=key,
                    estimator=estimator,
                    lipschitz=lipschitz,
                    return_diagnostics=True,
                )
                return jnp.mean(log_det), diagnostics

            gradient, diagnostics = jax.grad(loss, has_aux=True)(params)
            return gradient.ravel(), diagnostics

        yield Target(name, gradient, 50 * config.keys, lipschitz, config.batch_size)


def flow_target(run_config: DensityConfig, batch_size: int, config: EstimatorsConfig) -> Target:
    """The mean log-density of a batch of training images under a trained flow, in all parameters."""
    data = load(run_config.data)
    flow = trained_flow(run_config)
    certificate = certify(flow)
    norms = certificate.norms
    print(
        f"{run_config.data.name}: layer norms {norms.min():.3f} to {norms.max():.3f}, median {np.median(norms):.3f} "
        f"(coefficient {run_config.model.coefficient})"
    )
    images = Batches(data.train, seed=config.seed, batch_size=batch_size)[0]
    x = dequantize(jnp.asarray(images), jax.random.key(config.seed), data.levels)
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)

    def gradient(key: Array, estimator: Estimator):
        def loss(params):
            flow = nnx.merge(graphdef, params, rest)
            log_prob, diagnostics = flow.log_prob(x, key=key, estimator=estimator, return_diagnostics=True)
            return jnp.mean(log_prob), diagnostics

        gradient, diagnostics = jax.grad(loss, has_aux=True)(params)
        return ravel_pytree(gradient)[0], diagnostics

    lipschitz = max(block.target_bound for block in certificate.blocks)
    return Target(f"{run_config.data.name} flow, batch {batch_size}", gradient, config.keys, lipschitz, batch_size)


def measure_all(target: Target, config: EstimatorsConfig) -> dict[str, Measurement]:
    """Every estimator on one target, the fitted one with what was learned from the default's term norms."""
    results: dict[str, Measurement] = {}
    moments: dict[tuple[int | None, str], tuple[np.ndarray, float]] = {}
    norms = None
    for name, estimator in ESTIMATORS.items():
        if config.small and name not in (PAPERS, DEFAULT, FITTED):
            continue
        if name == FITTED:
            estimator = dataclasses.replace(estimator, length=fit_lengths(norms, batch_size=target.batch_size))
        measured, found = measure(target, estimator, jax.random.key(config.seed))
        if name == DEFAULT:
            norms = found
        if estimator.probes == 1 and name not in (REFERENCE, FITTED):
            series = estimator.minres_steps, estimator.probe
            if series not in moments:
                moments[series] = length_moments(target, estimator, jax.random.key(config.seed + 1), config.probes)
            measured = measured._replace(summed=summed_variance(target, estimator, *moments[series]))
        results[name] = measured
    return results


def measure(target: Target, estimator: Roulette, key: Array) -> tuple[Measurement, Array]:
    """Draws gradients; the measurement, and the mean norms of the first terms."""
    draw = jax.jit(target.gradient)
    jax.block_until_ready(draw(key, estimator))  # compiled before the clock runs
    gradients, lengths, norms, seconds = [], [], [], []
    for subkey in jax.random.split(key, target.keys):
        began = time.perf_counter()
        gradient, diagnostics = jax.block_until_ready(draw(subkey, estimator))
        seconds.append(time.perf_counter() - began)
        gradients.append(np.asarray(gradient))
        lengths.append(np.mean(diagnostics.length))
        norms.append(diagnostics.term_norms)
    centred = np.stack(gradients)
    centred -= centred.mean(axis=0)
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
    )
    return measurement, jnp.mean(jnp.stack(norms), axis=0)


def length_moments(target: Target, estimator: Roulette, key: Array, probes: int) -> tuple[np.ndarray, float]:
    """What the variance under any law of lengths follows from: E<d_k, d_k + 2 sum_{j>k} d_j>, and |E d|^2.

    d_k is term k = 0..24 of the gradient's series, d their sum; the expectations are over the probes.
    """
    draw = jax.jit(target.gradient)
    terms = np.arange(1, TERMS + 2)
    moments, sums = [], []
    for subkey in jax.random.split(key, probes):
        gradients = []
        for number in range(TERMS + 1):  # a law that takes exactly `number` terms, without compiling anew
            length = Fitted(jnp.asarray(np.where(terms <= number, 1.0, 1e-30), float))
            cut = dataclasses.replace(estimator, length=length, exact_terms=0)
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
    """Fourth moment over squared second of the centred gradients [keys, P] along random directions."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(centred.shape[1], directions))
    along = centred @ signs.astype(centred.dtype)
    return float(np.mean((along**4).mean(axis=0) / (along**2).mean(axis=0) ** 2))


def print_table(name: str, rows: dict[str, Measurement]) -> None:
    """The measurements of one target; last, by how much less work than the papers' estimator each needs."""
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


if __name__ == "__main__":
    main()
