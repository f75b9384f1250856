"""Bits per dimension: the scale on which likelihoods of images are compared.

    bits/dim = -(log p(x) - D log L) / (D log 2) = -log p(x) / (D log 2) + log2 L

for a density p of x in [0, 1]^D dequantised from L levels: the number of bits that a code built
on the model spends on one of the D values of an image.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.data.images import dequantize
from resflow_jax.functional.logdet import Estimator
from resflow_jax.models.flow import ResidualFlow

Array = jax.Array


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    stderr: float


def bits_per_dim(log_prob: Array, dim: int, levels: int) -> Array:
    """Bits/dim of log p(x) in nats, elementwise."""
    return -log_prob / (dim * math.log(2)) + math.log2(levels)


def evaluate_bits_per_dim(
    flow: ResidualFlow,
    images: np.ndarray,
    key: Array,
    *,
    levels: int,
    estimator: Estimator,
    draws: int = 1,
    batch_size: int = 100,
) -> Estimate:
    """Mean bits/dim of quantised images [N, H, W, C], each counted once, with its standard error.

    Every image is dequantised and its log-det estimated `draws` times, independently; the error is
    that of the mean over images of their averages, so it covers the choice of the images, the
    dequantisation and the estimator. Cost: `draws` times the estimator's on N images.
    """
    number = len(images)
    batches = -(-number // batch_size)
    padded = np.resize(images, (batches * batch_size, *images.shape[1:]))

    @jax.jit
    def score(flow, batch, key):
        def draw(_, key):
            noise_key, flow_key = jax.random.split(key)
            x = dequantize(batch, noise_key, levels)
            return None, flow.log_prob(x, key=flow_key, estimator=estimator)

        _, log_probs = jax.lax.scan(draw, None, jax.random.split(key, draws))
        return jnp.mean(bits_per_dim(log_probs, flow.dim, levels), axis=0)

    keys = jax.random.split(key, batches)
    scores = [score(flow, b, k) for b, k in zip(np.split(padded, batches), keys, strict=True)]
    scores = np.concatenate(jax.device_get(scores))[:number].astype(np.float64)
    stderr = scores.std(ddof=1) / math.sqrt(number) if number > 1 else math.inf
    return Estimate(float(scores.mean()), float(stderr))
