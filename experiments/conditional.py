"""Conditional flows: simulators of known posterior, and digits by their class.

    python -m experiments.conditional [--workdir DIR] [--two-moons.steps N] [--digits.steps N] [--observations N] ...

For two moons and a Gaussian linear model (`experiments.studies.conditioning.simulators`) a flow learns q(theta | x) for
all x at once, from simulated pairs alone. flowjax's conditional flow, a masked autoregressive flow of
rational-quadratic splines, is trained for the same wall-clock time (`experiments.studies.conditioning.amortised`);
without the extra flowjax it is left out. Both are compared with the exact posterior in two ways: by the mean
-log q(theta | x) of new pairs, which the posterior itself minimises, and by a classifier two-sample test (C2ST, 0.5 is
best) at several observations. On the 8x8 digits, two flows are trained: one conditioned on the class, and one without
a condition (`experiments.studies.conditioning.classes`).

Under the work directory (runs/conditional) it writes two_moons.png and gaussian_linear.png (samples of the exact
posterior and of the flows at every observation), digits.png (samples, one row per class), metrics.jsonl and
config.json. Running the command again starts from the beginning.

About 2 minutes on 2 CPU cores, half of it compilation:
  two moons         above the posterior 0.071 +- 0.007 nats (flowjax 0.051), C2ST 0.507 (0.495; exact samples 0.503)
  Gaussian linear   above the posterior 0.006 +- 0.002 nats (flowjax 0.050), C2ST 0.506 (0.522; exact samples 0.506)
  digits            1.907 test bits/dim given the class, 2.045 without; Bayes' rule is right for 99.0 % of the images
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments.configs.base import OptimizerConfig
from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache, use_xla_flags
from experiments.runs.lock import locked
from experiments.runs.metrics_file import MetricsFile
from experiments.runs.pictures import save_images
from experiments.runs.tables import print_table
from experiments.runs.workdir import claim_workdir
from experiments.studies.conditioning import classes
from experiments.studies.conditioning.amortised import (
    FlowjaxConfig,
    FlowjaxLearner,
    Learner,
    ResidualLearner,
    Standardised,
    has_flowjax,
    take_turns,
)
from experiments.studies.conditioning.classes import DigitsConfig
from experiments.studies.conditioning.posteriors import Fit, circle_of, compare, print_fits, save_posteriors
from experiments.studies.conditioning.simulators import GaussianLinear, Simulator, TwoMoons
from resflow_jax import Estimator, Exact, Roulette, VectorFlowConfig, certify
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.estimators import check_estimator

_MODEL = VectorFlowConfig(2, hidden=(32, 32), activation="elu", coefficient=0.97, condition_dim=2)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How the posterior of one simulator is learned.

    Attributes:
      simulator: the simulator.
      model: the flow; its `condition_dim` is the number of elements of x.
      steps: optimiser steps of the residual flow; 0 leaves the task out.
      estimator: log-det estimator of the loss.
      optimizer: Adam, with the residual flow's learning rate, and the warm-up, schedule and clipping of both flows.
      flowjax: the flow of flowjax that it is compared with.
    """

    simulator: Simulator
    model: VectorFlowConfig
    steps: int = 3000
    estimator: Estimator
    optimizer: OptimizerConfig
    flowjax: FlowjaxConfig = FlowjaxConfig()

    def __post_init__(self):
        check_count("steps", self.steps, 0)
        check_estimator(self.estimator)
        check_choice("optimizer.name", self.optimizer.name, ("adam",))
        if self.optimizer.accumulate != 1:
            raise ValueError(f"optimizer.accumulate: expected 1, got {self.optimizer.accumulate}")
        if self.optimizer.reversible:
            raise ValueError("optimizer.reversible: expected False, got True")
        for name, expected in (("dim", self.simulator.dim), ("condition_dim", self.simulator.x_dim)):
            if getattr(self.model, name) != expected:
                raise ValueError(
                    f"model.{name}: expected {expected}, as {type(self.simulator).__name__} has, got "
                    f"{getattr(self.model, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class TwoMoonsConfig(TaskConfig):
    """Two moons; see `TaskConfig`."""

    simulator: TwoMoons = TwoMoons()
    model: VectorFlowConfig = replace(_MODEL, blocks=16)
    estimator: Estimator = Exact()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-2, warmup=200)


@dataclass(frozen=True, kw_only=True)
class GaussianLinearConfig(TaskConfig):
    """The Gaussian linear model; see `TaskConfig`."""

    simulator: GaussianLinear = GaussianLinear()
    model: VectorFlowConfig = replace(_MODEL, dim=10, condition_dim=10, blocks=4)
    estimator: Estimator = Roulette()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-2, warmup=200)
    flowjax: FlowjaxConfig = FlowjaxConfig(learning_rate=5e-3)


@dataclass(frozen=True)
class ConditionalConfig:
    """One run of `python -m experiments.conditional`.

    Attributes:
      workdir: directory that everything is written to.
      seed: random seed of parameters, simulations and noise.
      batch_size: simulated pairs per step.
      simulations: total number of pairs of a fixed budget; None simulates new pairs at every step.
      two_moons: settings for the posterior of two moons.
      gaussian_linear: settings for the posterior of the Gaussian linear model.
      digits: settings of the flows on digits.
      observations: number of values of x at which posteriors are compared.
      samples: number of samples of every posterior in the comparison.
      pairs: number of new pairs for the mean log-density.
      log_every: steps between training lines of metrics.jsonl. The two flows train in turns of this number of steps.
    """

    workdir: Path = Path("runs/conditional")
    seed: int = 0
    batch_size: int = 256
    simulations: int | None = None
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


