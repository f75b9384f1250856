"""The settings of an experiment. Each image data set has a file beside this one."""

from dataclasses import dataclass, field
from pathlib import Path

import optax

from resflow_jax import Estimator, ImageFlowConfig, Roulette
from resflow_jax.functional.checks import check_count, check_open_interval


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Attributes:
      name: "digits" (shipped with scikit-learn) or the name of a prepared TensorFlow data set.
      dir: directory of TensorFlow data sets; by default the first of $TFDS_DATA_DIR,
        ~/tensorflow_datasets and ../shared/tfds that holds it.
    """

    name: str
    dir: str | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with warm-up, cosine decay to zero and clipping by the global norm.

    Attributes:
      learning_rate: peak, reached after the warm-up.
      warmup: steps of linear warm-up.
      b2: decay of Adam's second moment.
      clip: bound on the gradient's global norm (bits/dim per unit of parameter).
      ema_decay: decay of the moving average of the parameters that evaluation uses.
    """

    learning_rate: float = 1e-2
    warmup: int = 100
    b2: float = 0.99
    clip: float = 1.0
    ema_decay: float = 0.995

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        check_count("warmup", self.warmup, 0)
        check_open_interval("b2", self.b2, 0, 1)
        if not self.clip > 0:
            raise ValueError(f"clip: expected a positive number, got {self.clip}")
        check_open_interval("ema_decay", self.ema_decay, 0, 1)

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of so many steps; the warm-up takes at most half of them."""
        warmup = min(self.warmup, steps // 2)
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adam(schedule, b2=self.b2))


@dataclass(frozen=True)
class EvaluationConfig:
    """How bits/dim is measured.

    Attributes:
      estimator: of the log-det, unbiased and longer than in training.
      draws: dequantisations an image, for the test split.
      images: at most so many images of a split.
      every: steps between evaluations on the validation split (one draw), each with a checkpoint.
    """

    estimator: Estimator = field(default_factory=lambda: Roulette(exact_terms=8))
    draws: int = 10
    images: int = 10000
    every: int = 200

    def __post_init__(self):
        check_count("draws", self.draws, 1)
        check_count("images", self.images, 2)
        check_count("every", self.every, 1)


@dataclass(frozen=True)
class DensityConfig:
    """One run of `python -m experiments.density`.

    Attributes:
      data: which images.
      model: the flow.
      workdir: where everything is written.
      steps: optimiser steps in all.
      batch_size: images a step.
      seed: of parameters, data order and noise.
      estimator: of the log-det in the loss.
      fit_lengths: refit the law of each block's lengths at every validation (of a `Roulette` only).
      optimizer: learning rate, clipping, averaging.
      evaluation: how bits/dim is measured.
      log_every: steps between lines of metrics.jsonl.
    """

    data: DataConfig
    model: ImageFlowConfig
    workdir: Path
    steps: int = 1200
    batch_size: int = 64
    seed: int = 0
    estimator: Estimator = field(default_factory=Roulette)
    fit_lengths: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: int = 10

    def __post_init__(self):
        check_count("steps", self.steps, 1)
        check_count("batch_size", self.batch_size, 1)
        check_count("seed", self.seed, 0)
        check_count("log_every", self.log_every, 1)
        if self.fit_lengths and not isinstance(self.estimator, Roulette):
            raise ValueError(f"fit_lengths: expected a Roulette as estimator, got {self.estimator}")
