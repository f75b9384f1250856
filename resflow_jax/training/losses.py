"""Losses of density models: the mean score of a batch.

A training loss also updates the running statistics of a flow, in place (`update_running_statistics`), and adds the
gradient of learned norm orders (`with_order_gradient`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from resflow_jax.functional.checks import check_count, check_finite
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.estimators import Estimator
from resflow_jax.models.flow import Flow
from resflow_jax.training.scores import Score, as_pair, bits_per_dim_of, negative_log_prob
from resflow_jax.training.step import Loss, optax_promotion

Array = jax.Array

ORDER_WEIGHT = 0.01  # as in the authors' PyTorch implementation


def dequantized_bits_per_dim(
    levels: int, log_det_weight: optax.Schedule | None = None, order_weight: float = ORDER_WEIGHT
) -> Loss:
    """Returns the loss of a density model of images: mean bits/dim of integer images, dequantised with the key.

    A batch is integer images [B, H, W, C] in {0..levels-1} or, for a conditional flow, a pair (images, condition) with
    one condition for each image, [B, *condition_shape]. The loss also moves the running statistics of the flow. Its
    value and gradient are unbiased if those of the estimator are. Cost: one `log_prob` of the batch.

    Args:
      levels: number of values that a pixel can have.
      log_det_weight: schedule from steps done to the weight of the log-det in the gradient, to let it rise slowly from
        0 to 1. The value is always that of weight 1. None for weight 1 in both.
      order_weight: weight of `Flow.order_loss` in the gradient of learnable orders of norms.

    Returns:
      loss(flow, batch, key, estimator, steps done) -> (bits/dim, diagnostics), as `Trainer` takes it.

    Raises:
      ValueError: if levels is below 1 or order_weight is not finite; when called, for a batch of another structure, for
        images that are not integers, and for concrete (not traced) images outside of {0..levels-1}.

    Source: Theis et al. (2016), arXiv 1511.01844, section 3.1, for dequantisation; Chen et al. (2019), arXiv
    1906.02735, for the estimated log-det.

    Example:
      >>> from resflow_jax.training.losses import dequantized_bits_per_dim
      >>> config = rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=rf.DenseTail(0))
      >>> flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
      >>> loss = dequantized_bits_per_dim(levels=256)
      >>> images = jnp.full((2, 4, 4, 1), 128, jnp.uint8)
      >>> bits, diagnostics = loss(flow, images, jax.random.key(0), rf.Truncated(2), 0)
      >>> bits.shape
      ()
    """
    check_count("levels", levels, 1)
    return _mean_loss(bits_per_dim_of(levels), log_det_weight, order_weight)


def negative_log_likelihood(log_det_weight: optax.Schedule | None = None, order_weight: float = ORDER_WEIGHT) -> Loss:
    """Returns the loss of a density model of floats: mean -log p(x) in nats.

    A batch is x [B, *event_shape] or, for a conditional flow, a pair (x, condition) with one condition for each
    example, [B, *condition_shape]; the loss is then the mean -log p(x | condition). Arguments, cost and errors as in
    `dequantized_bits_per_dim`.

    Returns:
      loss(flow, batch, key, estimator, steps done) -> (nats, diagnostics), as `Trainer` takes it.

    Example:
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (16, 2))
      >>> nats, diagnostics = negative_log_likelihood()(flow, x, jax.random.key(1), rf.Exact(), 0)
      >>> nats.shape
      ()
    """
    return _mean_loss(negative_log_prob, log_det_weight, order_weight)


def _mean_loss(score: Score, log_det_weight: optax.Schedule | None, order_weight: float) -> Loss:
    check_finite("order_weight", order_weight)

    def loss(flow: Flow, batch: Any, key: Array, estimator: Estimator, step: Array) -> tuple[Array, Diagnostics]:
        with optax_promotion():
            weight = None if log_det_weight is None else log_det_weight(step)
        x, scores, diagnostics = score(flow, batch, key, estimator, weight)
        update_running_statistics(flow, x, as_pair(batch)[1])
        return with_order_gradient(jnp.mean(scores), flow, order_weight), diagnostics

    return loss


def update_running_statistics(flow: Flow, x: Array, condition: Array | None = None) -> None:
    """Moves the running statistics of a flow, in place, towards those of a batch x; does nothing if it has none.

    Args:
      flow: the flow.
      x: batch [B, *event_shape]; no gradient passes through it.
      condition: for a conditional flow, [B, *condition_shape].

    Cost: one evaluation of every g on x, if the flow has running statistics.
    """
    if jax.tree.leaves(nnx.state(flow, nnx.BatchStat)):
        flow.update_statistics(jax.lax.stop_gradient(x), condition)


def with_order_gradient(loss: Array, flow: Flow, weight: float = ORDER_WEIGHT) -> Array:
    """Returns the loss, with the gradient of weight * `Flow.order_loss` added; its value does not change.

    The likelihood gives learnable orders of norms no gradient of their own. A flow without them gets the loss back.
    """
    if not flow.learns_orders:
        return loss
    order_loss = weight * flow.order_loss()
    return loss + order_loss - jax.lax.stop_gradient(order_loss)
