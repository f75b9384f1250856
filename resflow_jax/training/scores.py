"""The score of each example under a flow: bits/dim of quantised images, and -log p in nats of anything else.

    bits/dim = -(log p(x) - D log L) / (D log 2) = -log p(x) / (D log 2) + log2 L

Here p is the density of x in [0, 1]^D, dequantised from L levels; with a flow's own noise q (`flow.dequantizer`, as
`rf.VariationalDequantization`) log p(x) - log q(u) takes the place of log p(x). Bits/dim are the number of bits that a
code built on the model spends on one of the D values of an image. Losses and evaluations are means of scores.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from resflow_jax.data.images import check_quantized, dequantize, to_unit_interval
from resflow_jax.functional.checks import as_host_array
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
        x, log_q = dequantized(flow, images, noise_key, levels)
        log_prob, diagnostics = _log_prob(flow, x, condition, flow_key, estimator, weight)
        log_prob = log_prob if log_q is None else log_prob - log_q
        return x, bits_per_dim(log_prob, math.prod(flow.event_shape), levels), diagnostics

    return score


def quantized_images(name: str, flow: Flow, images: Any, levels: int) -> Array | np.ndarray:
    """Integer images [N, H, W, C] in {0..levels-1} of the flow's shape, as `as_host_array`; a ValueError names them."""
    images = as_host_array(name, images, "an array of integers [N, H, W, C]")
    check_quantized(name, images, levels)
    if images.shape[1:] != flow.event_shape:
        raise ValueError(f"{name}: expected images {flow.event_shape}, those of the flow, got {images.shape[1:]}")
    return images


def dequantized(flow: Flow, images: Array, key: Array, levels: int) -> tuple[Array, Array | None]:
    """x [B, H, W, C] in [0, 1], and log q(u | images) [B] in nats of the noise u; None for uniform noise, of 0."""
    dequantizer = getattr(flow, "dequantizer", None)
    if dequantizer is None:
        return dequantize(images, key, levels), None
    noise, log_q = dequantizer.sample(to_unit_interval(images, levels), key)
    return (images.astype(noise.dtype) + noise) / levels, log_q


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
