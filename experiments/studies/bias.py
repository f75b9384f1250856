"""Compares training with a biased and an unbiased log-det, by the exact value.

    python -m experiments.studies.bias [--workdir DIR] [--steps N] [--truncated.terms N] [--model.coefficient C] ...

Trains one flow on the 8x8 digits twice, from the same parameters, on the same batches: with a truncated power
series (Behrmann et al. 2019, arXiv 1811.00995) and with the roulette. During training it measures bits/dim of the
test split with the exact log-det, and with the run's own estimator on the same images and dequantisation: the
difference is the bias. It follows the comparison of biased and unbiased training by Chen et al. (2019, arXiv
1906.02735).

The hyperparameters are those of `experiments.configs.digits_uniform`, except for 2000 steps and a flow of two blocks
with two convolutions each: with the twelve blocks of that flow the bias is only -0.01 bits/dim after 800 steps.

It measures the current weights, not averaged ones, and iterates the norms of the layers to convergence. While the
learning rate is high, the norms that training uses are up to 6 % too small. The training estimate of the truncated run
is then below its estimate for the test images. That is not over-fitting: with converged norms, images of the training
set give no lower estimate. The test split is measured during training, but no choice depends on it.

About 4 minutes on 2 CPU cores. Bits/dim at the end:
  truncated, 5 terms   training estimate 1.78, exact 2.60 +- 0.02, estimate - exact -0.749 +- 0.002
  roulette             training estimate 2.37, exact 2.37 +- 0.01, estimate - exact +0.002 +- 0.014

Under the work directory (runs/bias) it writes bias.png, metrics.jsonl and config.json. Running the command again starts
from the beginning.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np

from experiments.configs import digits_uniform
from experiments.configs.base import DensityConfig, OptimizerConfig
from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache
from experiments.runs.lock import locked
from experiments.runs.loop import falls_due, training_loop
from experiments.runs.metrics_file import MetricsFile
from experiments.runs.pictures import save_figure, trailing_mean
from experiments.runs.setup import place_on_devices, set_up
from experiments.runs.tasks.images import ImageTask, load
from experiments.runs.workdir import claim_workdir
from resflow_jax import (
    Certificate,
    DenseTail,
    Estimate,
    Estimator,
    Exact,
    ImageFlowConfig,
    ResidualFlow,
    Roulette,
    Truncated,
    certify,
)
from resflow_jax.data.images import ImageSplits
from resflow_jax.functional.checks import check_count
from resflow_jax.training.evaluation import evaluate_bits_per_dim
from resflow_jax.training.parallel import Strategy

Array = jax.Array


@dataclass(frozen=True)
class BiasConfig:
    """Two runs that differ only in the log-det estimator of the loss.

    Attributes:
      model: the flow.
      workdir: directory that everything is written to.
      steps: number of optimiser steps of each run.
      batch_size: images per step.
      seed: random seed of parameters, data order and noise.
      truncated: the biased estimator.
      roulette: the unbiased one.
      optimizer: learning rate and clipping.
      every: steps between measurements on the test split.
      draws: number of dequantisations and estimates per image, at every measurement.
      images: maximum number of test images.
      log_every: steps between training lines of metrics.jsonl.
      parallel: how a step is divided among devices, as in `experiments.density`.
    """

    model: ImageFlowConfig = replace(digits_uniform.CONFIG.model, blocks=(2,), kernels=(3, 3), tail=DenseTail(0))
    workdir: Path = Path("runs/bias")
    steps: int = 2000
    batch_size: int = digits_uniform.CONFIG.batch_size
    seed: int = digits_uniform.CONFIG.seed
    truncated: Truncated = field(default_factory=lambda: Truncated(terms=5))
    roulette: Roulette = field(default_factory=Roulette)
    optimizer: OptimizerConfig = digits_uniform.CONFIG.optimizer
    every: int = 200
    draws: int = 8
    images: int = 300
    log_every: int = 10
    parallel: Strategy = "jit"

    def __post_init__(self):
        self.training(self.roulette)  # checks the settings that are common to all training
        if self.model.shape != (8, 8, 1):
            raise ValueError(f"model.shape: expected (8, 8, 1), the shape of the digits, got {self.model.shape}")
        check_count("every", self.every, 1)
        check_count("draws", self.draws, 2)
        check_count("images", self.images, 2)

    def training(self, estimator: Estimator) -> DensityConfig:
        """The settings of a run."""
        return DensityConfig(
            data=digits_uniform.CONFIG.data,
            model=self.model,
            workdir=self.workdir,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            estimator=estimator,
            optimizer=self.optimizer,
            log_every=self.log_every,
            parallel=self.parallel,
        )


class Measurement(NamedTuple):
    """Bits/dim of the test images, exact and by an estimator, with the same weights.

    Attributes:
      exact: bits/dim with the exact log-det.
      stderr: standard error of `exact`, from the choice of images.
      gap: estimate minus exact value, for the same dequantised images.
      gap_stderr: standard error of `gap`, for these images.
    """

    exact: float
    stderr: float
    gap: float
    gap_stderr: float


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
      estimate: mean training loss between the last two measurements.
      test: the last measurement.
      step_time: median seconds per step.
      certificate: certificate of the flow after the last step.
    """

    estimate: float
    test: Measurement
    step_time: float
    certificate: Certificate


