"""The end of a run: its metric on the test split, the pictures, report.html and the closing table."""

import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.runs import pictures
from experiments.runs.judging import Judged
from experiments.runs.metrics import Metrics, NullMetrics
from experiments.runs.processes import is_first
from experiments.runs.report import write_report
from experiments.runs.tables import certificate_rows, error_by_cause, print_table
from experiments.runs.tasks.task import Task
from experiments.runs.workdir import write_atomically
from resflow_jax import Estimate
from resflow_jax.io.config_json import as_json


class StepTime(NamedTuple):
    """Median seconds of a training step, and median seconds of it spent waiting for data."""

    seconds: float
    waiting: float

    @classmethod
    def of(cls, times: list[tuple[float, float]]) -> "StepTime | None":
        """The medians of pairs (seconds, waiting); None if there are none."""
        return cls(*map(float, np.median(times, axis=0))) if times else None


def report(
    task: Task,
    chosen: Judged,
    step: int,
    metrics: Metrics | NullMetrics,
    step_time: StepTime | None,
    began: float,
    ended: str | None = None,
) -> Estimate:
    """Evaluates the chosen flow on the test split, draws the pictures, prints the closing table.

    All processes evaluate; the first one does the rest.

    Args:
      task: the task of the run.
      chosen: the flow with the weights of the best validation.
      step: the step of these weights.
      metrics: the run's metrics; the test metric is added.
      step_time: time per step; None if no step was taken.
      began: `time.perf_counter()` at the start of the run.
      ended: why training ended, if it gave up.
    """
    config, workdir = task.config, task.config.workdir
    scores, certificate = task.split_scores(chosen.flow, "test"), chosen.certificate
    result = task.mean(scores, config.evaluation.estimator)
    if not is_first():
        return result
    write_atomically(workdir / "certificate.json", json.dumps(as_json(certificate.as_dict()), indent=2) + "\n")
    line = {task.metric: result.mean, f"{task.metric}_stderr": result.stderr}
    metrics.write(step=step, split="test", **line, data_stderr=result.data_stderr, noise_stderr=result.noise_stderr)

    drawing = task.draw(chosen.drawn, result)
    rollbacks = [line for line in metrics.lines if line["split"] == "rollback"]
    skipped = sum(line["split"] == "skipped" for line in metrics.lines)
    skipped += sum(line.get("dropped", 0) for line in rollbacks)  # whose lines are gone
    curves = workdir / "curves.png"
    names = {"metric": task.metric, "trained": task.trained, "label": task.label, "unit": task.unit}
    pictures.save_curves(curves, metrics.lines, **names, title=f"{task.name}: {task.label}")
    not_finite = int((~np.isfinite(scores)).any(axis=0).sum())
    tested = f"{scores.shape[1]} examples" + (f", {not_finite} of them not finite" if not_finite else "")
    measured = f"{result.mean:.4f} +- {result.stderr:.4f}"
    rows = {
        f"test {task.label}": f"{measured} ({tested}, weights of step {step})",
        "standard error": error_by_cause(result.data_stderr, result.noise_stderr),
        **task.notes,
        **({} if ended is None else {"GAVE UP": ended}),
        **drawing.rows,
        **certificate_rows(certificate),
        **({"not finite": f"{skipped} updates skipped, {len(rollbacks)} rollbacks"} if skipped or rollbacks else {}),
        "time per step": "no step taken: the run was finished before"
        if step_time is None
        else f"{step_time.seconds * 1e3:.0f} ms, batches of {config.batch_size}; "
        f"{step_time.waiting / step_time.seconds:.1%} of it waiting for data",
        "time in all": f"{time.perf_counter() - began:.0f} s, set-up and compilation included",
        "written to": str(workdir),
    }
    figures = {f"{task.label} of training, validation and test": curves, **drawing.pictures}
    title = f"{workdir.name}: test {task.label} {measured}"
    write_report(workdir / "report.html", title, rows, figures, along_training(workdir), certificate, as_json(config))
    print_table(rows)
    print(f"test {task.label} {measured}")
    return result


def along_training(workdir: Path, at_most: int = 6) -> dict[str, Path]:
    """Evenly spaced pictures that a run drew during training, by caption: at most `at_most` of each kind."""
    kinds: dict[str, dict[int, Path]] = {}
    for path in (workdir / "training").glob("*.png"):
        if found := re.fullmatch(r"(\d+)_(\w+)\.png", path.name):
            kinds.setdefault(found[2], {})[int(found[1])] = path
    chosen = {}
    for kind, paths in sorted(kinds.items(), reverse=True):
        steps = sorted(paths)
        numbers = np.unique(np.linspace(0, len(steps) - 1, at_most).round().astype(int))
        chosen |= {f"{kind} at step {steps[n]}": paths[steps[n]] for n in numbers}
    return chosen
