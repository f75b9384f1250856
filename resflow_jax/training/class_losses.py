"""Losses of classifiers: cross-entropy, alone or with the density of x.

    loss = mean over labelled examples of -log p(y | x)  -  weight * mean of log p(x),   in nats

The weight 0 trains a classifier, 1 the joint density p(x, y), and 1 / D lies between (Chen et al. 2019, arXiv
1906.02735, section 5.4). Examples without a label have the label -1 and count only in the second mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resflow_jax.data.images import to_unit_interval
from resflow_jax.functional.batch_axes import mean_over_devices
from resflow_jax.functional.checks import as_array, check_count, check_finite
from resflow_jax.functional.diagnostics import DIAGNOSED_TERMS, Diagnostics
from resflow_jax.functional.estimators import Estimator
from resflow_jax.layers.without_log_det import WithoutLogDet
from resflow_jax.models.classifier import Classifier
from resflow_jax.models.flow import Flow
from resflow_jax.training.losses import update_running_statistics, with_order_gradient
from resflow_jax.training.scores import as_pair, dequantized
from resflow_jax.training.step import Loss, optax_promotion

Array = jax.Array


def classification_loss(levels: int, *, density_weight: float = 0.0, dropout: float = 0.0) -> Loss:
    """Returns the loss of a classifier of images, in nats.

    A batch is a pair (images, labels): integer images [B, H, W, C] in {0..levels-1} and integer labels [B] in
    {-1..classes-1}, -1 for none. Inside a compiled program other labels make the loss NaN. With a density the images
    are dequantised, by `flow.dequantizer` if there is one; without, a pixel is the middle of its cell.

    Args:
      levels: number of values that a pixel can have.
      density_weight: weight of log p(x), not negative.
      dropout: dropout of each g(x), as in `Classifier.logits`; only without a density.

    Returns:
      loss(flow, batch, key, estimator, steps done) -> (nats, diagnostics), as `Trainer` takes it. The flow has methods
      `logits` and `forward_and_log_prob` as those of `Classifier`; only a `Classifier` takes dropout. Value and
      gradient are unbiased if those of the estimator are; without a density they are exact, and the diagnostics zero.

    Cost: one evaluation of every g and its gradient; with a density one `log_prob` of the batch.

    Raises:
      ValueError: for levels below one, a weight that is negative or not finite, a dropout outside of [0, 1) or together
        with a weight; when called, for a batch of another structure, for images that are not integers, for images or
        labels that are not traced outside their range, and for dropout with a flow that is not a `Classifier`.

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1; Chen et al. (2019, arXiv 1906.02735), section 5.4.

    Example:
      >>> from resflow_jax.training.class_losses import classification_loss
      >>> config = rf.ClassifierConfig((4, 4, 1), 3, blocks=(1,), hidden_channels=(4,), padding=0)
      >>> flow = rf.ResNetClassifier(config, rngs=nnx.Rngs(0))
      >>> batch = jnp.full((2, 4, 4, 1), 128, jnp.uint8), jnp.array([0, 2])
      >>> nats, _ = classification_loss(256, density_weight=1 / 16)(flow, batch, jax.random.key(0), rf.Exact(), 0)
      >>> nats.shape
      ()
    """
    check_count("levels", levels, 1)
    check_finite("density_weight", density_weight)
    if not density_weight >= 0:
        raise ValueError(f"density_weight: expected 0 or a positive number, got {density_weight}")
    WithoutLogDet(dropout)  # checks it
    if dropout and density_weight:
        raise ValueError(f"dropout: expected 0 with density_weight {density_weight}, got {dropout}")

    def loss(flow: Flow, batch: Any, key: Array, estimator: Estimator, step: Array) -> tuple[Array, Diagnostics]:
        images, labels = as_pair(batch)
        if labels is None:
            raise ValueError("batch: expected a pair (images, labels), got images alone")
        if dropout and not isinstance(flow, Classifier):
            raise ValueError(f"dropout: expected 0 for a {type(flow).__name__}, which has none, got {dropout}")
        if density_weight:
            noise_key, key = jax.random.split(key)
            x, log_q = dequantized(flow, images, noise_key, levels)
            options = {"key": key, "estimator": estimator, "return_diagnostics": True, "return_logits": True}
            _, log_prob, diagnostics, logits = flow.forward_and_log_prob(x, **options)
            log_prob = log_prob if log_q is None else log_prob - log_q
            nats = cross_entropy(logits, labels) - density_weight * jnp.mean(log_prob)
        else:
            x = to_unit_interval(images, levels)
            options = {"key": key, "dropout": dropout} if dropout else {}
            nats, diagnostics = cross_entropy(flow.logits(x, **options), labels), _no_diagnostics(flow)
        update_running_statistics(flow, x)
        return with_order_gradient(nats, flow), diagnostics

    return loss


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean of -log p(y | x) in nats over the labelled examples, from logits [B, K] and labels [B]; 0 without any.

    Under `shard_map` or `pmap` the sum over a device's examples is divided by the mean number of labelled examples on a
    device, so that the mean over devices is that of the whole batch.

    Raises:
      ValueError: for labels that are not integers [B] in {-1..K-1}. Traced labels outside make value and gradient NaN.
    """
    labels = _checked_labels(labels, logits)
    is_known = (labels >= -1) & (labels < logits.shape[-1])
    is_labelled = is_known & (labels >= 0)
    with optax_promotion():
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(is_labelled, labels, 0))
    total = jnp.sum(losses * jnp.where(is_known, is_labelled.astype(losses.dtype), jnp.nan))
    number = mean_over_devices(jnp.sum(is_labelled).astype(total.dtype))
    return total / jnp.where(number > 0, number, 1)


def _checked_labels(labels: Any, logits: Array) -> Array:
    """The labels as signed integers; their values are checked unless they are traced."""
    found = as_array("labels", labels, "integers [B]")
    is_signed = jnp.issubdtype(found.dtype, jnp.signedinteger) or found.dtype in (jnp.uint8, jnp.uint16)
    if not is_signed or found.shape != logits.shape[:1]:
        raise ValueError(f"labels: expected signed integers {logits.shape[:1]}, got {found.dtype} {found.shape}")
    if not isinstance(labels, jax.core.Tracer):
        values = np.asarray(labels)
        if values.min() < -1 or values.max() >= logits.shape[-1]:
            raise ValueError(f"labels: expected -1 to {logits.shape[-1] - 1}, got {values.min()} to {values.max()}")
    return found.astype(jnp.int32) if found.dtype.itemsize < 4 else found


def _no_diagnostics(flow: Flow) -> Diagnostics:
    zeros = jnp.zeros(flow.blocks, flow.dtype)
    return Diagnostics(zeros, jnp.zeros((flow.blocks, DIAGNOSED_TERMS), flow.dtype), zeros, zeros)
