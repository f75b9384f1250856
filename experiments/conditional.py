"""Conditional residual flows: inference with simulators whose posterior is known, and digits by their class.

    python -m experiments.conditional [--workdir DIR] [--steps N] [--digits.steps N] [--observations N] ...

For two moons and a Gaussian linear model (`experiments.simulators`) a flow learns q(theta | x) for all x at once, from
simulated pairs alone. Beside it, for the same time on the clock, trains flowjax's conditional flow, a masked
autoregressive one of rational-quadratic splines (`experiments.amortised`); without the extra flowjax it is left out.
Both are compared with the exact posterior: by the mean -log q(theta | x) of new pairs, whose least value is that of
the posterior itself, and by a classifier two-sample test (C2ST, 0.5 is best) at several observations. On the 8x8
digits a flow conditioned on the class trains beside one that is not (`experiments.classes`).

Under the work directory (runs/conditional) it writes two_moons.png and gaussian_linear.png (samples of the truth and of
the flows at every observation), digits.png (samples, a row a class), metrics.jsonl and config.json; the same command
again starts anew. `--help` lists every setting.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import tyro

from experiments import classes, pictures
from experiments.amortised import (
    FlowjaxConfig,
    FlowjaxLearner,
    Learner,
    ResidualLearner,
    Standardised,
    has_flowjax,
    take_turns,
)
from experiments.c2st import c2st
from experiments.classes import DigitsConfig
from experiments.configs.base import OptimizerConfig
from experiments.plane import ESTIMATORS
from experiments.run import MetricsFile, claim_workdir, print_table, use_compilation_cache, use_xla_flags
from experiments.simulators import GaussianLinear, Simulator, TwoMoons
from resflow_jax import Certificate, VectorFlowConfig, certify
from resflow_jax.functional.checks import check_choice, check_count

TRUTH = "exact posterior"

_MODEL = VectorFlowConfig(2, hidden=(32, 32), activation="elu", coefficient=0.97, condition_dim=2)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How the posterior of one simulator is learned.

    Attributes:
      simulator: which.
      model: the flow; its `condition_dim` is the number of elements of x.
      steps: optimiser steps of the residual flow; 0 leaves the task out.
      estimator: of the log-det in the loss.
      flowjax: the peer.
    """

    simulator: Simulator
    model: VectorFlowConfig
    steps: int = 3000
    estimator: Literal["exact", "roulette"]
    flowjax: FlowjaxConfig = FlowjaxConfig()

    def __post_init__(self):
        check_count("steps", self.steps, 0)
        check_choice("estimator", self.estimator, tuple(ESTIMATORS))
        for name, expected in (("dim", self.simulator.dim), ("condition_dim", self.simulator.x_dim)):
            if getattr(self.model, name) != expected:
                raise ValueError(
                    f"model.{name}: expected {expected}, that of {type(self.simulator).__name__}, got "
                    f"{getattr(self.model, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class TwoMoonsConfig(TaskConfig):
    """Two moons; see `TaskConfig`."""

    simulator: TwoMoons = TwoMoons()
    model: VectorFlowConfig = replace(_MODEL, blocks=16)
    estimator: Literal["exact", "roulette"] = "exact"


@dataclass(frozen=True, kw_only=True)
class GaussianLinearConfig(TaskConfig):
    """The Gaussian linear model; see `TaskConfig`."""

    simulator: GaussianLinear = GaussianLinear()
    model: VectorFlowConfig = replace(_MODEL, dim=10, condition_dim=10, blocks=4)
    estimator: Literal["exact", "roulette"] = "roulette"
    flowjax: FlowjaxConfig = FlowjaxConfig(learning_rate=5e-3)


@dataclass(frozen=True)
class ConditionalConfig:
    """One run of `python -m experiments.conditional`.

    Attributes:
      workdir: where everything is written.
      seed: of parameters, simulations and noise.
      batch_size: simulated pairs a step.
      simulations: pairs in all, for a fixed budget; None for new ones at every step.
      optimizer: learning rate of the residual flows; warm-up, clipping and decay of all.
      two_moons, gaussian_linear: the tasks.
      digits: the flows on digits.
      observations: values of x at which posteriors are compared.
      samples: of every posterior, for the comparison.
      pairs: new pairs for the mean log-density.
      log_every: steps between training lines of metrics.jsonl, and between turns.
    """

    workdir: Path = Path("runs/conditional")
    seed: int = 0
    batch_size: int = 256
    simulations: int | None = None
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-2, warmup=200)
    two_moons: TwoMoonsConfig = TwoMoonsConfig()
    gaussian_linear: GaussianLinearConfig = GaussianLinearConfig()
    digits: DigitsConfig = DigitsConfig()
    observations: int = 4
    samples: int = 1500
    pairs: int = 2000
    log_every: int = 50

    def __post_init__(self):
        for name, least in (
            ("seed", 0),
            ("batch_size", 2),
            ("observations", 2),
            ("samples", 10),
            ("pairs", 2),
            ("log_every", 1),
        ):
            check_count(name, getattr(self, name), least)
        if self.simulations is not None:
            check_count("simulations", self.simulations, 2)


