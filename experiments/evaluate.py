"""Evaluates a trained flow or classifier: likelihood or error, certificate, outliers.

    python -m experiments.evaluate RUN_DIR [--examples N] [--draws K] [--estimator exact] [--other DATA ...]
        [--workdir OUT]

RUN_DIR is the work directory of a run of `experiments.density` or `experiments.classify`, finished or still running.
With the default settings the bits/dim of the test split (nats for vectors) are those that the run itself printed.
`--estimator exact` computes the log-det from dense Jacobians instead of estimating it; it is practical for few images.

Out-of-distribution detection (Nalisnick et al. 2019, arXiv 1810.09136): examples of other data should have a lower
likelihood than test examples. The AUROC is the probability that a random example of the other data has a lower
likelihood than a random test example; ties count half. 0.5 is chance; below 0.5 the flow gives the other data the
higher likelihood. DATA is a path, as for `--data.path`, or the name of a data set, which is searched for in the
directory of the run's data; crops of "photographs" are always available. Without DATA the test split is permuted: all
images with the same permutation of pixels, vectors with each element permuted among the vectors.

`--typicality` tests how far the likelihood of each example is from that of training examples, on either side
(Nalisnick et al. 2019, arXiv 1906.02994; see `rf.Typicality`): an image of one colour may have a higher likelihood than
the run's own images. p-values are computed from the validation split.

Under OUT, by default RUN_DIR/evaluation, it writes evaluation.json, scores.npz (the likelihood of every example, means
over draws), histograms.png and, with `--typicality`, typicality.csv. That file has a line for each example: its set and
number, its likelihood in the unit of the run, its distance from that of training examples, its p-value, and the
fraction of validation examples that are less likely.

Of a classifier it measures the error in %, the cross-entropy, the calibration error, the certified radius with a
gradient attack within it, and the AUROC by max p(y | x); with a density also the bits/dim and the AUROC by log p(x).
Without a density `--draws`, `--estimator` and `--typicality` are refused. DATA needs no labels. scores.npz has the
logits and labels of the test images, and max p(y | x) and the bits/dim of each image of each set.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments.runs import pictures
from experiments.runs.choices import OfTheRun
from experiments.runs.class_evaluation import check_density_settings, evaluate_classes
from experiments.runs.command import Command, Output
from experiments.runs.devices import use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.launch import cores_for_run
from experiments.runs.likelihoods import (
    EXACT_BATCH_SIZE,
    PERMUTED,
    RECONSTRUCTED,
    auroc,
    named,
    reconstruction,
    reconstruction_row,
    typicality_csv,
    typicality_of,
    typicality_rows,
    typicality_summary,
)
from experiments.runs.saved import MovedData, SavedFlow, Weights, saved_config, saved_flow
from experiments.runs.tables import certificate_rows, error_by_cause, print_table
from experiments.runs.tasks.classes import ClassTask
from experiments.runs.tasks.subset import subset
from experiments.runs.tasks.task import Task
from experiments.runs.tiny_run import TINY_RUN, make_if_missing
from experiments.runs.workdir import write_arrays, write_atomically
from resflow_jax import Estimator, Exact, certify
from resflow_jax.functional.checks import check_count
from resflow_jax.io.config_json import as_json


@dataclass(frozen=True)
class EvaluateConfig:
    """One run of `python -m experiments.evaluate`.

    Attributes:
      run_dir: work directory of a run of `experiments.density` or `experiments.classify`.
      weights: "best" uses the weights of the best validation, "latest" those of the latest checkpoint.
      examples: maximum number of examples of each test split; by default that of the run.
      draws: number of draws of dequantisation noise and log-det estimate for each example; by default that of the run.
      estimator: log-det estimator; by default that of the run. With `exact`, give `examples` too.
      typicality: whether to apply the typicality test to each example too. It uses as many training examples, and
        the validation split; typicality.csv has a line for each example.
      other: paths or names of other data of the same shape.
      workdir: directory that everything is written to; by default RUN_DIR/evaluation.
      data: present place of the run's data, if they have been moved.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    weights: Weights = "best"
    examples: int | None = None
    draws: int | None = None
    typicality: bool = False
    estimator: Estimator | OfTheRun = OfTheRun()
    other: tuple[str, ...] = ()
    workdir: Path | None = None
    data: MovedData = MovedData()

    def __post_init__(self):
        if self.examples is not None:
            check_count("examples", self.examples, 2)
        if set(self.other) & {"test", "file"}:
            raise ValueError(f"other: expected names other than 'test' and 'file', got {self.other}; ./test is a path")
        if self.draws is not None:
            check_count("draws", self.draws, 1)
        if isinstance(self.estimator, Exact) and self.examples is None:
            raise ValueError("examples: expected a number with the exact estimator, whose cost is high; got None")

    @property
    def out(self) -> Path:
        """The directory that is written to."""
        return self.workdir or self.run_dir / "evaluation"


def tiny(config: EvaluateConfig) -> EvaluateConfig:
    """Eight images of a tiny run."""
    return replace(config, run_dir=TINY_RUN, examples=8, draws=1)


def output(config: EvaluateConfig) -> Output:
    """The files that are written."""
    of_typicality = ("typicality.csv",) if config.typicality else ()
    return Output(config.out, ("evaluation.json", "scores.npz", "histograms.png", *of_typicality))


