"""The settings of an experiment. Each image data set has a file beside this one."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import optax

from resflow_jax import Estimator, ImageFlowConfig, Roulette
from resflow_jax.data.images import check_bits
from resflow_jax.functional.checks import check_choice, check_count, check_open_interval

OPTIMIZERS = ("adam", "adamax", "adamw", "sgd")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Attributes:
      name: "digits" or "photographs" (both shipped with scikit-learn), or the name of a prepared TensorFlow data set.
      path: your own images in its place: a folder of image files, a .npy or .npz file, or IDX files; see
        `resflow_jax.data.files.load_path`.
      dir: directory of TensorFlow data sets; by default the first of $TFDS_DATA_DIR,
        ~/tensorflow_datasets and ../shared/tfds that holds it.
      size: side of the crops of "photographs".
      channels: of these: 3, or 1 for grey.
      bits: of the eight of a pixel, the highest that are kept.
      flip: mirror training images left and right, half of the time.
      crop: shift training images by up to so many pixels, continued by reflection.
      threads: that read training images.
    """

    name: str
    path: Path | None = None
    dir: str | None = None
    size: int = 16
    channels: int = 3
    bits: int = 8
    flip: bool = False
    crop: int = 0
    threads: int = 2

    def __post_init__(self):
        check_count("size", self.size, 1)
        check_count("threads", self.threads, 0)
        check_count("crop", self.crop, 0)
        check_bits(self.bits)


@dataclass(frozen=True)
class OptimizerConfig:
    """Warm-up, a schedule, clipping by the global norm, accumulation and averaging around an optimiser.

    Attributes:
      name: "adam", "adamax", "adamw" or "sgd" (with Nesterov momentum 0.9).
      learning_rate: peak, reached after the warm-up.
      warmup: updates of linear warm-up.
      schedule: behind it: "cosine" to zero, or "constant".
      b2: decay of Adam's second moment.
      weight_decay: of "adamw".
      clip: bound on the gradient's global norm (bits/dim per unit of parameter).
      accumulate: batches whose mean gradient makes an update.
      ema_decay: decay, an update, of the moving average of the parameters that evaluation uses.
    """

    name: str = "adam"
    learning_rate: float = 1e-2
    warmup: int = 100
    schedule: str = "cosine"
    b2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.995

    def __post_init__(self):
        check_choice("name", self.name, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_count("accumulate", self.accumulate, 1)
        if (self.weight_decay and self.name != "adamw") or not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected 0, or a positive number with adamw, got {self.weight_decay}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        check_count("warmup", self.warmup, 0)
        check_open_interval("b2", self.b2, 0, 1)
        if not self.clip > 0:
            raise ValueError(f"clip: expected a positive number, got {self.clip}")
        check_open_interval("ema_decay", self.ema_decay, 0, 1)

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of so many steps, a batch each; the warm-up takes at most half of the updates."""
        updates = max(1, steps // self.accumulate)
        warmup = min(self.warmup, updates // 2)
        if self.schedule == "cosine":
            schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, updates)
        else:
            first = 0.0 if warmup else self.learning_rate
            schedule = optax.warmup_constant_schedule(first, self.learning_rate, warmup)
        optimizer = {
            "adam": partial(optax.adam, b2=self.b2),
            "adamax": partial(optax.adamax, b2=self.b2),
            "adamw": partial(optax.adamw, b2=self.b2, weight_decay=self.weight_decay),
            "sgd": partial(optax.sgd, momentum=0.9, nesterov=True),
        }[self.name](schedule)
        update = optax.chain(optax.clip_by_global_norm(self.clip), optimizer)
        if self.accumulate == 1:
            return update
        return optax.MultiSteps(update, self.accumulate, accumulator_dtype=None).gradient_transformation()

    @property
    def ema_decay_a_batch(self) -> float:
        """`ema_decay` for an average over batches, of which every `accumulate` have the same parameters."""
        return self.ema_decay ** (1 / self.accumulate)


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
      steps: batches in all.
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
