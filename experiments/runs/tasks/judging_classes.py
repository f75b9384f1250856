"""What a classifier is judged by: error, calibration, outliers, robustness, and the density of x.

One process computes it alone, from a flow that it has whole or on its own devices.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy.special import log_softmax

from experiments.runs.devices import own_mesh
from experiments.runs.likelihoods import EXACT_BATCH_SIZE, auroc, named
from experiments.runs.tasks.attack import broken_within
from experiments.runs.tasks.labelled import Rows
from experiments.runs.tasks.subset import subset_rows
from resflow_jax import Classifier, Estimate, Estimator, Exact, certified_radius
from resflow_jax.data.images import Images, to_unit_interval
from resflow_jax.models.flow import Flow
from resflow_jax.training.class_evaluation import calibration_error
from resflow_jax.training.evaluation import image_bits_per_dim
from resflow_jax.training.forms import mesh_of
from resflow_jax.training.placement import on_host

ATTACKED = 64  # test images
BATCH_SIZE = 100  # images whose log-dets are estimated at once

Found = dict[str, Any]
Scores = dict[str, np.ndarray]


def errors_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """100 for every example that is misclassified, 0 for the others, and NaN for logits that are not finite, [N]."""
    wrong = 100.0 * (logits.argmax(axis=1) != labels)
    return np.where(np.isfinite(logits).all(axis=1), wrong, np.nan)


def measured(
    task: Any,
    flow: Flow,
    test: Rows,
    others: Mapping[str, Images],
    logits: np.ndarray,
    *,
    estimator: Estimator | None = None,
    draws: int | None = None,
    with_density: bool | None = None,
) -> tuple[Found, Scores]:
    """The figures of a classifier, and the scores of single images.

    Args:
      task: a `ClassTask`.
      flow: the network.
      test: the test images.
      others: images of other data by name.
      logits: logits of the test images, [N, classes].
      estimator: estimator of the log-det; by default that of the run.
      draws: number of draws of the bits/dim of each image; by default that of the run.
      with_density: whether to measure the density of x; by default if the run has trained it.

    Returns:
      The figures on the test images, on robustness (None for a network without a head of this library) and on each set
      of others, and an array [N] for each set and score: "test_max_p", and with a density "test_bits_per_dim".
    """
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    of_label = -log_p[np.arange(len(test)), test.labels]
    nats = Estimate.from_scores(of_label[None])
    error = Estimate.from_scores(errors_of(logits, test.labels)[None])
    is_finite = bool(np.isfinite(log_p).all())
    found: Found = {
        "test": {
            "examples": len(test),
            task.metric: error.mean,
            "stderr": error.stderr,
            "cross_entropy": nats.mean,
            "cross_entropy_stderr": nats.stderr,
            "calibration_error": calibration_error(np.exp(log_p), test.labels) if is_finite else math.nan,
        },
        "robustness": _robustness(task, flow, test, logits),
        "other": {name: {"examples": len(images)} for name, images in others.items()},
    }
    sure = {"test": log_p.max(axis=1)}
    for name, images in others.items():
        sure[name] = log_softmax(task.logits(flow, images, own_mesh()).astype(np.float64), axis=1).max(axis=1)
        found["other"][name]["auroc_max_p"] = auroc(-sure["test"], -sure[name])
    scores = {f"{name}_max_p": np.exp(values) for name, values in sure.items()}
    if bool(task.density_weight) if with_density is None else with_density:
        bits = {
            name: bits_of(task, flow, images, estimator, draws)
            for name, images in {"test": test.images, **others}.items()
        }
        for name, of_set in bits.items():
            figures = found["test"] if name == "test" else found["other"][name]
            estimate = Estimate.from_scores(of_set)
            figures |= {"bits_per_dim": estimate.mean, "bits_per_dim_stderr": estimate.stderr}
            scores[f"{name}_bits_per_dim"] = of_set.mean(axis=0)
            if name != "test":
                figures["auroc_log_prob"] = auroc(scores["test_bits_per_dim"], scores[f"{name}_bits_per_dim"])
    return found, scores


def class_rows(task: Any, found: Found) -> dict[str, str]:
    """The lines of a closing table on the figures of `measured`, but for the error."""
    test = found["test"]
    rows = {
        "cross-entropy": f"{test['cross_entropy']:.4f} +- {test['cross_entropy_stderr']:.4f} nats",
        "calibration error": f"{test['calibration_error']:.4f} (ECE, 15 bins)",
    }
    if task.density_weight:
        rows["test bits/dim"] = f"{test['bits_per_dim']:.4f} +- {test['bits_per_dim_stderr']:.4f}"
    for name, other in found["other"].items():
        where = "" if len(found["other"]) == 1 else f", {name}"
        rows[f"AUROC, max p(y | x){where}"] = f"{other['auroc_max_p']:.4f}, of {named(name)}"
        if task.density_weight:
            rows[f"AUROC, log p(x){where}"] = (
                f"{other['auroc_log_prob']:.4f}, of {named(name)}: {other['bits_per_dim']:.4f} +- "
                f"{other['bits_per_dim_stderr']:.4f} bits/dim"
            )
    robustness = found["robustness"]
    if robustness is None:
        return rows
    if not robustness["is_bounded"]:
        return rows | {"certified radius": "none: the network has no bound on its Lipschitz constant"}
    return rows | {
        "certified radius": f"{robustness['median_radius']:.2e}, median in the 2-norm of images in [0, 1]; at least "
        f"that and right: {robustness['certified_at_median']:.1f} % of the test images"
        if robustness["median_radius"]
        else "none: no image is classified right",
        "gradient attack": f"{robustness['broken']} of {robustness['attacked']} images changed their class within "
        "their radius",
    }


def _robustness(task: Any, flow: Flow, test: Rows, logits: np.ndarray) -> Found | None:
    """The figures on the certified radius, for a network with a bound and a head."""
    if not isinstance(flow, Classifier) or flow.head is None or not flow.blocks:
        return None
    radii = certified_radius(flow if mesh_of(flow) is None else on_host(flow), logits)
    is_right = logits.argmax(axis=1) == test.labels
    median = float(np.median(radii[is_right])) if is_right.any() else 0.0
    if not radii.any():
        return {"is_bounded": False, "median_radius": 0.0}
    rows = subset_rows(len(test), ATTACKED)
    broken = broken_within(flow, to_unit_interval(test.images[rows], task.splits.levels), radii[rows])
    return {
        "is_bounded": True,
        "median_radius": median,
        "certified_at_median": 100 * float((is_right & (radii >= median)).mean()),
        "attacked": len(rows),
        "broken": int(broken.sum()),
    }


def bits_of(
    task: Any, flow: Flow, images: Images, estimator: Estimator | None = None, draws: int | None = None
) -> np.ndarray:
    """The bits/dim of images in each draw, [draws, N], with the same noise every time."""
    settings = task.config.evaluation
    estimator = estimator or settings.estimator
    return image_bits_per_dim(
        flow,
        images,
        jax.random.key(task.config.seed + 2),
        levels=task.splits.levels,
        estimator=estimator,
        draws=draws or settings.draws,
        batch_size=EXACT_BATCH_SIZE if isinstance(estimator, Exact) else BATCH_SIZE,
        mesh=own_mesh(),
    )