def tiny(config: BiasConfig) -> BiasConfig:
    """Four steps of a tiny flow."""
    return replace(
        config,
        model=replace(config.model, blocks=(1,), hidden_channels=4),
        workdir=Path("runs/bias_tiny"),
        steps=4,
        batch_size=8,
        every=2,
        draws=2,
        images=20,
        log_every=1,
    )


COMMAND = Command(
    "experiments.studies.bias",
    __doc__,
    BiasConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("bias.png", "metrics.jsonl", "config.json")),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: BiasConfig) -> dict[str, Outcome]:
    """Trains with each estimator, draws, and prints the closing table."""
    began = time.perf_counter()
    use_compilation_cache()
    data = load(digits_uniform.CONFIG.data)
    with locked(config.workdir):
        claim_workdir(config.workdir, config)
        metrics = MetricsFile(config.workdir / "metrics.jsonl", keep_until=0)
        outcomes = {
            "truncated": train(config, "truncated", config.truncated, data, metrics),
            "roulette": train(config, "roulette", config.roulette, data, metrics),
        }
        report(config, outcomes, metrics.lines, began)
    return outcomes


def train(config: BiasConfig, name: str, estimator: Estimator, data: ImageSplits, metrics: MetricsFile) -> Outcome:
    """Runs all steps with one estimator, and measures during training.

    Raises:
      FloatingPointError: if the loss or the gradient stops being finite.
    """
    task, together = ImageTask(config.training(estimator)), config.optimizer.accumulate
    trainer, state = set_up(task)
    placement = place_on_devices(trainer, task.config)
    losses, step_times = [], []

    def measures_at(step: int) -> bool:
        return falls_due(step, config.every, together) or step == config.steps

    for at in training_loop(
        placement,
        state,
        jax.random.key(config.seed),
        task.batches,
        steps=config.steps,
        pauses_at=lambda step: falls_due(step, config.log_every, together) or measures_at(step),
        unit=f"bits/dim, {name}",
        skips=1,
    ):
        losses.append(float(at.metrics["loss"]))
        step_times.append(at.seconds)
        line = {"bits_per_dim": losses[-1], "gradient_norm": float(at.metrics["gradient_norm"])}
        metrics.write(run=name, step=at.step, split="train", **line)
        if measures_at(at.step):
            key = jax.random.fold_in(jax.random.key(config.seed + 2), at.step)
            test = measure(config, placement.current_flow(at.state), data, key, estimator)
            if not np.isfinite(test).all():
                raise FloatingPointError(f"bits/dim of the test split are {test} at step {at.step}")
            line = {"bits_per_dim": test.exact, "bits_per_dim_stderr": test.stderr}
            metrics.write(run=name, step=at.step, split="test", **line, gap=test.gap, gap_stderr=test.gap_stderr)
            estimate, losses = float(np.mean(losses)), []
            at.bar.set_description(f"test {test.exact:.3f} bits/dim, estimate {test.gap:+.3f}")
    # The flow is not tightened, which would change it and so its bias.
    certificate = certify(placement.current_flow(at.state))
    return Outcome(estimate, test, float(np.median(step_times)), certificate)


