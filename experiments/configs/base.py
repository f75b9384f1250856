"""The settings of a run. Each data set has a file beside this one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import optax

from resflow_jax import (
    AutoregressiveFlowConfig,
    ContinuousFlowConfig,
    CouplingFlowConfig,
    Estimator,
    ImageFlowConfig,
    Roulette,
    VectorFlowConfig,
)
from resflow_jax.data.images import check_bits
from resflow_jax.functional.checks import check_choice, check_count, check_finite, check_open_interval, check_positive
from resflow_jax.training.parallel import PARAMETERS, STRATEGIES, Parameters, Strategy

OptimizerName = Literal["adam", "adamax", "adamw", "sgd"]
Schedule = Literal["cosine", "step", "constant"]
# The models of runs; `experiments.runs.models` has their names.
ImageModel = ImageFlowConfig | CouplingFlowConfig | ContinuousFlowConfig
VectorModel = VectorFlowConfig | CouplingFlowConfig | AutoregressiveFlowConfig | ContinuousFlowConfig
OPTIMIZERS, SCHEDULES = get_args(OptimizerName), get_args(Schedule)


@dataclass(frozen=True)
class DataConfig:
    """The images of a run.

    Attributes:
      name: "digits" or "photographs" (both shipped with scikit-learn), or the name of a prepared TensorFlow data set.
      path: your own images, used instead of `name`: a folder of image files, a .npy or .npz file, or IDX files; see
        `resflow_jax.data.files.load_path`.
      dir: directory of TensorFlow data sets; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      size: side of the crops of "photographs", in pixels.
      channels: channels of the crops of "photographs": 3 for colour, 1 for grey.
      bits: bits kept of each 8-bit pixel value, the most significant ones; "digits" have 17 levels, and take 8 alone.
      flip: mirror each training image left to right with probability 1/2.
      crop: maximum random shift of training images in pixels; the border is filled by reflection.
      threads: number of threads that read training images, in each worker.
      workers: number of processes that read training images. 0 reads them in this process, which is fast enough
        where the images fit in memory.
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
        if self.name == "digits" and self.path is None and self.bits != 8:
            raise ValueError(f"data.bits: expected 8 for digits, which have 17 levels, got {self.bits}")


@dataclass(frozen=True)
class OptimizerConfig:
    """Warm-up, a schedule, clipping by the global norm, accumulation and averaging around an optimiser.

    Attributes:
      name: "adam", "adamax", "adamw" or "sgd" (with Nesterov momentum 0.9).
      learning_rate: peak learning rate, reached after the warm-up.
      warmup: number of updates of linear warm-up.
      schedule: learning rate after the warm-up: "cosine" decay to zero, "step" (multiplied by `decay` at each of
        `milestones`), or "constant".
      milestones: update counts at which the "step" schedule decays, in increasing order.
      decay: factor of the "step" schedule at each milestone, in (0, 1).
      b2: decay rate of Adam's second moment.
      weight_decay: weight decay of "adamw" and "sgd"; of the latter it is added to the gradient, after clipping.
      clip: maximum global norm of the gradient (bits/dim per unit of parameter).
      accumulate: number of batches whose gradients are averaged for one update.
      ema_decay: decay per update of the moving average of the parameters that evaluation uses.
      reversible: whether gradients recompute the inputs of stacked blocks by the inverse, which saves memory and costs
        time, see `rf.make_reversible`.
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
    reversible: bool = False

    def __post_init__(self):
        check_choice("name", self.name, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_open_interval("decay", self.decay, 0, 1)
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError(
                f'milestones: expected some with the schedule "step", and none else, got {self.milestones} with '
                f"{self.schedule!r}"
            )
        for count in self.milestones:
            check_count("milestones", count, 1)
        if any(b <= a for a, b in zip((0, *self.milestones), self.milestones, strict=False)):
            raise ValueError(f"milestones: expected positive numbers that increase, got {self.milestones}")
        check_count("accumulate", self.accumulate, 1)
        check_finite("weight_decay", self.weight_decay)
        if (self.weight_decay and self.name not in ("adamw", "sgd")) or not self.weight_decay >= 0:
            raise ValueError(
                f"weight_decay: expected 0, or a positive number with adamw or sgd, got {self.weight_decay}"
            )
        check_positive("learning_rate", self.learning_rate)
        check_finite("learning_rate", self.learning_rate)
        check_count("warmup", self.warmup, 0)
        check_open_interval("b2", self.b2, 0, 1)
        check_positive("clip", self.clip)
        check_open_interval("ema_decay", self.ema_decay, 0, 1)

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `steps` batches, to be called once for every `accumulate` batches."""
        schedule = self.learning_rates(steps)
        optimizer = {
            "adam": lambda: optax.adam(schedule, b2=self.b2),
            "adamax": lambda: optax.adamax(schedule, b2=self.b2),
            "adamw": lambda: optax.adamw(schedule, b2=self.b2, weight_decay=self.weight_decay),
            "sgd": lambda: _sgd(schedule, self.weight_decay),
        }[self.name]()
        return optax.chain(optax.clip_by_global_norm(self.clip), optimizer)

    def learning_rates(self, steps: int) -> optax.Schedule:
        """The learning rate by number of updates, for a run of `steps` batches; warm-up is at most half of the run."""
        updates = max(1, steps // self.accumulate)
        warmup = min(self.warmup, updates // 2)
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, updates)
        rise = optax.warmup_constant_schedule(0.0 if warmup else self.learning_rate, self.learning_rate, warmup)
        fall = optax.piecewise_constant_schedule(1.0, dict.fromkeys(self.milestones, self.decay))
        return lambda done: rise(done) * fall(done)


def _sgd(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    sgd = optax.sgd(schedule, momentum=0.9, nesterov=True)
    return optax.chain(optax.add_decayed_weights(weight_decay), sgd) if weight_decay else sgd


@dataclass(frozen=True)
class EvaluationConfig:
    """How the likelihood is measured.

    Attributes:
      estimator: log-det estimator of evaluation: unbiased, and of little noise in the mean over a batch.
      draws: number of draws of dequantisation noise and log-det estimate for each test example.
      examples: maximum number of examples of a split that are evaluated; of more, a random subset, always the same.
      every: steps between evaluations on the validation split (one draw), each with a checkpoint and pictures.
      patience: training stops after this number of successive validations without an improvement; None never stops it
        early.
    """

    estimator: Estimator = Roulette()
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
      data: number of devices that each batch is split over; by default all devices divided by `model`.
      model: number of devices that kernels and their products are split over; above 1 only with parameters "model".
      parameters: "replicated" keeps a copy on every device; "model" splits kernels over the devices along `model`;
        "full" splits them over all devices and gathers them in each step, with least memory between steps. "model" and
        "full" need `parallel` "jit".
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
      auto: let JAX detect the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU).
      coordinator: address of process 0, HOST:PORT, where `auto` is not used.
      num_processes: total number of processes.
      process_id: index of this process, from 0.
      timeout: seconds to wait for the other processes.
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
                    f"distributed.process_id: expected less than num_processes, {self.num_processes}, got "
                    f"{self.process_id}"
                )
        check_count("distributed.timeout", self.timeout, 1)


