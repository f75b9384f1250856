"""Imports a checkpoint of the authors' PyTorch code as a run.

    python -m experiments.import_torch model.pth --workdir DIR [--data.name NAME | --data.path IMAGES] [--steps N]
    python -m experiments.evaluate DIR
    python -m experiments.sample DIR
    python -m experiments.resume DIR

The run can be evaluated, sampled and resumed. The command reads a file of `train_img.py` or `train_toy.py`, without
PyTorch and without executing anything in it, and writes config.json and checkpoints/ under DIR. The checkpoint is that
of step 0: the raw weights, their moving average if the file has one, converged power iterations, and a new optimiser.
Batch size, estimator, learning rate, warm-up, annealing and accumulation are those of the file; a toy has exact
log-dets. Settings that cannot be imported are listed. A file with a classifier becomes a run of `experiments.classify`:
with its task "hybrid" the loss of a resumed run is -log p(y | x) - log p(x), or -log p(y | x) - log p(x) / D if its
option scale_dim is set, as in the authors' code; with "classification" the density is neither trained nor evaluated.
The imported weights count as the best until the first validation of a resumed run.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from experiments.configs import celebahq64, celebahq256, cifar10, imagenet32, imagenet64, mnist, svhn
from experiments.configs.base import OPTIMIZERS, DataConfig, DensityConfig, OptimizerConfig, RunConfig
from experiments.configs.classification import ClassifyConfig, HybridConfig, ImportedClassifyConfig
from experiments.configs.published import OPTIMIZER, published
from experiments.configs.toy import ToyConfig
from experiments.runs.command import Command, Output
from experiments.runs.lock import locked
from experiments.runs.tables import certificate_rows, print_table
from experiments.runs.workdir import claim_workdir
from resflow_jax import DenseTail, ImageFlowConfig, ResidualFlow, certify, save_torch_checkpoint
from resflow_jax.functional.checks import check_count, error_text, names_text
from resflow_jax.interop.torch.checkpoints import flow_of, parts_of
from resflow_jax.interop.torch.files import read_torch_file
from resflow_jax.interop.torch.options import TRAINING_DEFAULTS, checked_options, data_levels, estimator_from_args
from resflow_jax.interop.torch.storages import brief
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.step import Trainer, TrainState

_DATA = {
    "mnist": mnist.CONFIG.data,
    "cifar10": cifar10.CONFIG.data,
    "svhn": svhn.CONFIG.data,
    "imagenet32": imagenet32.CONFIG.data,
    "imagenet64": imagenet64.CONFIG.data,
    "celebahq": celebahq256.CONFIG.data,
    "celeba_5bit": celebahq64.CONFIG.data,
}


@dataclass(frozen=True)
class ImportConfig:
    """One call of `python -m experiments.import_torch`.

    Attributes:
      checkpoint: checkpoint file of the authors' code.
      workdir: work directory of the new run.
      data: images that the run is evaluated and resumed with; by default those that the file names.
      steps: number of steps of a resumed run.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    workdir: Path
    data: DataConfig = DataConfig("")
    steps: int = 10_000

    def __post_init__(self):
        check_count("steps", self.steps, 1)


TINY = Path("runs/import_torch_tiny")


def tiny(config: ImportConfig) -> ImportConfig:
    """Imports a tiny flow for the digits, which is first written as a PyTorch file."""
    return replace(
        config, checkpoint=TINY / "model.pth", workdir=TINY / "run", data=replace(config.data, name="digits"), steps=2
    )


COMMAND = Command(
    "experiments.import_torch",
    __doc__,
    ImportConfig(tyro.MISSING, tyro.MISSING),
    tiny,
    output=lambda config: Output(config.workdir, ("config.json", "checkpoints/")),
    renamed={"--data": "--data.name NAME or --data.path IMAGES"},
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: ImportConfig) -> Path:
    """Writes the run, prints a summary, and returns its work directory.

    Raises:
      FileExistsError: if the work directory holds a run already.
      ValueError, FileNotFoundError: as `load_torch_checkpoint`.
    """
    if (config.workdir / "checkpoints").exists():
        raise FileExistsError(f"workdir: expected a directory without a run, got {config.workdir} with checkpoints")
    if config.checkpoint == TINY / "model.pth":
        write_tiny_checkpoint(config.checkpoint)
    content = read_torch_file(config.checkpoint)
    try:
        _, args = parts_of(content)
        checked_options(args, TRAINING_DEFAULTS)
        print("converging the norms of the raw weights and of the averages", flush=True)
        raw, averaged = (flow_of(content, weights, "converged") for weights in ("raw", None))
        settings = run_config(args, averaged, config)
        left_out = ", ".join(not_carried_over(args)) or "nothing"
    except ValueError as error:
        raise ValueError(f"{config.checkpoint}: {error_text(error)}") from error
    certificate = certify(averaged)
    with locked(config.workdir), ExitStack() as stack:
        claim_workdir(config.workdir, settings)
        checkpoints = stack.enter_context(Checkpoints(config.workdir / "checkpoints"))
        checkpoints.save(imported_state(settings, raw, averaged), sys.float_info.max, certificate)
    print_table(
        {
            "flow": f"{averaged.blocks} blocks, {averaged.dim} dimensions",
            **certificate_rows(certificate),
            "not carried over": left_out,
            "to evaluate it": f"python -m experiments.evaluate {config.workdir}",
            **({"to sample it": f"python -m experiments.sample {config.workdir}"} if has_density(settings) else {}),
            "to go on": f"python -m experiments.resume {config.workdir}",
        }
    )
    return config.workdir


