"""The settings of a run. Each data set has a file beside this one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import optax

from resflow_jax import Estimator, ImageFlowConfig, Roulette, VectorFlowConfig
from resflow_jax.data.images import check_bits
from resflow_jax.functional.checks import check_choice, check_count, check_open_interval
from resflow_jax.training.parallel import PARAMETERS, STRATEGIES, Parameters, Strategy

OptimizerName = Literal["adam", "adamax", "adamw", "sgd"]
Schedule = Literal["cosine", "step", "constant"]
OPTIMIZERS, SCHEDULES = get_args(OptimizerName), get_args(Schedule)


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
      threads: that read training images, in each worker.
      workers: processes that read training images; 0 for this one, which is enough where they fit in memory.
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
    workers: int = 0

    def __post_init__(self):
        check_count("size", self.size, 1)
        check_count("threads", self.threads, 0)
        check_count("workers", self.workers, 0)
        check_count("crop", self.crop, 0)
        check_bits(self.bits)


@dataclass(frozen=True)
class OptimizerConfig:
    """Warm-up, a schedule, clipping by the global norm, accumulation and averaging around an optimiser.

    Attributes:
      name: "adam", "adamax", "adamw" or "sgd" (with Nesterov momentum 0.9).
      learning_rate: peak, reached after the warm-up.
      warmup: updates of linear warm-up.
      schedule: after it: "cosine" to zero, "step" (times `decay` at each of `milestones`), or "constant".
      milestones: of "step": updates after which the rate falls, increasing.
      decay: of "step": factor of each fall, in (0, 1).
      b2: decay of Adam's second moment.
      weight_decay: of "adamw".
      clip: bound on the gradient's global norm (bits/dim per unit of parameter).
      accumulate: batches whose mean gradient makes an update.
      ema_decay: decay, an update, of the moving average of the parameters that evaluation uses.
    """

    name: OptimizerName = "adam"
    learning_rate: float = 1e-2
    warmup: int = 100
    schedule: Schedule = "cosine"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    b2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.995

    def __post_init__(self):
        check_choice("name", self.name, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_open_interval("decay", self.decay, 0, 1)
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError(
                f'milestones: expected some with the schedule "step", and none else, got {self.milestones} with '
                f"{self.schedule!r}"
            )
        if any(b <= a for a, b in zip((0, *self.milestones), self.milestones, strict=False)):
            raise ValueError(f"milestones: expected positive numbers that increase, got {self.milestones}")
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
        """The optimiser of a run of so many steps, a batch each, to be called once for every `accumulate` of them."""
        schedule = self.learning_rates(steps)
        optimizer = {
            "adam": lambda: optax.adam(schedule, b2=self.b2),
            "adamax": lambda: optax.adamax(schedule, b2=self.b2),
            "adamw": lambda: optax.adamw(schedule, b2=self.b2, weight_decay=self.weight_decay),
            "sgd": lambda: optax.sgd(schedule, momentum=0.9, nesterov=True),
        }[self.name]()
        return optax.chain(optax.clip_by_global_norm(self.clip), optimizer)

    def learning_rates(self, steps: int) -> optax.Schedule:
        """The learning rate by updates done, in a run of so many steps; the warm-up takes at most half of them."""
        updates = max(1, steps // self.accumulate)
        warmup = min(self.warmup, updates // 2)
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, updates)
        rise = optax.warmup_constant_schedule(0.0 if warmup else self.learning_rate, self.learning_rate, warmup)
        fall = optax.piecewise_constant_schedule(1.0, dict.fromkeys(self.milestones, self.decay))
        return lambda done: rise(done) * fall(done)


@dataclass(frozen=True)
class EvaluationConfig:
    """How the likelihood is measured.

    Attributes:
      estimator: of the log-det, unbiased and longer than in training.
      draws: of dequantisation and estimate for each example of the test split.
      examples: at most so many of a split.
      every: steps between evaluations on the validation split (one draw), each with a checkpoint and pictures.
      patience: so many of these in a row without an improvement end the training; None for no such end.
    """

    estimator: Estimator = field(default_factory=lambda: Roulette(exact_terms=8))
    draws: int = 10
    examples: int = 10000
    every: int = 200
    patience: int | None = None

    def __post_init__(self):
        check_count("draws", self.draws, 1)
        check_count("examples", self.examples, 2)
        check_count("every", self.every, 1)
        if self.patience is not None:
            check_count("patience", self.patience, 1)


@dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes are divided.

    Attributes:
      data: devices that share each batch; by default all that `model` leaves.
      model: devices that share kernels and the products with them, with parameters "model".
      parameters: "replicated", the same on all; "model", divided among the devices along `model`; "full", divided
        among all, and gathered for each step: least memory between steps. The last two with "jit" alone.
    """

    data: int | None = None
    model: int = 1
    parameters: Parameters = "replicated"

    def __post_init__(self):
        if self.data is not None:
            check_count("mesh.data", self.data, 1)
        check_count("mesh.model", self.model, 1)
        check_choice("mesh.parameters", self.parameters, PARAMETERS)
        if (self.parameters == "model") != (self.model > 1):
            raise ValueError(
                f'mesh.model: expected at least 2 with parameters "model", and else 1, got {self.model} with '
                f"{self.parameters!r}"
            )


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes find each other, on one host or many; by default there is one.

    Attributes:
      auto: as the cluster says (Slurm, Open MPI, Kubernetes, Cloud TPU), by JAX's own detection.
      coordinator: address of process 0, HOST:PORT, in its place.
      num_processes: how many there are.
      process_id: number of this one, from 0.
      timeout: seconds to wait for the others.
    """

    auto: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300

    def __post_init__(self):
        named = (self.coordinator, self.num_processes, self.process_id)
        given = [value for value in named if value is not None]
        if self.auto and given:
            raise ValueError(f"distributed.auto: expected no other setting of the cluster beside it, got {given}")
        if given and len(given) < len(named):
            raise ValueError(
                "distributed: expected coordinator, num_processes and process_id, or none of them, got "
                f"{self.coordinator}, {self.num_processes}, {self.process_id}"
            )
        if given:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"distributed.coordinator: expected HOST:PORT, got {self.coordinator!r}")
            check_count("distributed.num_processes", self.num_processes, 1)
            check_count("distributed.process_id", self.process_id, 0)
            if self.process_id >= self.num_processes:
                raise ValueError(
                    f"distributed.process_id: expected a number below {self.num_processes}, that of processes, got "
                    f"{self.process_id}"
                )
        check_count("distributed.timeout", self.timeout, 1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all runs have in common.

    Attributes:
      workdir: where everything is written.
      steps: batches in all.
      batch_size: examples a step.
      seed: of parameters, data order and noise.
      estimator: of the log-det in the loss.
      fit_lengths: refit the law of each block's lengths at every validation (of a `Roulette` only).
      annealing: steps in which the weight of the log-det in the gradient rises from 0 to 1; 0 for none.
      optimizer: learning rate, clipping, averaging.
      evaluation: how the likelihood is measured.
      log_every: steps between lines of metrics.jsonl.
      save_every: steps between checkpoints, beside those at validations; None for these alone.
      parallel: how a step is divided among devices: by the compiler, by `jax.shard_map` or by `jax.pmap`. The numbers
        are those of one device, to rounding.
      mesh: which devices share what.
      distributed: other processes that take part.
    """

    workdir: Path
    steps: int = 1200
    batch_size: int = 64
    seed: int = 0
    estimator: Estimator = field(default_factory=Roulette)
    fit_lengths: bool = False
    annealing: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: int = 10
    save_every: int | None = None
    parallel: Strategy = "jit"
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self):
        check_choice("parallel", self.parallel, STRATEGIES)
        check_count("steps", self.steps, 1)
        check_count("batch_size", self.batch_size, 1)
        check_count("seed", self.seed, 0)
        check_count("annealing", self.annealing, 0)
        check_count("log_every", self.log_every, 1)
        if self.annealing > self.steps:
            raise ValueError(f"annealing: expected at most {self.steps}, the number of steps, got {self.annealing}")
        updates, rest = divmod(self.steps, self.optimizer.accumulate)
        if rest:
            raise ValueError(
                f"optimizer.accumulate: expected a divisor of {self.steps}, the number of steps, got "
                f"{self.optimizer.accumulate}"
            )
        if any(milestone >= updates for milestone in self.optimizer.milestones):
            raise ValueError(
                f"optimizer.milestones: expected numbers below {updates}, that of updates, got "
                f"{self.optimizer.milestones}"
            )
        if self.save_every is not None:
            check_count("save_every", self.save_every, 1)
        if self.fit_lengths and not isinstance(self.estimator, Roulette):
            raise ValueError(f"fit_lengths: expected a Roulette as estimator, got {self.estimator}")


@dataclass(frozen=True, kw_only=True)
class DensityConfig(RunConfig):
    """One run of `python -m experiments.density` on images.

    Attributes:
      data: which images.
      model: the flow.
    """

    data: DataConfig
    model: ImageFlowConfig


@dataclass(frozen=True)
class VectorDataConfig:
    """Which vectors.

    Attributes:
      path: a .npy, .npz or .csv file; see `resflow_jax.data.vectors.load_vectors`. By default 30 measurements
        of 569 cell nuclei that scikit-learn ships.
    """

    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class VectorsConfig(RunConfig):
    """One run of `python -m experiments.density` on vectors.

    Attributes:
      data: which vectors.
      model: the flow.
    """

    data: VectorDataConfig
    model: VectorFlowConfig