def tiny(config: ConditionalConfig) -> ConditionalConfig:
    """A few steps of tiny flows, compared at two observations."""

    def small(task: TaskConfig) -> TaskConfig:
        return replace(
            task,
            model=replace(task.model, blocks=1, hidden=(8,)),
            steps=11,
            flowjax=replace(task.flowjax, layers=2, width=16, depth=1),
        )

    images = config.digits.model
    images = replace(images, blocks=(1,), hidden_channels=4, tail=replace(images.tail, blocks=0))
    return replace(
        config,
        workdir=Path("runs/conditional_tiny"),
        batch_size=64,
        two_moons=small(config.two_moons),
        gaussian_linear=small(config.gaussian_linear),
        digits=replace(config.digits, model=images, steps=2, batch_size=16, draws=1, images=4, samples=2),
        observations=2,
        samples=60,
        pairs=50,
        log_every=10,
    )


COMMAND = Command(
    "experiments.conditional",
    __doc__,
    ConditionalConfig(),
    tiny,
    output=lambda config: Output(
        config.workdir, ("two_moons.png", "gaussian_linear.png", "digits.png", "metrics.jsonl", "config.json")
    ),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(run, arguments)


def run(config: ConditionalConfig) -> dict[str, dict]:
    """Runs all parts. Returns {task: {flow: `Fit`}} together with {"digits": {flow: `Scores`}}."""
    began = time.perf_counter()
    use_compilation_cache()
    with locked(config.workdir):
        claim_workdir(config.workdir, config)
        return _run_parts(config, began)


def _run_parts(config: ConditionalConfig, began: float) -> dict[str, dict]:
    metrics = MetricsFile(config.workdir / "metrics.jsonl", keep_until=0)
    results = {}
    for name, title in (("two_moons", "two moons"), ("gaussian_linear", "Gaussian linear")):
        if getattr(config, name).steps:
            results[name] = infer(config, name, title, metrics)
    if config.digits.steps:
        results["digits"] = learn_digits(config, metrics)
    if not has_flowjax():
        print("flowjax is not installed: its flow is left out")
    print_table({"time in all": f"{time.perf_counter() - began:.0f} s"})
    return results


def infer(config: ConditionalConfig, name: str, title: str, metrics: MetricsFile) -> dict[str, Fit]:
    """Trains the flows of one task, compares them with the exact posterior, draws and prints."""
    settings: TaskConfig = getattr(config, name)
    rng = np.random.default_rng((config.seed, 0))
    task = Standardised.of(settings.simulator, rng, config.simulations)
    learners = train(config, settings, task, rng, partial(metrics.write, task=name, split="train"))
    comparison = compare(
        learners, task, rng, observations=config.observations, samples=config.samples, pairs=config.pairs
    )
    for flow, fit in comparison.fits.items():
        metrics.write(task=name, flow=flow, step=fit.steps, split="test", **fit._asdict())
    circle = circle_of(settings.simulator)
    save_posteriors(config.workdir / f"{name}.png", comparison.samples, comparison.observed, title, circle)
    print_fits(title, comparison.fits, certify(learners[0].flow))
    return comparison.fits


def train(
    config: ConditionalConfig,
    settings: TaskConfig,
    task: Standardised,
    rng: np.random.Generator,
    write: Callable[..., None],
) -> list[Learner]:
    """Trains the flows of a task for the same time; returns ours first. `write` takes the lines of metrics.jsonl."""
    first, optimizer = task.pairs(rng, 2000), settings.optimizer
    learners: list[Learner] = [ResidualLearner(settings.model, optimizer, settings.estimator, first, config.seed)]
    rates = [optimizer.learning_rate]
    if has_flowjax():
        learners.append(FlowjaxLearner(settings.flowjax, optimizer, first, config.seed))
        rates.append(settings.flowjax.learning_rate)
    options = {"steps": settings.steps, "batch_size": config.batch_size, "every": config.log_every, "seed": config.seed}
    for turn in take_turns(learners, task, rates, optimizer, **options):
        for name, loss in turn.losses.items():
            write(flow=name, step=turn.steps[name], nll=loss - task.log_det, seconds=turn.seconds[name])
    return learners


def learn_digits(config: ConditionalConfig, metrics: MetricsFile) -> dict[str, classes.Scores]:
    """Trains the two flows on digits, measures them, draws and prints."""
    scores, settings = {}, config.digits
    for flow_name, conditional in (("p(x)", False), ("p(x | class)", True)):
        flow, history = classes.train(settings, config.seed, conditional=conditional)
        for step, loss, seconds in zip(history.step, history.train_bits_per_dim, history.seconds, strict=True):
            line = {"step": int(step), "bits_per_dim": float(loss), "seconds": float(seconds)}
            metrics.write(task="digits", flow=flow_name, split="train", **line)
        found = classes.evaluate(settings, flow, config.seed + 1, float(history.seconds[-1]))
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
        )
    save_images(
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
        "training": [f"{s.seconds:.0f} s, compilation included" for s in (plain, own)],
    }
    for name, cells in rows.items():
        print(f"{name:<24}" + "".join(f"{cell:<30}" for cell in cells).rstrip())
    print(f"{'certified':<24}Lip(g) <= {certify(flow).bounds.max():.4f} for every class\n")
    return scores


if __name__ == "__main__":
    main()
