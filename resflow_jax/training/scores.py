"""The score of each example under a flow: bits/dim of quantised images, and -log p in nats of anything else.

    bits/dim = -(log p(x) - D log L) / (D log 2) = -log p(x) / (D log 2) + log2 L

Here p is the density of x in [0, 1]^D, dequantised from L levels. Bits/dim are the number of bits that a code built on
the model spends on one of the D values of an image. Losses and evaluations are means of scores.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax

from resflow_jax.data.images import dequantize
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.estimators import Estimator
from resflow_jax.models.flow import Flow

Array = jax.Array

# score(flow, batch, key, estimator, weight of the log-det or None for 1) -> (floats x, scores [B], diagnostics).
# A batch is x alone, or a pair (x, condition).
Score = Callable[..., tuple[Array, Array, Diagnostics]]


def bits_per_dim(log_prob: Array, dim: int, levels: int) -> Array:
    """Bits/dim of log p(x) in nats, elementwise, for events of `dim` values with `levels` levels each."""
    return -log_prob / (dim * math.log(2)) + math.log2(levels)


def log_prob_of_bits(bits: float, dim: int, levels: int) -> float:
    """The log p(x) in nats for a number of bits/dim: the inverse of `bits_per_dim`."""
    return (math.log2(levels) - bits) * dim * math.log(2)


def as_pair(batch: Any) -> tuple[Any, Any]:
    """Returns x and the condition of a batch. The condition is None if the batch is x alone."""
    if not isinstance(batch, tuple | list):
        return batch, None
    if len(batch) != 2:
        raise ValueError(f"batch: expected x, or a pair (x, condition), got {len(batch)} parts")
    return tuple(batch)


@lru_cache
def bits_per_dim_of(levels: int) -> Score:
    """Returns the score of integer images [B, H, W, C] in {0..levels-1}; its x are the dequantised images."""

    def score(flow, batch, key, estimator, weight=None):
        images, condition = as_pair(batch)
        noise_key, flow_key = jax.random.split(key)
        x = dequantize(images, noise_key, levels)
        log_prob, diagnostics = _log_prob(flow, x, condition, flow_key, estimator, weight)
        return x, bits_per_dim(log_prob, math.prod(flow.event_shape), levels), diagnostics

    return score


def negative_log_prob(flow, batch, key, estimator, weight=None):
    """The score of floats x [B, ...]: (x, -log p [B] in nats, diagnostics)."""
    x, condition = as_pair(batch)
    log_prob, diagnostics = _log_prob(flow, x, condition, key, estimator, weight)
    return x, -log_prob, diagnostics


def _log_prob(
    flow: Flow, x: Array, condition: Array | None, key: Array, estimator: Estimator, weight: Array | None
) -> tuple[Array, Diagnostics]:
    """log p(x) [B] and diagnostics. The weight multiplies the gradient of the log-det, not its value."""
    options = {"key": key, "estimator": estimator, "return_diagnostics": True}
    options |= {} if condition is None else {"condition": condition}
    if weight is None:
        return flow.log_prob(x, **options)
    z, log_det, diagnostics = flow.forward(x, **options)
    without = (1 - weight) * log_det
    return flow.base_log_prob(z, condition) + log_det - without + jax.lax.stop_gradient(without), diagnostics
