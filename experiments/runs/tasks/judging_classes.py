"""What a classifier is judged by beside its error: calibration, outliers, robustness, and the density of x."""

import math
from typing import Any

import jax
import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_auc_score

from experiments.runs.devices import data_mesh
from experiments.runs.tasks.attack import broken_within
from experiments.runs.tasks.labelled import Rows
from resflow_jax import Classifier, Estimate, certified_radius
from resflow_jax.data.images import to_unit_interval
from resflow_jax.models.flow import Flow
from resflow_jax.training.class_evaluation import calibration_error
from resflow_jax.training.evaluation import image_bits_per_dim

ATTACKED = 64  # test images


def class_rows(task: Any, flow: Flow, test: Rows, logits: np.ndarray) -> dict[str, str]:
    """The lines of a closing table on a classifier.

    Args:
      task: a `ClassTask`.
      flow: the network.
      test: the test images.
      logits: of the test images, [N, classes].
    """
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    nats = -log_p[np.arange(len(test)), test.labels]
    stderr = nats.std(ddof=1) / math.sqrt(len(nats))
    rows = {
        "cross-entropy": f"{nats.mean():.4f} +- {stderr:.4f} nats",
        "calibration error": f"{calibration_error(np.exp(log_p), test.labels):.4f} (ECE, 15 bins)",
    }
    disordered = task.permuted(test)
    sure = {"test": log_p.max(axis=1), "other": _largest(task.logits(flow, disordered.images))}
    rows["AUROC, max p(y | x)"] = f"{auroc(-sure['test'], -sure['other']):.4f}, of the test split in disorder"
    if task.density_weight:
        bits = {name: bits_of(task, flow, part.images) for name, part in (("test", test), ("other", disordered))}
        found = Estimate.from_scores(bits["test"])
        rows["test bits/dim"] = f"{found.mean:.4f} +- {found.stderr:.4f}"
        of_means = (bits[name].mean(axis=0) for name in ("test", "other"))
        rows["AUROC, log p(x)"] = f"{auroc(*of_means):.4f}, of the test split in disorder"
    return rows | _robustness(task, flow, test, logits)


def _robustness(task: Any, flow: Flow, test: Rows, logits: np.ndarray) -> dict[str, str]:
    """The lines on the certified radius, for a network with a bound and a head."""
    if not isinstance(flow, Classifier) or flow.head is None or not flow.blocks:
        return {}
    radii = certified_radius(flow, logits)
    is_right = logits.argmax(axis=1) == test.labels
    if not radii.any():
        return {"certified radius": "none: the network has no bound on its Lipschitz constant"}
    median = float(np.median(radii[is_right])) if is_right.any() else 0.0
    certified = 100 * float((is_right & (radii >= median)).mean())
    number = min(ATTACKED, len(test))
    x = to_unit_interval(test.images[:number], task.splits.levels)
    broken = broken_within(flow, x, radii[:number])
    return {
        "certified radius": f"{median:.2e}, median in the 2-norm of images in [0, 1]; at least that and right: "
        f"{certified:.1f} % of the test images",
        "gradient attack": f"{int(broken.sum())} of {number} images changed their class within their radius",
    }


def bits_of(task: Any, flow: Flow, images: np.ndarray) -> np.ndarray:
    """The bits/dim of images in each draw, [draws, N]."""
    settings = task.config.evaluation
    return image_bits_per_dim(
        flow,
        images,
        jax.random.key(task.config.seed + 2),
        levels=task.splits.levels,
        estimator=settings.estimator,
        draws=settings.draws,
        batch_size=100,
        mesh=data_mesh(jax.device_count()),
    )


def auroc(test: np.ndarray, other: np.ndarray) -> float:
    """The probability that another example has a larger score than a test example; ties count half."""
    labels = np.repeat([0, 1], [len(test), len(other)])
    return float(roc_auc_score(labels, np.concatenate([test, other])))


def _largest(logits: np.ndarray) -> np.ndarray:
    """log max p(y | x) [N]."""
    return np.log(softmax(logits.astype(np.float64), axis=1).max(axis=1))
