"""The common settings and the training of experiments in the plane."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.configs.base import OptimizerConfig
from experiments.runs.loop import falls_due, training_loop
from experiments.runs.metrics_file import MetricsFile
from resflow_jax import Estimator, Exact, ResidualFlow, VectorFlowConfig
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.estimators import check_estimator
from resflow_jax.training.parallel import STRATEGIES, Strategy, make_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Loss, Trainer

Array = jax.Array


@dataclass(frozen=True)
class PlaneConfig:
    """The settings that runs in the plane have in common.

    Attributes:
      workdir: directory that everything is written to; a directory under runs/ by default.
      steps: total number of optimiser steps.
      batch_size: points per step.
      seed: random seed of parameters, points and noise.
      optimizer: learning rate, clipping, averaging.
      estimator: log-det estimator of the loss.
      model: the flow.
      log_every: steps between lines of metrics.jsonl.
      parallel: how a step is divided among devices, as in `experiments.density`.
    """

    workdir: Path | None = None
    steps: int = 3000
    batch_size: int = 256
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-2, warmup=300, ema_decay=0.99)
    estimator: Estimator = Exact()
    model: VectorFlowConfig = VectorFlowConfig(
        dim=2, blocks=16, hidden=(32, 32), activation="elu", preactivation="none", coefficient=0.97
    )
    log_every: int = 50
    parallel: Strategy = "jit"

    def __post_init__(self):
        check_choice("parallel", self.parallel, STRATEGIES)
        check_count("steps", self.steps, 1)
        check_count("batch_size", self.batch_size, 2)
        check_count("seed", self.seed, 0)
        check_estimator(self.estimator)
        if self.model.dim != 2:
            raise ValueError(f"model.dim: expected 2, got {self.model.dim}")
        check_count("log_every", self.log_every, 1)
        if self.optimizer.reversible:
            raise ValueError("optimizer.reversible: expected False for a flow that is fitted by samples, got True")
        if self.steps % self.optimizer.accumulate:
            raise ValueError(
                f"optimizer.accumulate: expected a divisor of {self.steps}, the number of steps, got "
                f"{self.optimizer.accumulate}"
            )


def train_flow(
    config: PlaneConfig,
    flow: ResidualFlow,
    loss: Loss,
    batch_at: Callable[[int], Any],
    metrics: MetricsFile,
    *,
    unit: str,
    as_line: Callable[[float], dict[str, float]],
) -> tuple[ResidualFlow, float]:
    """Runs all training steps on a loss in `unit`; as_line(loss) gives its entries in metrics.jsonl.

    An update that is not finite is skipped, and has a line of the split "skipped" there.

    Returns:
      The flow with the averaged parameters, and the median seconds per step.
    """
    together = config.optimizer.accumulate
    trainer = Trainer(
        nnx.split(flow)[0], loss, config.optimizer.build(config.steps), config.optimizer.ema_decay, together
    )
    placement = Placement(trainer, make_mesh(), config.parallel)
    placement.check_batch_size(config.batch_size)
    step_times = []
    for at in training_loop(
        placement,
        trainer.create_state(flow, config.estimator),
        jax.random.key(config.seed),
        lambda step: map(batch_at, count(step)),
        steps=config.steps,
        pauses_at=lambda step: falls_due(step, config.log_every, together),
        unit=unit,
    ):
        step_times.append(at.seconds)
        for one in at.skipped:
            metrics.write(split="skipped", **one._asdict())
        line = as_line(float(at.metrics["loss"]))
        metrics.write(step=at.step, split="train", **line, gradient_norm=float(at.metrics["gradient_norm"]))
    return placement.averaged_flow(at.state), float(np.median(step_times))
