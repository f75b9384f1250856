"""The classifiers that studies compare: their settings, their runs, and the figures of a finished run."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from scipy.special import log_softmax

from experiments.configs.classes import CLASS_CONFIGS
from experiments.configs.classification import ClassifyConfig
from experiments.configs.tiny import tiny as tiny_run
from experiments.runs.devices import own_mesh
from experiments.runs.launch import run_config
from experiments.runs.likelihoods import auroc
from experiments.runs.loop import training_loop
from experiments.runs.metrics_file import without_nan
from experiments.runs.saved import SavedFlow, saved_flow
from experiments.runs.setup import place_on_devices, set_up
from experiments.runs.tasks.judging_classes import bits_of
from experiments.runs.tasks.of_config import task_of
from experiments.runs.workdir import claim_workdir, write_atomically
from resflow_jax import certified_radius
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.class_evaluation import calibration_error

DATASETS = ("digits", "fashion_mnist")


@dataclass(frozen=True)
class Common:
    """What all runs of a study have in common.

    Attributes:
      data: name of the images, one of `DATASETS`.
      directory: work directories of the runs lie under it.
      steps: of every run; None for those of the config.
      data_dir: directory of TensorFlow data sets; None for the default.
      small: whether to make the runs as small as those of `--tiny`.
      examples: maximum number of images of a split that are evaluated; None for that of the config.
    """

    data: str
    directory: Path
    steps: int | None = None
    data_dir: str | None = None
    small: bool = False
    examples: int | None = None

    def __post_init__(self):
        check_choice("data", self.data, DATASETS)
        if self.steps is not None:
            check_count("steps", self.steps, 1)
        if self.examples is not None:
            check_count("examples", self.examples, 2)

    @property
    def base(self) -> ClassifyConfig:
        """The invertible network of these images, in `experiments.configs.classes`."""
        return CLASS_CONFIGS[self.data]

    def run(self, config: ClassifyConfig, name: str, seed: int = 0) -> ClassifyConfig:
        """The settings of a run in the work directory `name`."""
        if self.small:
            config = tiny_run(config)
            one_stage = replace(config.model, blocks=config.model.blocks[:1], hidden_channels=(4,))
            config = replace(config, model=one_stage)
        examples = self.examples or config.evaluation.examples
        return replace(
            config,
            data=replace(config.data, dir=self.data_dir),
            evaluation=replace(config.evaluation, examples=examples),
            workdir=self.directory / name,
            steps=self.steps or config.steps,
            seed=seed,
        )


def with_coefficient(config: ClassifyConfig, coefficient: float) -> ClassifyConfig:
    """The same network with another bound on its convolutions."""
    return replace(config, model=replace(config.model, coefficient=coefficient))


def finish(config: ClassifyConfig) -> bool:
    """Trains a run to its end, unless it is finished. Returns whether there was something to do.

    Raises:
      ValueError: if the directory holds a run of other settings.
    """
    if _is_finished(config):
        claim_workdir(config.workdir, config)  # raises for a run of other settings
        return False
    run_config(config)
    return True


def _is_finished(config: ClassifyConfig) -> bool:
    """Whether the run has taken all its steps and has evaluated the test split."""
    directory = config.workdir / "checkpoints"
    if not directory.is_dir() or _test_line(config.workdir) is None:
        return False
    with Checkpoints(directory) as checkpoints:
        return checkpoints.latest_step == config.steps


def _test_line(workdir: Path) -> dict[str, Any] | None:
    """The line of metrics.jsonl on the test split, which a run writes at its end."""
    path = workdir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return next((line for line in lines if line["split"] == "test"), None)


def test_error(workdir: Path) -> list[float]:
    """The test error in % of a finished run, and its standard error from the choice of the images."""
    line = _test_line(workdir)
    if line is None:
        raise ValueError(f"workdir: expected a finished run, got {workdir} without a test error in metrics.jsonl")
    return [line["error"], line["error_stderr"]]


def measured(config: ClassifyConfig) -> dict[str, float | None]:
    """The figures of a run, which is made first if it is not finished.

    They are kept in figures.json in its work directory, and read from there the next time.

    Returns:
      {name: value} as of `figures`, with None for what is not finite.
    """
    path = config.workdir / "figures.json"
    if not finish(config) and path.exists():
        return json.loads(path.read_text())
    found = without_nan(figures(saved_flow(config.workdir)) | {"step_seconds": step_seconds(config)})
    write_atomically(path, json.dumps(found, indent=2) + "\n")
    return found


def figures(saved: SavedFlow) -> dict[str, float]:
    """What a classifier is judged by.

    Returns:
      error and error_stderr in %; cross_entropy in nats; ece; auroc_classes, of test images with their pixels permuted
      by max p(y | x); radius, the median certified radius of the images that are classified rightly; parameters. For a
      network with a density also bits_per_dim and auroc_density, of the permuted images by log p(x).
    """
    config, task, flow, _ = saved
    test = task.splits.test[: config.evaluation.examples]
    disordered = task.permuted(test)
    logits, others = (task.logits(flow, images, own_mesh()) for images in (test.images, disordered))
    log_p, log_p_of_others = (log_softmax(values.astype(np.float64), axis=1) for values in (logits, others))
    is_right = logits.argmax(axis=1) == test.labels
    error, stderr = test_error(config.workdir)
    found = {
        "error": error,
        "error_stderr": stderr,
        "cross_entropy": float(-log_p[np.arange(len(test)), test.labels].mean()),
        "ece": calibration_error(np.exp(log_p), test.labels),
        "auroc_classes": auroc(-log_p.max(axis=1), -log_p_of_others.max(axis=1)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param))),
    }
    if config.model.coefficient is not None and config.model.head == "pooled":
        radii = certified_radius(flow, logits)
        found["radius"] = float(np.median(radii[is_right])) if is_right.any() else math.nan
    if config.model.has_density:
        bits, bits_of_others = (bits_of(task, flow, images).mean(axis=0) for images in (test.images, disordered))
        found["bits_per_dim"] = float(bits.mean())
        found["auroc_density"] = auroc(bits, bits_of_others) if np.isfinite([bits, bits_of_others]).all() else math.nan
    return found


def step_seconds(config: ClassifyConfig, pauses: int = 5, every: int = 10) -> float:
    """Median seconds of a training step on these devices, from a few steps that are thrown away.

    The run's own time would depend on what else the machine did meanwhile.
    """
    every = min(every, config.steps)
    task = task_of(config)
    trainer, state = set_up(task)
    placement = place_on_devices(trainer, config)
    loop = training_loop(
        placement,
        state,
        jax.random.key(config.seed),
        lambda step: task.batches(step, placement.part, placement.parts),
        steps=(pauses + 1) * every,
        pauses_at=lambda step: step % every == 0,
        unit=task.unit,
    )
    return float(np.median([pause.seconds for pause in loop][1:]))  # the first pause compiles


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
