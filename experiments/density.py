"""Density estimation on images: trains a residual flow and reports bits/dim on the test split.

    python -m experiments.density [NAME] [--workdir DIR] [--steps N] [--batch-size B] [--seed S] ...
    python -m experiments.density NAME --data.path IMAGES --model.shape H W C    on your own images
    python -m experiments.density NAME --tiny                                    two updates of a tiny flow, no data

`--help` behind a name lists every setting. `--data.path` takes a folder of image files, a .npy or .npz file, or IDX
files. The same command again resumes from the last checkpoint. Under the work directory it writes report.html, with
everything on one page, metrics.jsonl, samples.png, reconstructions.png, curves.png, config.json, certificate.json
and checkpoints/. The validation split chooses the checkpoint; the test split is read once, at the end.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import pictures
from experiments.configs import (
    ablations,
    celebahq64,
    celebahq256,
    cifar10,
    cifar10_densenet,
    digits,
    digits_densenet,
    fashion_mnist,
    imagenet32,
    imagenet64,
    mnist,
    photographs,
    svhn,
)
from experiments.configs.base import DataConfig, DensityConfig
from experiments.loop import training_loop
from experiments.page import write_report
from experiments.run import (
    MetricsFile,
    as_json,
    certificate_rows,
    claim_workdir,
    data_mesh,
    print_table,
    use_all_cores,
    use_compilation_cache,
    use_xla_flags,
    write_atomically,
)
from resflow_jax import ResidualFlow, certify
from resflow_jax.data.batches import Augmentation, Batches
from resflow_jax.data.embedded import load_digits, load_photographs
from resflow_jax.data.files import load_path
from resflow_jax.data.images import ImageSplits, dequantize, to_unit_interval
from resflow_jax.data.tfds import find_data_dir, load_tfds
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.likelihood import Estimate, dequantized_bits_per_dim, evaluate_bits_per_dim
from resflow_jax.training.step import Trainer, TrainState, fit_estimator


class StepTime(NamedTuple):
    """Median seconds of a training step, and those of them that it waits for data."""

    seconds: float
    waiting: float


MODULES = (
    digits,
    digits_densenet,
    photographs,
    mnist,
    fashion_mnist,
    cifar10,
    cifar10_densenet,
    svhn,
    imagenet32,
    imagenet64,
    celebahq64,
    celebahq256,
)
_SUMMARIES = {module.__name__.rpartition(".")[2]: module.__doc__.splitlines()[0] for module in MODULES}
CONFIGS = {name: module.CONFIG for name, module in zip(_SUMMARIES, MODULES, strict=True)} | ablations.CONFIGS


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs; `digits` if no name is given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    use_xla_flags()
    use_all_cores()
    change = tiny if "--tiny" in arguments else lambda config: config
    arguments = [argument for argument in arguments if argument != "--tiny"]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["digits", *arguments]
    if not arguments[0].startswith("-") and arguments[0] not in CONFIGS:
        sys.exit(f"NAME: expected one of {', '.join(CONFIGS)}; got {arguments[0]!r}")
    named = {
        name: (_SUMMARIES.get(name, ablations.__doc__.splitlines()[0]), change(config))
        for name, config in CONFIGS.items()
    }
    run(
        tyro.extras.overridable_config_cli(
            named, args=arguments, prog="python -m experiments.density", description=__doc__
        )
    )


def tiny(config: DensityConfig) -> DensityConfig:
    """A run of seconds to minutes through the same code: two updates of a tiny flow of the same kind.

    On crops of the embedded photographs, of the shape and the bits of the images that it stands for.
    """
    model = replace(
        config.model,
        blocks=(1,) * len(config.model.blocks),
        hidden_channels=8,
        dense_growth=4,
        fc_blocks=min(1, config.model.fc_blocks),
        fc_hidden=8,
        fc_dense_first=8,
        fc_dense_growth=4,
    )
    height, _, channels = model.shape
    embedded = replace(config.data, name="photographs", size=height, channels=channels)
    steps = 2 * config.optimizer.accumulate
    return replace(
        config,
        data=config.data if config.data.name == "digits" else embedded,
        model=model,
        workdir=config.workdir.with_name(f"{config.workdir.name}_tiny"),
        steps=steps,
        batch_size=8,
        evaluation=replace(config.evaluation, images=8, draws=1, every=steps),
    )


def run(config: DensityConfig) -> Estimate:
    """Trains (or goes on training), evaluates, draws. Returns the test bits/dim."""
    began = time.perf_counter()
    use_compilation_cache()
    data = load(config.data)
    if data.shape != config.model.shape:
        raise ValueError(f"model.shape: expected {data.shape}, the shape of the images, got {config.model.shape}")
    claim_workdir(config.workdir, config)
    trainer, state = set_up(config, data)
    with Checkpoints(config.workdir / "checkpoints") as checkpoints:
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(checkpoints.latest_step, state)
            print(f"resuming {config.workdir} at step {int(state.step)}")
        metrics = MetricsFile(config.workdir / "metrics.jsonl", keep_until=int(state.step))
        step_time = train(config, data, trainer, state, checkpoints, metrics)
        checkpoints.wait()
        best = checkpoints.restore(checkpoints.best_step, state)
    return report(config, data, tightened_flow(trainer, best), int(best.step), metrics, step_time, began)


def load(config: DataConfig) -> ImageSplits:
    """The images that a config names."""
    if config.path is not None:
        return load_path(config.path, bits=config.bits)
    if config.name == "digits":
        return load_digits()
    if config.name == "photographs":
        return load_photographs(config.size, config.channels, bits=config.bits)
    directory = config.dir or find_data_dir(config.name, Path("../shared/tfds"))
    return load_tfds(config.name, directory, bits=config.bits)


def set_up(config: DensityConfig, data: ImageSplits) -> tuple[Trainer, TrainState]:
    """The flow, initialised on a training batch, with its optimiser."""
    flow = ResidualFlow(config.model, rngs=nnx.Rngs(config.seed))
    height, width, _ = data.shape
    number = min(len(data.train), 512, max(config.batch_size, 2**22 // (height * width)))
    batch = Batches(data.train, seed=config.seed, batch_size=number)[0]
    flow.initialize(dequantize(jnp.asarray(batch), jax.random.key(config.seed), data.levels))
    loss = dequantized_bits_per_dim(data.levels)
    optimizer = config.optimizer.build(config.steps)
    trainer = Trainer(nnx.split(flow)[0], loss, optimizer, config.optimizer.ema_decay_a_batch)
    state = trainer.create_state(flow, config.estimator)
    return trainer, fit_estimator(state, config.batch_size) if config.fit_lengths else state


def train(
    config: DensityConfig,
    data: ImageSplits,
    trainer: Trainer,
    state: TrainState,
    checkpoints: Checkpoints,
    metrics: MetricsFile,
) -> StepTime | None:
    """Runs the remaining steps; validates and saves along the way. Returns what a step took, if any was taken.

    Raises:
      FloatingPointError: if the loss or the gradient stops being finite.
    """
    step_times, waiting = [], []
    augmentation = Augmentation(config.data.flip, config.data.crop)
    batches = Batches(data.train, seed=config.seed, batch_size=config.batch_size, augmentation=augmentation)

    def validates_at(step: int) -> bool:
        return step % config.evaluation.every == 0 or step == config.steps

    def at_pause(step: int, state: TrainState) -> TrainState:
        return fit_estimator(state, config.batch_size) if config.fit_lengths and validates_at(step) else state

    for at in training_loop(
        trainer,
        state,
        jax.random.key(config.seed),
        lambda step: batches.starting_at(step, threads=config.data.threads),
        steps=config.steps,
        pauses_at=lambda step: step % config.log_every == 0 or validates_at(step),
        unit="bits/dim",
        at_pause=at_pause,
        mesh=data_mesh(config.batch_size),
    ):
        step_times.append(at.seconds)
        waiting.append(at.waiting)
        line = {"bits_per_dim": float(at.metrics["loss"]), "gradient_norm": float(at.metrics["gradient_norm"])}
        line["diagnostics"] = {name: value.tolist() for name, value in at.metrics["diagnostics"]._asdict().items()}
        if validates_at(at.step):
            flow = tightened_flow(trainer, at.state)
            estimate = validate(config, data, flow)
            if not np.isfinite(estimate.mean):
                raise FloatingPointError(f"bits/dim of the validation split are {estimate.mean} at step {at.step}")
            line["validation_bits_per_dim"] = estimate.mean
            checkpoints.save(at.state, estimate.mean, certify(flow))
            at.bar.set_description(f"validation {estimate.mean:.3f} bits/dim")
        metrics.write(step=at.step, split="train", **line)
    return StepTime(float(np.median(step_times)), float(np.median(waiting))) if step_times else None


def tightened_flow(trainer: Trainer, state: TrainState) -> ResidualFlow:
    """The flow that a run is judged by: with the averaged weights, tightened."""
    flow = trainer.averaged_flow(state)
    flow.tighten()
    return flow


def validate(config: DensityConfig, data: ImageSplits, flow: ResidualFlow) -> Estimate:
    """Bits/dim of the validation split, with the same noise every time."""
    return evaluate_bits_per_dim(
        flow,
        data.validation[: config.evaluation.images],
        jax.random.key(config.seed + 1),
        levels=data.levels,
        estimator=config.evaluation.estimator,
        draws=1,
        mesh=data_mesh(jax.device_count()),
    )


def report(
    config: DensityConfig,
    data: ImageSplits,
    flow: ResidualFlow,
    step: int,
    metrics: MetricsFile,
    step_time: StepTime | None,
    began: float,
) -> Estimate:
    """Certifies the chosen flow and evaluates it on the test split, draws the pictures, prints the closing table."""
    certificate = certify(flow)
    write_atomically(config.workdir / "certificate.json", json.dumps(as_json(certificate.as_dict()), indent=2) + "\n")
    test = data.test[: config.evaluation.images]
    result = evaluate_bits_per_dim(
        flow,
        test,
        jax.random.key(config.seed + 2),
        levels=data.levels,
        estimator=config.evaluation.estimator,
        draws=config.evaluation.draws,
        mesh=data_mesh(jax.device_count()),
    )
    errors = {"data_stderr": result.data_stderr, "noise_stderr": result.noise_stderr}
    metrics.write(step=step, split="test", bits_per_dim=result.mean, bits_per_dim_stderr=result.stderr, **errors)

    images = to_unit_interval(test[:64], data.levels)
    reconstructions, status = flow.inverse(flow(images), return_status=True)
    samples = flow.sample(jax.random.key(config.seed + 3), 64)
    pictures.save_images(
        config.workdir / "samples.png",
        {"samples of the flow": samples, "images of the training set": to_unit_interval(data.train[:64], data.levels)},
        columns=8,
    )
    pictures.save_images(
        config.workdir / "reconstructions.png",
        {"test images x": images, "reconstructions $f^{-1}(f(x))$": reconstructions},
        columns=8,
    )
    pictures.save_curves(
        config.workdir / "curves.png", metrics.lines, f"{config.data.path or config.data.name}: bits/dim"
    )

    rows = {
        "test bits/dim": f"{result.mean:.4f} +- {result.stderr:.4f} ({len(test)} images, weights of step {step})",
        "of which": f"{result.data_stderr:.4f} from the choice of images, {result.noise_stderr:.4f} from noise",
        "reconstruction error": f"{jnp.max(jnp.abs(images - reconstructions)):.1e}, max |x - f^-1(f(x))|"
        + ("" if status.converged.all() else f"; {int((~status.converged.all(axis=0)).sum())} did not converge"),
        **certificate_rows(certificate),
        "time per step": "no step taken: the run was finished before"
        if step_time is None
        else f"{step_time.seconds * 1e3:.0f} ms, batches of {config.batch_size}; "
        f"{step_time.waiting / step_time.seconds:.1%} of it waiting for data",
        "time in all": f"{time.perf_counter() - began:.0f} s, set-up and compilation included",
        "written to": str(config.workdir),
    }
    names = {
        "bits/dim of training, validation and test": "curves",
        "samples": "samples",
        "reconstructions": "reconstructions",
    }
    write_report(
        config.workdir / "report.html",
        f"{config.workdir.name}: test bits/dim {result.mean:.4f} +- {result.stderr:.4f}",
        rows,
        {caption: config.workdir / f"{name}.png" for caption, name in names.items()},
        certificate,
        as_json(config),
    )
    print_table(rows)
    print(f"test bits/dim {result.mean:.4f} +- {result.stderr:.4f}")
    return result


if __name__ == "__main__":
    main()