class Fit(NamedTuple):
    """How well a flow does a task.

    Attributes:
      nll: mean of -log q(theta | x) over new pairs, in nats of theta.
      nll_stderr: its standard error.
      excess: mean of log p(theta | x) - log q(theta | x) over the same pairs: the mean over x of KL(p || q).
      excess_stderr: its standard error.
      c2st: at each observation.
      normal_kl: for a normal posterior, mean over observations of KL(q || p) with a normal distribution fitted to
        samples of q; None for others.
      steps: of training.
      seconds: of training, without the first step.
      first_step: seconds of the first step, with its compilation.
    """

    nll: float
    nll_stderr: float
    excess: float
    excess_stderr: float
    c2st: list[float]
    normal_kl: float | None
    steps: int
    seconds: float
    first_step: float


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    run(tyro.cli(ConditionalConfig, args=arguments, prog="python -m experiments.conditional", description=__doc__))


def run(config: ConditionalConfig) -> dict[str, dict]:
    """Does every part. Returns {task: {flow: `Fit`}} and {"digits": {flow: `Scores`}}."""
    began = time.perf_counter()
    use_compilation_cache()
    claim_workdir(config.workdir, config)
    metrics = MetricsFile(config.workdir / "metrics.jsonl", keep_until=0)
    results = {}
    for name, title in (("two_moons", "two moons"), ("gaussian_linear", "Gaussian linear")):
        if getattr(config, name).steps:
            results[name] = infer(config, name, title, metrics)
    if config.digits.steps:
        results["digits"] = learn_digits(config, metrics)
    if not has_flowjax():
        print("flowjax is not installed: its flow is left out")
    print_table({"time in all": f"{time.perf_counter() - began:.0f} s", "written to": str(config.workdir)})
    return results


def infer(config: ConditionalConfig, name: str, title: str, metrics: MetricsFile) -> dict[str, Fit]:
    """Trains the flows of one task, compares them with the truth, draws, prints."""
    settings: TaskConfig = getattr(config, name)
    rng = np.random.default_rng((config.seed, 0))
    task = Standardised.of(settings.simulator, rng, config.simulations)
    first = task.pairs(rng, 2000)
    learners: list[Learner] = [
        ResidualLearner(settings.model, config.optimizer, ESTIMATORS[settings.estimator], first, config.seed)
    ]
    rates = [config.optimizer.learning_rate, settings.flowjax.learning_rate]
    if has_flowjax():
        learners.append(FlowjaxLearner(settings.flowjax, config.optimizer, first, config.seed))
    for turn in take_turns(
        learners,
        task,
        rates[: len(learners)],
        config.optimizer,
        steps=settings.steps,
        batch_size=config.batch_size,
        every=config.log_every,
        seed=config.seed,
    ):
        for learner, loss in turn.losses.items():
            metrics.write(
                task=name,
                flow=learner,
                step=turn.steps[learner],
                split="train",
                nll=loss - task.log_det,
                seconds=turn.seconds[learner],
            )

    theta = settings.simulator.prior(rng, config.pairs)
    x = settings.simulator.simulate(rng, theta)
    observed = settings.simulator.simulate(rng, settings.simulator.prior(rng, config.observations))
    samples = {TRUTH: [settings.simulator.posterior(rng, config.samples, one) for one in observed]}
    reference = [settings.simulator.posterior(rng, config.samples, one) for one in observed]
    truth = settings.simulator.posterior_log_prob(theta, x)
    scores = [c2st(*pair, seed=config.seed) for pair in zip(reference, samples[TRUTH], strict=True)]
    fits = {TRUTH: Fit(-truth.mean(), _stderr(truth), 0.0, 0.0, scores, None, 0, 0.0, 0.0)}
    for learner in learners:
        found = [draw(learner, task, one, config.samples, config.seed + n) for n, one in enumerate(observed)]
        samples[learner.name] = found
        log_prob = learner.log_prob(*task.standardise(theta, x)).astype(np.float64) + task.log_det
        fits[learner.name] = Fit(
            nll=-float(log_prob.mean()),
            nll_stderr=_stderr(log_prob),
            excess=float(np.mean(truth - log_prob)),
            excess_stderr=_stderr(truth - log_prob),
            c2st=[c2st(*pair, seed=config.seed) for pair in zip(reference, found, strict=True)],
            normal_kl=normal_kl(settings.simulator, found, observed),
            steps=learner.steps,
            seconds=learner.seconds,
            first_step=learner.first_step,
        )
    for flow, fit in fits.items():
        metrics.write(task=name, flow=flow, step=fit.steps, split="test", **fit._asdict())
    pictures.save_posteriors(config.workdir / f"{name}.png", samples, observed, title, circle_of(settings.simulator))
    print_fits(title, fits, config, certify(learners[0].flow))
    return fits


def draw(learner: Learner, task: Standardised, x: np.ndarray, number: int, seed: int) -> np.ndarray:
    """theta [number, D] from q(theta | x), in its own units."""
    _, x = task.standardise(task.moments[0][0], x)
    return task.theta(learner.sample(jax.random.key(seed), number, x))