@dataclass(frozen=True)
class SafetyConfig:
    """What a run does about losses and gradients that are not finite. Such updates are skipped and logged.

    Attributes:
      skips: number of skipped updates in a row after which the run goes back to its last good checkpoint, with new
        random numbers. It also does so after a validation that is not finite, or not certified.
      rollbacks: number of times that it goes back before it gives up.
    """

    skips: int = 10
    rollbacks: int = 3

    def __post_init__(self):
        check_count("safety.skips", self.skips, 1)
        check_count("safety.rollbacks", self.rollbacks, 0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all runs have in common.

    Attributes:
      workdir: directory that everything is written to.
      steps: total number of training steps, one batch each.
      batch_size: examples per step.
      seed: random seed of parameters, data order and noise.
      estimator: log-det estimator of the training loss.
      fit_lengths: refit the distribution of each block's series length at every validation (needs a `Roulette`).
      annealing: steps in which the weight of the log-det in the gradient rises from 0 to 1; 0 disables annealing.
      optimizer: learning rate, clipping, averaging.
      evaluation: how the likelihood is measured.
      log_every: steps between lines of metrics.jsonl.
      save_every: steps between further checkpoints; None saves at validations only.
      safety: what is done about losses and gradients that are not finite.
      parallel: how a step is divided among devices: by the compiler ("jit"), by `jax.shard_map` or by `jax.pmap`. The
        results are those of one device, up to rounding, if each device has an even number of examples.
      mesh: how batches and parameters are divided among devices.
      distributed: how the processes of a multi-process run find each other.
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
    safety: SafetyConfig = SafetyConfig()
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
                f"optimizer.milestones: expected numbers below {updates}, the number of updates, got "
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
      data: the images.
      model: the flow.
    """

    data: DataConfig
    model: ImageModel


@dataclass(frozen=True)
class VectorDataConfig:
    """The vectors of a run.

    Attributes:
      path: a .npy, .npz or .csv file; see `resflow_jax.data.vectors.load_vectors`. By default 30 measurements
        of 569 cell nuclei that scikit-learn ships.
      shift: D numbers that are subtracted from the vectors, in float64, before they become float32; by default none.
        Samples have it added. The command sets it for columns of `path` that are far from zero; see
        `resflow_jax.data.units`.
    """

    path: Path | None = None
    shift: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class VectorsConfig(RunConfig):
    """One run of `python -m experiments.density` on vectors.

    Attributes:
      data: the vectors.
      model: the flow.
    """

    data: VectorDataConfig
    model: VectorModel