def write_tiny_checkpoint(path: Path) -> None:
    """Writes a file in the format of PyTorch with a tiny untrained flow for the digits."""
    sizes = {"blocks": (1,), "hidden_channels": 4, "kernels": (3, 3), "tail": DenseTail(0)}
    model = ImageFlowConfig((8, 8, 1), preactivation="all", **sizes)
    flow = ResidualFlow(model, rngs=nnx.Rngs(0))
    flow.initialize(jax.random.uniform(jax.random.key(0), (8, *model.shape)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_torch_checkpoint(flow, path)


def imported_state(settings: RunConfig, raw: ResidualFlow, averaged: ResidualFlow) -> TrainState:
    """The state before the first step, whose moving average has no bias towards its start."""
    decay = settings.optimizer.ema_decay
    trainer = Trainer(nnx.graphdef(raw), _no_loss, settings.optimizer.build(settings.steps), decay)
    state = trainer.create_state(raw, settings.estimator)
    averaged = _with_constants_of(raw, averaged)
    return state._replace(ema=optax.EmaState(jnp.asarray(2**20), nnx.state(averaged, nnx.Param)))


def _with_constants_of(flow: ResidualFlow, other: ResidualFlow) -> ResidualFlow:
    """The other flow with the centers and standard deviations of the first, since a state has one set: the same map."""
    other = nnx.clone(other)
    for (_, theirs), (_, ours) in zip(nnx.iter_modules(other), nnx.iter_modules(flow), strict=True):
        if isinstance(theirs, ActNorm):
            theirs.set_constants(ours.center[...], ours.std[...])
    return other


def _no_loss(*_):
    raise NotImplementedError("an imported state is written, not trained")


def not_carried_over(args: argparse.Namespace) -> list[str]:
    """The settings in use in the file's training that a run of this library does not have."""
    unused = {
        "dropout": 0,
        "wd": 0,
        "weight_decay": 0,
        "scheduler": False,
        "add_noise": True,
        "neumann_grad": True,
        "var_reduc_lr": 0,
        "brute_force": False,
        "exact_trace": False,
    }
    found = [
        f"{name}={brief(getattr(args, name))}" for name, value in unused.items() if getattr(args, name, value) != value
    ]
    if is_classifier(args) and getattr(args, "annealing_iters", 0):
        found.append(f"annealing_iters={args.annealing_iters}")
    optimizer = getattr(args, "optimizer", OPTIMIZER.name)
    return [*found, *([f"optimizer={names_text([optimizer])}"] if optimizer not in OPTIMIZERS else [])]


def run_config(args: argparse.Namespace, flow: ResidualFlow, config: ImportConfig) -> RunConfig:
    """The config of a run with those settings of the file's training that this library has."""
    given = vars(args)
    if not isinstance(flow.config, ImageFlowConfig):
        if config.data != DataConfig(""):
            raise ValueError("data: expected no settings for a file of the toy script, which has its own densities")
        rate = float(given.get("lr", OPTIMIZER.learning_rate))  # the toy script neither warms up nor decays
        return ToyConfig(
            workdir=config.workdir,
            data=given.get("data", "pinwheel"),
            model=flow.config,
            steps=config.steps,
            batch_size=given.get("batch_size", 500),
            annealing=min(given.get("annealing_iters", 0), config.steps),
            optimizer=OptimizerConfig(learning_rate=rate, warmup=0, schedule="constant", ema_decay=0.99),
        )
    estimator = estimator_from_args(args)
    data, bits = config.data, (data_levels(args) - 1).bit_length()
    if data.bits not in (DataConfig("").bits, bits):
        raise ValueError(f"data.bits: expected {bits}, as in the file, got {data.bits}")
    if not data.name and data.path is None:
        asked = {name: value for name, value in vars(data).items() if value != getattr(DataConfig(""), name)}
        data = replace(_DATA[given.get("data", "cifar10")], **asked)
    data = replace(data, name=data.name or "images", bits=bits)
    optimizer = replace(
        OPTIMIZER,
        name=given.get("optimizer") if given.get("optimizer") in OPTIMIZERS else OPTIMIZER.name,
        learning_rate=float(given.get("lr", OPTIMIZER.learning_rate)),
        warmup=given.get("warmup_iters", OPTIMIZER.warmup),
        accumulate=given.get("update_freq", OPTIMIZER.accumulate),
    )
    steps = -(-config.steps // optimizer.accumulate) * optimizer.accumulate
    settings = published(
        data,
        flow.config,
        workdir=config.workdir,
        steps=steps,
        batch_size=given.get("batchsize", 64),
        annealing=min(given.get("annealing_iters", 0), steps),
        estimator=estimator,
        optimizer=optimizer,
    )
    if not is_classifier(args):
        return settings
    common = {field.name: getattr(settings, field.name) for field in fields(DensityConfig)} | {"annealing": 0}
    return ImportedClassifyConfig(**common, hybrid=HybridConfig(density_weight(args)))


def is_classifier(args: argparse.Namespace) -> bool:
    """Whether the file's training had classes."""
    return getattr(args, "task", "density") in ("classification", "hybrid")


def density_weight(args: argparse.Namespace) -> float | Literal["1/D"]:
    """The weight of log p(x) beside log p(y | x), both in nats.

    The authors' loss is the cross-entropy in bits plus the bits of an image, or its bits/dim with scale_dim
    (`train_img.py`, `train`).
    """
    if args.task == "classification":
        return 0.0
    return "1/D" if getattr(args, "scale_dim", False) else 1.0


def has_density(settings: RunConfig) -> bool:
    """Whether a resumed run has a density of x, and so samples."""
    return not isinstance(settings, ClassifyConfig) or bool(settings.hybrid.weight)


if __name__ == "__main__":
    main()