def normal_kl(simulator: Simulator, samples: list[np.ndarray], observed: np.ndarray) -> float | None:
    """Mean over observations of KL(N(m, S) || posterior) in nats, m and S the moments of samples [N, D].

    KL = 1/2 (tr S / s - D + |m - mean|^2 / s + D log s - log|S|) for the posterior N(mean, s I). With N exact samples
    it is about D (D + 3) / 4N. None for a posterior that is not normal.
    """
    if not isinstance(simulator, GaussianLinear):
        return None
    s, dim = simulator.posterior_variance, simulator.dim
    divergences = []
    for theta, x in zip(samples, observed, strict=True):
        covariance = np.cov(theta, rowvar=False)
        away = np.sum((theta.mean(axis=0) - simulator.posterior_mean(x)) ** 2)
        log_det = np.linalg.slogdet(covariance)[1]
        divergences.append(0.5 * ((np.trace(covariance) + away) / s - dim + dim * math.log(s) - log_det))
    return float(np.mean(divergences))


def circle_of(simulator: Simulator) -> Callable[[np.ndarray], tuple[np.ndarray, float]] | None:
    """From x to the centre and the radius of the circle that holds 95 % of two elements of theta; None if unknown."""
    if not isinstance(simulator, GaussianLinear):
        return None
    radius = math.sqrt(-2 * math.log(0.05) * simulator.posterior_variance)
    return lambda x: (simulator.posterior_mean(x)[:2], radius)


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def print_fits(title: str, fits: dict[str, Fit], config: ConditionalConfig, certificate: Certificate) -> None:
    """A table, a column a flow."""
    rows = {
        title: list(fits),
        "-log q(theta | x)": [f"{fit.nll:.3f} +- {fit.nll_stderr:.3f} nats" for fit in fits.values()],
        "above the posterior": [f"{fit.excess:.3f} +- {fit.excess_stderr:.3f} nats" for fit in fits.values()],
        f"C2ST, {config.observations} x": [
            f"{np.mean(fit.c2st):.3f} +- {_stderr(np.array(fit.c2st)):.3f}" for fit in fits.values()
        ],
        "KL of a normal fit": ["" if fit.normal_kl is None else f"{fit.normal_kl:.3f} nats" for fit in fits.values()],
        "steps": [str(fit.steps or "") for fit in fits.values()],
        "training": [f"{fit.seconds:.0f} s" if fit.steps else "" for fit in fits.values()],
        "and the first step": [f"{fit.first_step:.0f} s" if fit.steps else "" for fit in fits.values()],
    }
    for name, cells in rows.items():
        if any(cells):
            print(f"{name:<24}" + "".join(f"{cell:<26}" for cell in cells).rstrip())
    print(f"{'certified':<24}Lip(g) <= {certificate.bounds.max():.4f} for every x\n")


def learn_digits(config: ConditionalConfig, metrics: MetricsFile) -> dict[str, classes.Scores]:
    """Trains the two flows on digits, measures them, draws, prints."""
    scores, settings = {}, config.digits
    for flow_name, conditional in (("p(x)", False), ("p(x | class)", True)):
        first_step = None
        for step, loss, seconds, trained in classes.train(settings, config.seed, conditional=conditional):
            first_step = first_step or seconds
            metrics.write(task="digits", flow=flow_name, step=step, split="train", bits_per_dim=loss, seconds=seconds)
            flow = trained
        flow.tighten()
        found = classes.evaluate(settings, flow, config.seed + 1, seconds, first_step)
        scores[flow_name] = found
        metrics.write(
            task="digits",
            flow=flow_name,
            step=settings.steps,
            split="test",
            bits_per_dim=found.bits_per_dim.mean,
            bits_per_dim_stderr=found.bits_per_dim.stderr,
            marginal_bits_per_dim=None if found.marginal is None else found.marginal.mean,
            accuracy=found.accuracy,
            seconds=found.seconds,
            first_step=found.first_step,
        )
    pictures.save_images(
        config.workdir / "digits.png",
        {
            "test images": classes.digits_of_classes(settings.samples),
            "samples of p(x | class), a row a class": classes.sample_classes(
                flow, jax.random.key(config.seed + 2), settings.samples
            ),
        },
        columns=settings.samples,
    )
    plain, own = scores.values()
    rows = {
        "digits": list(scores),
        "test bits/dim": [f"{s.bits_per_dim.mean:.3f} +- {s.bits_per_dim.stderr:.3f}" for s in scores.values()],
        "of the mixture p(x)": ["", f"{own.marginal.mean:.3f} +- {own.marginal.stderr:.3f}"],
        "accuracy of Bayes' rule": ["", f"{own.accuracy:.3f}"],
        "training": [f"{s.seconds:.0f} s, the first step {s.first_step:.0f} s" for s in (plain, own)],
    }
    for name, cells in rows.items():
        print(f"{name:<24}" + "".join(f"{cell:<30}" for cell in cells).rstrip())
    print(f"{'certified':<24}Lip(g) <= {certify(flow).bounds.max():.4f} for every class\n")
    return scores


if __name__ == "__main__":
    main()
