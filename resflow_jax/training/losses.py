"""Losses of density models: the mean score of a batch, and what a flow needs at every training step beside it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.estimators import Estimator
from resflow_jax.models.flow import Flow
from resflow_jax.training.scores import Score, as_pair, bits_per_dim_of, negative_log_prob
from resflow_jax.training.step import Loss, optax_promotion

Array = jax.Array

_ORDER_LOSS_WEIGHT = 0.01  # that of the PyTorch implementation


def dequantized_bits_per_dim(levels: int, log_det_weight: optax.Schedule | None = None) -> Loss:
    """The loss of a density model: mean bits/dim of integer images [B, H, W, C], dequantised with the key.

    A batch is these images or, for a conditional flow, a pair (images, condition) with one condition for each,
    [B, *condition_shape]. Unbiased, in value and gradient, if the estimator is. With the estimates' diagnostics. Beside
    the value, `tend` does to the flow what training owes it.

    Args:
      levels: number of values that a pixel can have.
      log_det_weight: from steps done to the weight of the log-det in the gradient, to let it rise slowly from 0 to
        1; the value is that of weight 1 all along. None for weight 1.
    """
    check_count("levels", levels, 1)
    return _mean_loss(bits_per_dim_of(levels), log_det_weight)


def negative_log_likelihood(log_det_weight: optax.Schedule | None = None) -> Loss:
    """The loss of a density model: mean -log p(x) in nats of floats x [B, *event_shape]. As `dequantized_bits_per_dim`.

    A batch is x or, for a conditional flow, a pair (x, condition) with one condition for each example,
    [B, *condition_shape]: the loss is then the mean -log p(x | c).

      trainer = Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.adam(1e-3), 0.99)
      state, metrics = trainer.compiled_step()(state, (x, condition), key)
    """
    return _mean_loss(negative_log_prob, log_det_weight)


def _mean_loss(score: Score, log_det_weight: optax.Schedule | None) -> Loss:
    def loss(flow: Flow, batch: Any, key: Array, estimator: Estimator, step: Array) -> tuple[Array, Diagnostics]:
        with optax_promotion():
            weight = None if log_det_weight is None else log_det_weight(step)
        x, scores, diagnostics = score(flow, batch, key, estimator, weight)
        return tend(flow, x, jnp.mean(scores), as_pair(batch)[1]), diagnostics

    return loss


def tend(flow: Flow, x: Array, loss: Array, condition: Array | None = None) -> Array:
    """What a flow needs at every training step beside its loss: the loss, with the gradient of learnable orders.

    Where the flow has running statistics, they move towards those of the batch x, in place. Where it has
    learnable orders of norms, their gradient is that of 0.01 * `order_loss`, of which the value stays out.
    """
    if jax.tree.leaves(nnx.state(flow, nnx.BatchStat)):
        flow.update_statistics(jax.lax.stop_gradient(x), condition)
    if flow.learns_orders:
        order_loss = _ORDER_LOSS_WEIGHT * flow.order_loss()
        loss = loss + order_loss - jax.lax.stop_gradient(order_loss)
    return loss