def measure(config: BiasConfig, flow: ResidualFlow, data: ImageSplits, key: Array, estimator: Estimator) -> Measurement:
    """Measures bits/dim of the test split, exactly and with an estimator, on the same dequantised images."""

    def evaluate(estimator: Estimator, key: Array) -> Estimate:
        # Batches are small, since the roulette draws one length per batch: more batches give less noise.
        return evaluate_bits_per_dim(
            flow, data.test[: config.images], key, levels=data.levels, estimator=estimator, draws=1, batch_size=20
        )

    keys = jax.random.split(key, config.draws)
    exact = [evaluate(Exact(), key) for key in keys]
    gaps = np.array([evaluate(estimator, key).mean - e.mean for key, e in zip(keys, exact, strict=True)])
    mean, stderr = np.mean([(e.mean, e.stderr) for e in exact], axis=0)
    return Measurement(float(mean), float(stderr), float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5))


def report(config: BiasConfig, outcomes: dict[str, Outcome], metrics: list[dict], began: float) -> None:
    """Draws the picture and prints the closing table."""
    titles = {"truncated": f"truncated, {config.truncated.terms} terms", "roulette": "roulette"}
    _save_bias_curves(config.workdir / "bias.png", metrics, titles)

    columns = {
        "bits/dim": [titles[name] for name in outcomes],
        "training estimate": [f"{o.estimate:.4f}" for o in outcomes.values()],
        "exact test value": [f"{o.test.exact:.4f} +- {o.test.stderr:.4f}" for o in outcomes.values()],
        "estimate - exact": [f"{o.test.gap:+.4f} +- {o.test.gap_stderr:.4f}" for o in outcomes.values()],
        "time per step": [f"{o.step_time * 1e3:.0f} ms" for o in outcomes.values()],
        "certified": [f"Lip(g) <= {o.certificate.bounds.max():.4f}" for o in outcomes.values()],
    }
    for name, (truncated, roulette) in columns.items():
        print(f"{name:<22}{truncated:<22}{roulette}")
    print(f"{'time in all':<22}{time.perf_counter() - began:.0f} s, set-up and compilation included")


def _save_bias_curves(path: Path, metrics: list[dict], titles: dict[str, str]) -> None:
    """Draws, for each titled run, the training estimate and the exact test value of bits/dim against the step.

    A second panel shows the estimate minus the exact value, for the same test images.
    """
    figure, (axis, gaps) = plt.subplots(
        1, 2, figsize=(12, 4.6), layout="constrained", gridspec_kw={"width_ratios": (3, 2)}
    )
    values = []
    for n, (run, title) in enumerate(titles.items()):
        lines = [m for m in metrics if m["run"] == run]
        train = np.array([(m["step"], m["bits_per_dim"]) for m in lines if m["split"] == "train"])
        train = trailing_mean(train, max(len(train) // 20, 1))
        step, exact, gap, stderr = np.array(
            [(m["step"], m["bits_per_dim"], m["gap"], m["gap_stderr"]) for m in lines if m["split"] == "test"]
        ).T
        color = ("C3", "C0")[n]
        axis.plot(*train.T, color=color, lw=1.2, label=f"{title}: training estimate")
        axis.plot(step, exact + gap, "^:", color=color, ms=4, mfc="none", label=f"{title}: estimate, test images")
        axis.plot(step, exact, "o--", color=color, ms=4, label=f"{title}: exact, test images")
        gaps.errorbar(step, gap, stderr, fmt="o-", color=color, ms=4, capsize=3, label=title)
        values += [train[len(train) // 10 :, 1], exact]
    low, high = np.min(np.concatenate(values)), np.max(np.concatenate(values))
    axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    gaps.axhline(0, color="black", lw=0.8)
    axis.set(xlabel="step", ylabel="bits/dim", title="digits: trained with a biased and with an unbiased log-det")
    gaps.set(xlabel="step", ylabel="bits/dim", title="estimate - exact, same test images")
    for a in (axis, gaps):
        a.grid(alpha=0.3)
        a.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
