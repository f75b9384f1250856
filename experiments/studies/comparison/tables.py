"""The tables of the comparison, in Markdown, from the results of one data set as `Plan.results` gives them."""

from collections.abc import Container
from typing import Any

import numpy as np

from experiments.runs.tables import markdown_table
from experiments.studies.comparison.contenders import Candidate

Results = dict[str, dict[str, list[dict[str, Any]]]]
NOTE = (
    "One process on one core for each run. The budget is CPU time of this process: on an idle core this is wall-clock. "
    "Building, initialisation and compilation count, validation and evaluation do not. After ±: the standard error of "
    "the mean over seeds; in brackets: the standard error over test examples. Best after: the part of the time for "
    "updates after which the scored weights were validated. Times are CPU seconds."
)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the runs that ended well, the standard error of the test score over them, and the errors of others."""
    good = [run for run in runs if run.get("error") is None]
    errors = [run["error"] for run in runs if run.get("error") is not None]
    if not good:
        return {"seeds": 0, "errors": errors}
    names = ("test", "test_stderr", "parameters", "steps", "best_at", "skipped", "step_seconds", "set_up_seconds")
    names += ("sample_seconds", "sampled", "log_prob_1", "log_prob_1000")
    values = {name: [run[name] for run in good] for name in names}
    means = {name: float(np.mean(of)) if None not in of else None for name, of in values.items()}
    tests = values["test"]
    spread = float(np.std(tests, ddof=1) / np.sqrt(len(tests))) if len(tests) > 1 and None not in tests else None
    reconstructions = [run["reconstruction"] for run in good]
    worst = None if None in reconstructions else max(reconstructions)
    unconverged = sum(run["unconverged"] for run in good)
    settings = str(Candidate(good[0]["job"]["width"], good[0]["job"]["learning_rate"]))
    own = {"seeds": len(good), "test_spread": spread, "reconstruction": worst, "unconverged": unconverged}
    return means | own | {"settings": settings, "errors": errors}


def table(results: Results, unit: str, sign: int, bounds: Container[str] = ()) -> str:
    """A row for each model, the best test score first.

    Args:
      results: results for one data set.
      unit: unit of the test score.
      sign: 1 if a lower score is better, -1 if a higher one is.
      bounds: models whose scores are bounds; the table says so.
    """
    head = ["model", f"test {unit}", "parameters", "steps", "best after", "ms a step", "set-up, s", "1000 samples, s"]
    head += ["log p of 1, ms", "log p of 1000, s", "max abs(x - f^-1(f(x)))", "settings"]
    rows = {model: summary(of["runs"]) for model, of in results.items()}

    def order(model: str) -> float:
        test = rows[model].get("test")
        return np.inf if test is None else sign * test

    cells = []
    for model in sorted(rows, key=order):
        name = f"{model} (a bound)" if model in bounds else model
        cells.append([name, *_cells(rows[model], results[model])])
    return markdown_table(head, cells)


def _cells(row: dict[str, Any], of: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The cells of a model after its name."""
    errors = [*row["errors"], *(found["error"] for found in of["search"] if not of["runs"] and found.get("error"))]
    if not row["seeds"]:
        return [f"failed: {errors[0]}" if errors else "not yet run", *[""] * 10]
    failed = f"; {len(errors)} of {len(errors) + row['seeds']} failed: {errors[0]}" if errors else ""
    spread = "" if row["test_spread"] is None else f" ± {row['test_spread']:.4f}"
    skipped = f" ({row['skipped']:.0f} skipped)" if row["skipped"] else ""
    timed = "" if row["sampled"] >= 1000 else f" (from {row['sampled']:.0f})"
    unconverged = f" ({row['unconverged']} did not converge)" if row["unconverged"] else ""
    return [
        f"{_number(row['test'], '.4f')}{spread} [{_number(row['test_stderr'], '.4f')}]{failed}",
        f"{row['parameters']:.0f}",
        f"{row['steps']:.0f}{skipped}",
        f"{100 * row['best_at']:.0f} %",
        f"{1e3 * row['step_seconds']:.3g}",
        f"{row['set_up_seconds']:.1f}",
        f"{row['sample_seconds']:.3g}{timed}",
        f"{1e3 * row['log_prob_1']:.3g}",
        f"{row['log_prob_1000']:.3g}",
        f"{_number(row['reconstruction'], '.0e')}{unconverged}",
        row["settings"],
    ]


def compact(results: Any) -> Any:
    """The results with six digits and without validation losses over time, for a file to keep; tables need no more.

    Jobs stay exact, since results are found by them.
    """
    if isinstance(results, dict):
        kept = {name: value for name, value in results.items() if name != "validation_losses"}
        return {name: value if name == "job" else compact(value) for name, value in kept.items()}
    if isinstance(results, list):
        return [compact(value) for value in results]
    return float(f"{results:.6g}") if isinstance(results, float) else results


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else f"{value:{form}}"


def search_table(results: Results, unit: str) -> str:
    """A row for each model: the validation loss of every candidate, the chosen one in bold."""
    rows = []
    for model, of in results.items():
        losses = {
            str(Candidate(found["job"]["width"], found["job"]["learning_rate"])): found.get("validation_loss")
            if found.get("error") is None
            else None
            for found in of["search"]
        }
        finite = [loss for loss in losses.values() if loss is not None]
        texts = []
        for name, loss in losses.items():
            text = "failed" if loss is None else f"{loss:.4f}"
            texts.append(f"{name}: **{text}**" if finite and loss == min(finite) else f"{name}: {text}")
        rows.append([model, "; ".join(texts)])
    return markdown_table(["model", f"validation loss of each candidate, {unit}"], rows)


def grid(results: dict[str, Results]) -> str:
    """A row for each model and a column for each data set: the test score with its error over seeds."""
    models = list(dict.fromkeys(model for of in results.values() for model in of))
    rows = []
    for model in models:
        cells = []
        for of in results.values():
            row = summary(of[model]["runs"]) if model in of else {"seeds": 0}
            if not row["seeds"]:
                cells.append("")
                continue
            spread = "" if row["test_spread"] is None else f" ± {row['test_spread']:.3f}"
            cells.append(f"{_number(row['test'], '.3f')}{spread}")
        rows.append([model, *cells])
    return markdown_table(["model", *results], rows)
