"""The evaluation of a saved classifier: what `experiments.evaluate` measures, writes and prints of one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runs import pictures
from experiments.runs.devices import own_mesh
from experiments.runs.likelihoods import (
    RECONSTRUCTED,
    named,
    reconstruction,
    reconstruction_row,
    typicality_csv,
    typicality_of,
    typicality_rows,
    typicality_summary,
)
from experiments.runs.saved import SavedFlow
from experiments.runs.tables import certificate_rows, print_table
from experiments.runs.tasks.judging_classes import Found, Scores, bits_of, class_rows, measured
from experiments.runs.tasks.labelled import Rows
from experiments.runs.tasks.subset import subset
from experiments.runs.workdir import write_arrays, write_atomically
from resflow_jax import Estimator, certify
from resflow_jax.data.images import Images
from resflow_jax.io.config_json import as_json


def check_density_settings(saved: SavedFlow, **given: Any) -> None:
    """Raises ValueError for a setting that was given and needs a density of x, if the run has none."""
    if saved.task.density_weight:
        return
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name}: expected none for a run without a density of x (hybrid.weight 0), got {as_json(value)}"
            )


def evaluate_classes(
    saved: SavedFlow,
    test: Rows,
    others: Mapping[str, Images],
    *,
    estimator: Estimator,
    draws: int,
    typicality: bool,
    about: dict[str, Any],
    workdir: Path,
) -> dict[str, Any]:
    """Measures, draws and prints; returns the content of evaluation.json.

    Args:
      saved: the run, of `experiments.classify`.
      test: the test images.
      others: images of other data by name.
      estimator: estimator of the log-det; used only with a density.
      draws: number of draws of the bits/dim of each image; used only with a density.
      typicality: whether to apply the typicality test, which needs a density.
      about: what evaluation.json says of the run.
      workdir: directory that is written to.
    """
    task, flow = saved.task, saved.flow
    logits = task.logits(flow, test.images, own_mesh())
    found, scores = measured(task, flow, test, others, logits, estimator=estimator, draws=draws)
    error, unconverged = reconstruction(flow, task.inputs(test[:RECONSTRUCTED]))
    certificate = certify(flow)
    result = {
        **about,
        **({"estimator": as_json(estimator), "draws": draws} if task.density_weight else {}),
        **found,
        "reconstruction": {"examples": len(test[:RECONSTRUCTED]), "error": error, "unconverged": unconverged},
        "certificate": certificate.as_dict(),
    }
    if typicality:
        means = {name: scores[f"{name}_bits_per_dim"] for name in ("test", *others)}
        references = [subset(part, len(test)).images for part in (task.splits.train, task.splits.validation)]
        references = [bits_of(task, flow, images, estimator, draws).mean(axis=0) for images in references]
        judged = typicality_of(1, math.prod(flow.event_shape), references, means)
        write_atomically(workdir / "typicality.csv", typicality_csv(means, judged))
        result["typicality"] = typicality_summary(judged)
    write_atomically(workdir / "evaluation.json", json.dumps(as_json(result), indent=2) + "\n")
    write_arrays(workdir / "scores.npz", test_logits=logits, test_labels=test.labels, **scores)
    _draw(workdir, saved, scores, found)
    measured_error = f"{found['test'][task.metric]:.4f} +- {found['test']['stderr']:.4f}"
    rows = {
        f"test {task.label}": f"{measured_error} ({len(test)} examples, weights of step {saved.step})",
        **class_rows(task, found),
        "reconstruction error": reconstruction_row(result["reconstruction"]),
        **typicality_rows(result.get("typicality", {})),
    }
    print_table({**rows, **certificate_rows(certificate)})
    return result


def _draw(workdir: Path, saved: SavedFlow, scores: Scores, found: Found) -> None:
    """Draws the histograms of max p(y | x), and of the bits/dim of a run with a density."""
    kinds = {"max_p": ("max p(y | x) of an image", "auroc_max_p")}
    if saved.task.density_weight:
        kinds["bits_per_dim"] = "bits/dim of an image", "auroc_log_prob"
    panels = {}
    for kind, (quantity, by) in kinds.items():
        panel = panels[quantity] = {f"{saved.task.name}, test split": scores[f"test_{kind}"]}
        for name, other in found["other"].items():
            panel[f"{named(name)}: AUROC {other[by]:.3f}"] = scores[f"{name}_{kind}"]
    title = f"a classifier of {saved.task.name}, step {saved.step}"
    pictures.save_histograms(workdir / "histograms.png", panels, title)
