"""Evaluation of classifiers: logits of a data set, and the calibration of their probabilities."""

from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resflow_jax.data.images import to_unit_interval
from resflow_jax.functional.checks import check_count, check_type, shown
from resflow_jax.models.flow import Flow
from resflow_jax.training.forms import batches_in_order, placed
from resflow_jax.training.scores import quantized_images

Array = jax.Array

_ROUNDING = 1e-5  # of a probability in float32


def class_logits(
    flow: Flow, images: np.ndarray, *, levels: int = 256, batch_size: int = 500, mesh: Mesh | None = None
) -> np.ndarray:
    """The logits [N, classes] of integer images [N, H, W, C], each pixel at the middle of its cell.

    Args:
      flow: a flow with a method `logits`, such as a `Classifier`.
      images: integers in {0..levels-1}.
      levels: number of values that a pixel can have.
      batch_size: number of images that are evaluated at once.
      mesh: devices that share each batch; None for one device.

    Randomness: none. Cost: one evaluation of every g on N images.

    Raises:
      ValueError: unless the images are integers in {0..levels-1} of the flow's shape, and N > 0; for a flow without
        logits.

    Example:
      >>> from resflow_jax.training.class_evaluation import class_logits
      >>> config = rf.ClassifierConfig((4, 4, 1), 3, blocks=(1,), hidden_channels=(4,), padding=0)
      >>> flow = rf.ResNetClassifier(config, rngs=nnx.Rngs(0))
      >>> class_logits(flow, np.zeros((5, 4, 4, 1), np.uint8)).shape
      (5, 3)
    """
    if isinstance(flow, type) or not hasattr(flow, "logits"):
        raise ValueError(f"flow: expected a flow with class logits, such as a Classifier, got {shown(flow)}")
    check_count("levels", levels, 1)
    check_count("batch_size", batch_size, 1)
    if mesh is not None:
        check_type("mesh", mesh, Mesh)
    images = quantized_images("images", flow, images, levels)
    flow, mesh, _ = placed(flow, mesh)
    devices = 1 if mesh is None else mesh.size
    batch_size = devices * -(-min(batch_size, len(images)) // devices)
    parts = [_logits(flow, batch, levels, mesh) for batch in batches_in_order(images, batch_size, mesh)]
    return np.concatenate([np.asarray(jax.device_get(part)) for part in parts])[: len(images)]


@partial(jax.jit, static_argnames="mesh")
def _logits(flow: Flow, images: Array, levels: Array, mesh: Mesh | None) -> Array:
    found = flow.logits(to_unit_interval(images, levels))
    # Every process reads all logits.
    return found if mesh is None else jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error (ECE) of class probabilities [N, K] for labels [N], in [0, 1].

    The examples are divided by their largest probability into bins of equal width. The error is the mean, over the
    examples, of the distance between the accuracy of the bin and its mean largest probability.

    Args:
      probabilities: floats [N, K] in [0, 1], as softmax(logits).
      labels: integers [N] in {0..K-1}.
      bins: number of bins of [0, 1].

    Raises:
      ValueError: for other shapes, no example, values outside of [0, 1], and fewer than one bin.

    Source: Guo et al. (2017, arXiv 1706.04599), equation 3.

    Example:
      >>> from resflow_jax.training.class_evaluation import calibration_error
      >>> round(calibration_error(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])), 3)
      0.4
    """
    check_count("bins", bins, 1)
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"labels: expected [N] with probabilities [N, K], N > 0, got {labels.shape} with {probabilities.shape}"
        )
    if not ((probabilities >= 0) & (probabilities <= 1 + _ROUNDING)).all():
        raise ValueError(f"probabilities: expected numbers in [0, 1], got {probabilities.min()}..{probabilities.max()}")
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, is_right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))
