"""The classifiers that studies compare: their settings, their runs, and the figures of a finished run."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.configs.classes import CLASS_CONFIGS
from experiments.configs.classification import ClassifyConfig
from experiments.configs.tiny import tiny as tiny_run
from experiments.runs.devices import own_mesh
from experiments.runs.launch import run_config
from experiments.runs.likelihoods import PERMUTED
from experiments.runs.loop import training_loop
from experiments.runs.metrics_file import whole_lines, without_nan
from experiments.runs.saved import SavedFlow, has_all_steps, saved_flow
from experiments.runs.setup import place_on_devices, set_up
from experiments.runs.tasks import judging_classes
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.subset import subset
from experiments.runs.workdir import claim_workdir, write_atomically
from resflow_jax.functional.checks import check_choice, check_count

DATASETS = ("digits", "fashion_mnist")


@dataclass(frozen=True)
class Common:
    """What all runs of a study have in common.

    Attributes:
      data: name of the images, one of `DATASETS`.
      directory: work directories of the runs lie under it.
      steps: number of steps of every run; None for that of the config.
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
    if _test_line(config.workdir) is not None and has_all_steps(config):
        claim_workdir(config.workdir, config)  # raises for a run of other settings
        return False
    run_config(config)
    return True


def _test_line(workdir: Path) -> dict[str, Any] | None:
    """The line of metrics.jsonl on the test split, which a run writes at its end."""
    path = workdir / "metrics.jsonl"
    lines = whole_lines(path) if path.exists() else ()
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
    test, model = subset(task.splits.test, config.evaluation.examples), config.model
    logits, others = task.logits(flow, test.images, own_mesh()), {PERMUTED: task.permuted(test)}
    found, _ = judging_classes.measured(task, flow, test, others, logits, with_density=model.has_density)
    of_test, of_others = found["test"], found["other"][PERMUTED]
    result = {
        **dict(zip(("error", "error_stderr"), test_error(config.workdir), strict=True)),
        "cross_entropy": of_test["cross_entropy"],
        "ece": of_test["calibration_error"],
        "auroc_classes": of_others["auroc_max_p"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param))),
    }
    if model.coefficient is not None and model.head == "pooled":
        result["radius"] = found["robustness"]["median_radius"] or math.nan  # 0 if no image is classified rightly
    if model.has_density:
        result |= {"bits_per_dim": of_test["bits_per_dim"], "auroc_density": of_others["auroc_log_prob"]}
    return result


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