COMMAND = Command(
    "experiments.evaluate",
    __doc__,
    EvaluateConfig(tyro.MISSING),
    tiny,
    output,
    renamed={
        "--exact": "--estimator exact",
        "--data": "--data.path PATH for files of your own, --data.dir DIR for TensorFlow data sets",
    },
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(_run_on_its_cores, arguments)


def _run_on_its_cores(config: EvaluateConfig) -> None:
    """Runs on as many CPU devices as the run had, since the noise of an evaluation depends on their number."""
    exists = (config.run_dir / "config.json").exists()
    use_all_cores(cores_for_run(saved_config(config.run_dir, config.data)) if exists else None)
    run(config)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measures, draws and prints; returns the content of evaluation.json."""
    use_compilation_cache()
    make_if_missing(config.run_dir)
    saved = saved_flow(config.run_dir, config.weights, config.data)
    task, settings = saved.task, saved.config.evaluation
    test = subset(task.splits.test, config.examples or settings.examples)
    others = {name: subset(task.other(name), len(test)) for name in config.other} or {PERMUTED: task.permuted(test)}
    if isinstance(task, ClassTask):
        asked = None if isinstance(config.estimator, OfTheRun) else config.estimator
        check_density_settings(saved, typicality=config.typicality, estimator=asked, draws=config.draws)
    workdir = config.out
    workdir.mkdir(parents=True, exist_ok=True)

    estimator = settings.estimator if isinstance(config.estimator, OfTheRun) else config.estimator
    draws = config.draws or settings.draws

    about = {"run": str(config.run_dir), "weights": config.weights, "step": saved.step}
    if isinstance(task, ClassTask):
        options = {"estimator": estimator, "draws": draws, "typicality": config.typicality}
        return evaluate_classes(saved, test, others, **options, about=about, workdir=workdir)

    def scores_of(examples: np.ndarray) -> np.ndarray:
        key = jax.random.key(saved.config.seed + 2)  # the run's own key, so that the figures are the same
        # Another size than the run's gives other noise: it is for exact log-dets that were asked for here.
        batch_size = EXACT_BATCH_SIZE if isinstance(config.estimator, Exact) else task.batch_size
        return task.scores(saved.flow, examples, key, estimator, draws, batch_size)

    scores = {"test": scores_of(test)} | {name: scores_of(examples) for name, examples in others.items()}
    means = {name: draws_of.mean(axis=0) for name, draws_of in scores.items()}
    losses = {name: task.sign * mean for name, mean in means.items()}
    judged = {}
    if config.typicality:
        references = [subset(split, len(test)) for split in (task.splits.train, task.splits.validation)]
        references = [scores_of(examples).mean(axis=0) for examples in references]
        judged = typicality_of(task.sign, math.prod(saved.flow.event_shape), references, means)
        write_atomically(workdir / "typicality.csv", typicality_csv(means, judged))
    error, unconverged = reconstruction(saved.flow, task.inputs(test[:RECONSTRUCTED]))
    certificate = certify(saved.flow)
    result = {
        **about,
        "estimator": as_json(estimator),
        "draws": draws,
        "test": summary(task, scores["test"], estimator),
        "reconstruction": {"examples": len(test[:RECONSTRUCTED]), "error": error, "unconverged": unconverged},
        "certificate": certificate.as_dict(),
        "other": {
            name: {"auroc": auroc(losses["test"], losses[name]), **summary(task, scores[name], estimator)}
            for name in others
        },
    }
    if judged:
        result["typicality"] = typicality_summary(judged)
    write_atomically(workdir / "evaluation.json", json.dumps(as_json(result), indent=2) + "\n")
    write_arrays(workdir / "scores.npz", **means)
    draw(workdir, saved, means, result)
    print_table({**rows(task, result), **certificate_rows(certificate)})
    return result


def summary(task: Task, scores: np.ndarray, estimator: Estimator) -> dict[str, float]:
    """The number of examples, the mean metric and its standard errors, from scores [draws, N]."""
    estimate = task.mean(scores, estimator)._asdict()
    return {"examples": scores.shape[1], task.metric: estimate.pop("mean"), **estimate}


def draw(workdir: Path, saved: SavedFlow, means: dict[str, np.ndarray], result: dict[str, Any]) -> None:
    """Draws histograms of the likelihoods of the examples of each set."""
    name, label = saved.task.name, saved.task.label
    labels = {"test": f"{name}, test split"}
    for other, found in result["other"].items():
        labels[other] = f"{named(other)}: AUROC {found['auroc']:.3f}"
    pictures.save_histograms(
        workdir / "histograms.png",
        {f"{label} of an example": {labels[key]: values for key, values in means.items()}},
        title=f"a flow trained on {name}, step {result['step']}",
    )


def rows(task: Task, result: dict[str, Any]) -> dict[str, str]:
    """The lines of the closing table on likelihoods and the inverse."""
    test, found = result["test"], result["reconstruction"]
    table = {
        f"test {task.label}": f"{test[task.metric]:.4f} +- {test['stderr']:.4f} ({test['examples']} examples, "
        f"weights of step {result['step']})",
        "standard error": f"{error_by_cause(test['data_stderr'], test['noise_stderr'])} ({result['draws']} draws, "
        f"{result['estimator']['type']})",
        **task.notes,
        "reconstruction error": reconstruction_row(found),
    }
    for name, other in result["other"].items():
        table[f"AUROC, {name}"] = (
            f"{other['auroc']:.4f}, of {named(name)}: {other[task.metric]:.4f} +- {other['stderr']:.4f} {task.unit}"
        )
    return table | typicality_rows(result.get("typicality", {}))


if __name__ == "__main__":
    main()
