"""Evaluates a trained flow: likelihood, reconstruction, certificate, outliers.

    python -m experiments.evaluate RUN_DIR [--examples N] [--draws K] [--estimator exact] [--other DATA ...]
        [--workdir OUT]

RUN_DIR is the work directory of an `experiments.density` run, finished or still running. With the default settings the
bits/dim of the test split (nats for vectors) are those that the run itself printed. `--estimator exact` computes the
log-det from dense Jacobians instead of estimating it; it is practical for few images.

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
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from experiments.runs import pictures
from experiments.runs.choices import OfTheRun
from experiments.runs.command import Command, Output
from experiments.runs.devices import devices_for, use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.parts import over_parts
from experiments.runs.saved import MovedData, SavedFlow, Weights, saved_flow
from experiments.runs.tables import certificate_rows, error_by_cause, print_table
from experiments.runs.tasks.task import Task
from experiments.runs.tiny_run import TINY_RUN, make_if_missing
from experiments.runs.workdir import write_atomically
from resflow_jax import Estimator, Exact, ResidualFlow, Typicality, certify
from resflow_jax.functional.checks import check_count
from resflow_jax.io.config_json import as_json

Array = jax.Array

RECONSTRUCTED = 64  # test examples
EXACT_BATCH_SIZE = 4  # examples whose dense Jacobians are in memory at once
PERMUTED = "permuted"


@dataclass(frozen=True)
class EvaluateConfig:
    """One run of `python -m experiments.evaluate`.

    Attributes:
      run_dir: work directory of a run of `experiments.density`.
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


