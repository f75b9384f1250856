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

from resflow_jax.data.images import check_quantized, dequantize
from resflow_jax.functional.estimators import Estimator
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
        return jnp.mean(_image_scores(flow, images, key, levels, estimator))

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

    Every image is dequantised and its log-det estimated `draws` times. The squared error adds the
    variance over images, of their averages, to the variance over draws, of theirs: the estimator's
    roulette length is shared by a batch, so its error does not average out over images. With one draw
    that second part is unknown and left out. Cost: `draws` times the estimator's on N images.

    Raises:
      ValueError: unless the images are integers in {0..levels-1} and N > 0.
    """
    check_quantized("images", images, levels)
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
    scores = scores[:, :number]
    variance = scores.mean(axis=0).var(ddof=1) / number if number > 1 else math.inf
    if draws > 1:
        variance += scores.mean(axis=1).var(ddof=1) / draws
    return Estimate(float(scores.mean()), math.sqrt(variance))


@partial(jax.jit, static_argnames=("levels", "estimator"))
def _image_scores(flow: ResidualFlow, images: Array, key: Array, levels: int, estimator: Estimator) -> Array:
    """Bits/dim of one draw for each image [B]."""
    noise_key, flow_key = jax.random.split(key)
    log_prob = flow.log_prob(dequantize(images, noise_key, levels), key=flow_key, estimator=estimator)
    return bits_per_dim(log_prob, flow.dim, levels)
