"""Bits per dimension: the scale on which likelihoods of images are compared.

    bits/dim = -(log p(x) - D log L) / (D log 2) = -log p(x) / (D log 2) + log2 L

for a density p of x in [0, 1]^D dequantised from L levels: the number of bits that a code built
on the model spends on one of the D values of an image.
"""

import math
from collections.abc import Callable
from functools import partial
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


def dequantized_bits_per_dim(estimator: Estimator, levels: int) -> Callable[[ResidualFlow, Array, Array], Array]:
    """The loss of a density model: mean bits/dim of integer images [B, H, W, C], dequantised with the key.

    Unbiased, in value and gradient, if the estimator is.
    """

    def loss(flow: ResidualFlow, images: Array, key: Array) -> Array:
        noise_key, flow_key = jax.random.split(key)
        log_prob = flow.log_prob(dequantize(images, noise_key, levels), key=flow_key, estimator=estimator)
        return jnp.mean(bits_per_dim(log_prob, flow.dim, levels))

    return loss


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

    scores = np.zeros((draws, batches * batch_size))
    for draw, draw_key in enumerate(jax.random.split(key, draws)):
        keys = jax.random.split(draw_key, batches)
        parts = [
            _image_scores(flow, b, k, levels, estimator) for b, k in zip(np.split(padded, batches), keys, strict=True)
        ]
        scores[draw] = np.concatenate(jax.device_get(parts))
    scores = scores.mean(axis=0)[:number]
    stderr = scores.std(ddof=1) / math.sqrt(number) if number > 1 else math.inf
    return Estimate(float(scores.mean()), float(stderr))


@partial(jax.jit, static_argnames=("levels", "estimator"))
def _image_scores(flow: ResidualFlow, images: Array, key: Array, levels: int, estimator: Estimator) -> Array:
    """Bits/dim of one draw for each image [B]."""
    noise_key, flow_key = jax.random.split(key)
    log_prob = flow.log_prob(dequantize(images, noise_key, levels), key=flow_key, estimator=estimator)
    return bits_per_dim(log_prob, flow.dim, levels)