COMMAND = Command(
    "experiments.evaluate",
    __doc__,
    EvaluateConfig(tyro.MISSING),
    tiny,
    output=lambda config: Output(config.out, ("evaluation.json", "scores.npz", "histograms.png")),
    renamed={
        "--exact": "--estimator exact",
        "--data": "--data.path PATH for files of your own, --data.dir DIR for TensorFlow data sets",
    },
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    use_all_cores()
    COMMAND.call(run, arguments)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measures, draws and prints; returns the content of evaluation.json."""
    use_compilation_cache()
    make_if_missing(config.run_dir)
    saved = saved_flow(config.run_dir, config.weights, config.data)
    task, settings = saved.task, saved.config.evaluation
    test = task.splits.test[: config.examples or settings.examples]
    others = {name: task.other(name)[: len(test)] for name in config.other} or {PERMUTED: task.permuted(test)}
    workdir = config.out
    workdir.mkdir(parents=True, exist_ok=True)

    estimator = settings.estimator if isinstance(config.estimator, OfTheRun) else config.estimator
    draws = config.draws or settings.draws

    def scores_of(examples: np.ndarray) -> np.ndarray:
        key = jax.random.key(saved.config.seed + 2)  # the run's own key, so that the figures are the same
        batch_size = EXACT_BATCH_SIZE if isinstance(estimator, Exact) else task.batch_size
        return task.scores(saved.flow, examples, key, estimator, draws, batch_size)

    scores = {"test": scores_of(test)} | {name: scores_of(examples) for name, examples in others.items()}
    means = {name: draws_of.mean(axis=0) for name, draws_of in scores.items()}
    losses = {name: task.sign * mean for name, mean in means.items()}
    judged = {}
    if config.typicality:
        references = [task.splits.train[: len(test)], task.splits.validation[: len(test)]]
        judged = judge(task, saved.flow, [scores_of(examples).mean(axis=0) for examples in references], means)
        write_atomically(workdir / "typicality.csv", typicality_csv(means, judged))
    error, unconverged = reconstruction(saved.flow, task.inputs(test[:RECONSTRUCTED]))
    certificate = certify(saved.flow)
    result = {
        "run": str(config.run_dir),
        "weights": config.weights,
        "step": saved.step,
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
        result["typicality"] = {
            name: {
                "rejected_at_0.05": float((found["p_value"] <= 0.05).mean()),
                "auroc": auroc(judged["test"]["score"], found["score"]),
            }
            for name, found in judged.items()
        }
    write_atomically(workdir / "evaluation.json", json.dumps(as_json(result), indent=2) + "\n")
    np.savez(workdir / "scores.npz", **means)
    draw(workdir, saved, means, result)
    print_table({**rows(task, result), **certificate_rows(certificate)})
    return result


def judge(
    task: Task, flow: ResidualFlow, references: list[np.ndarray], means: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Score, p-value and quantile of every example of each set, from metrics of training and of validation examples.

    The metric may have any unit, and may fall or rise with the log-density, like bits/dim or nats. Scores have its
    unit.
    """

    def likelihoods(values: np.ndarray) -> Array:
        return jnp.asarray(-task.sign * values, jnp.result_type(float))

    typicality = Typicality.from_log_probs(*map(likelihoods, references), dim=math.prod(flow.event_shape))
    judged = {}
    for name, values in means.items():
        found = {what: getattr(typicality, what)(likelihoods(values)) for what in ("score", "p_value", "quantile")}
        judged[name] = {what: np.asarray(array) for what, array in found.items()}
    return judged


def typicality_csv(means: dict[str, np.ndarray], judged: dict[str, dict[str, np.ndarray]]) -> str:
    """The text of typicality.csv, one line for each example."""
    lines = ["set,example,likelihood,score,p_value,quantile"]
    for name, found in judged.items():
        columns = zip(means[name], *found.values(), strict=True)
        lines += [f"{name},{n}," + ",".join(f"{value:.9g}" for value in row) for n, row in enumerate(columns)]
    return "\n".join(lines) + "\n"


def auroc(test: np.ndarray, other: np.ndarray) -> float:
    """The probability that an example of the other data has a larger loss than a test example; ties count half.

    It is NaN without examples, or if a loss is NaN. Losses may be infinite.
    """
    losses = np.concatenate([test, other])
    if not (len(test) and len(other)) or np.isnan(losses).any():
        return math.nan
    labels = np.repeat([0, 1], [len(test), len(other)])
    return float(roc_auc_score(labels, rankdata(losses)))


def reconstruction(flow: ResidualFlow, examples: Array) -> tuple[float, int]:
    """max |x - f^-1(f(x))| over examples x, and the number of examples whose inverse did not converge."""

    def round_trip(flow: ResidualFlow, x: Array) -> tuple[Array, Array]:
        reconstructed, status = flow.inverse(flow(x), return_status=True)
        return reconstructed, status.converged.all(axis=0)

    parts = examples.reshape(devices_for(len(examples)), -1, *examples.shape[1:])
    reconstructed, converged = over_parts(round_trip, flow)(parts)
    return float(np.abs(np.asarray(examples) - np.asarray(reconstructed)).max()), int(jnp.sum(~converged))


def summary(task: Task, scores: np.ndarray, estimator: Estimator) -> dict[str, float]:
    """The number of examples, the mean metric and its standard errors, from scores [draws, N]."""
    estimate = task.mean(scores, estimator)._asdict()
    return {"examples": scores.shape[1], task.metric: estimate.pop("mean"), **estimate}


def draw(workdir: Path, saved: SavedFlow, means: dict[str, np.ndarray], result: dict[str, Any]) -> None:
    """Draws histograms of the likelihoods of the examples of each set."""
    name, label = saved.task.name, saved.task.label
    labels = {"test": f"{name}, test split"}
    for other, found in result["other"].items():
        labels[other] = f"{_named(other)}: AUROC {found['auroc']:.3f}"
    pictures.save_histograms(
        workdir / "histograms.png",
        {labels[key]: values for key, values in means.items()},
        xlabel=f"{label} of an example",
        title=f"a flow trained on {name}, step {result['step']}",
    )


def rows(task: Task, result: dict[str, Any]) -> dict[str, str]:
    """The lines of the closing table on likelihoods and the inverse."""
    test, found = result["test"], result["reconstruction"]
    table = {
        f"test {task.label}": f"{test[task.metric]:.4f} +- {test['stderr']:.4f} ({test['examples']} examples, "
        f"weights of step {result['step']})",
        "of which": f"{error_by_cause(test['data_stderr'], test['noise_stderr'])} ({result['draws']} draws, "
        f"{result['estimator']['type']})",
        "reconstruction error": f"{found['error']:.1e}, max |x - f^-1(f(x))| of {found['examples']} test examples"
        + (f"; {found['unconverged']} DID NOT CONVERGE" if found["unconverged"] else ""),
    }
    for name, other in result["other"].items():
        table[f"AUROC, {name}"] = (
            f"{other['auroc']:.4f}, of {_named(name)}: {other[task.metric]:.4f} +- {other['stderr']:.4f} {task.unit}"
        )
    for name, found in result.get("typicality", {}).items():
        share = f"p <= 0.05 for {found['rejected_at_0.05']:.1%} of the examples"
        table[f"typicality, {name}"] = share if name == "test" else f"{share}; AUROC {found['auroc']:.4f}"
    return table


def _named(other: str) -> str:
    return "the test split in disorder" if other == PERMUTED else f"{other}, test split"


if __name__ == "__main__":
    main()
