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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resflow_jax.data.images import check_quantized, dequantize
from resflow_jax.functional.checks import check_count
from resflow_jax.functional.estimators import Estimator, Roulette
from resflow_jax.functional.logdet import Diagnostics
from resflow_jax.models.flow import ResidualFlow

Array = jax.Array

_ORDER_LOSS_WEIGHT = 0.01  # that of the PyTorch implementation


class Estimate(NamedTuple):
    """A mean over images and its standard error, split by cause: stderr^2 = data^2 + noise^2.

    Attributes:
      mean: the estimate.
      stderr: its standard error.
      data_stderr: the part from having these images and no others.
      noise_stderr: the part from dequantisation and from the estimate of the log-det, for these images;
        NaN where a single draw cannot tell, and stderr then leaves out what a batch has in common.
    """

    mean: float
    stderr: float
    data_stderr: float
    noise_stderr: float

    @classmethod
    def from_scores(cls, scores: np.ndarray) -> "Estimate":
        """The mean of scores [draws, N], as `image_bits_per_dim` gives them, by two-way analysis of variance.

        The noise is judged by the variance over draws of the mean over images, since the roulette's length is
        shared by a batch and its error does not average out over images; what is left of the variance over images
        is the data's.
        """
        draws, number = scores.shape
        data = scores.mean(axis=0).var(ddof=1) if number > 1 else math.inf
        if draws == 1:
            stderr = math.sqrt(data / number)
            return cls(float(scores.mean()), stderr, stderr, math.nan)
        # What draws have in common does not add to the variance over images.
        rest = scores - scores.mean(axis=0)
        data = max(0.0, data - rest.var(axis=1, ddof=1).sum() / (draws - 1) / draws) / number
        noise = scores.mean(axis=1).var(ddof=1) / draws
        return cls(float(scores.mean()), math.sqrt(data + noise), math.sqrt(data), math.sqrt(noise))


def bits_per_dim(log_prob: Array, dim: int, levels: int) -> Array:
    """Bits/dim of log p(x) in nats, elementwise."""
    return -log_prob / (dim * math.log(2)) + math.log2(levels)


def dequantized_bits_per_dim(
    levels: int,
) -> Callable[[ResidualFlow, Array, Array, Estimator], tuple[Array, Diagnostics]]:
    """The loss of a density model: mean bits/dim of integer images [B, H, W, C], dequantised with the key.

    Unbiased, in value and gradient, if the estimator is. With the estimates' diagnostics. Beside the
    value, `tend` does to the flow what training owes it.
    """

    def loss(flow: ResidualFlow, images: Array, key: Array, estimator: Estimator) -> tuple[Array, Diagnostics]:
        noise_key, flow_key = jax.random.split(key)
        x = dequantize(images, noise_key, levels)
        scores, diagnostics = _scores(flow, x, flow_key, levels, estimator)
        return tend(flow, x, jnp.mean(scores)), diagnostics

    return loss


def tend(flow: ResidualFlow, x: Array, loss: Array) -> Array:
    """What a flow needs at every training step beside its loss: the loss, with the gradient of learnable orders.

    Where the flow has running statistics, they move towards those of the batch x, in place. Where it has
    learnable orders of norms, their gradient is that of 0.01 * `order_loss`, of which the value stays out.
    """
    if flow.config.batchnorm:
        flow.update_statistics(jax.lax.stop_gradient(x))
    if flow.config.learn_norms:
        order_loss = _ORDER_LOSS_WEIGHT * flow.order_loss()
        loss = loss + order_loss - jax.lax.stop_gradient(order_loss)
    return loss


def evaluate_bits_per_dim(
    flow: ResidualFlow,
    images: np.ndarray,
    key: Array,
    *,
    levels: int = 256,
    estimator: Estimator | None = None,
    draws: int = 4,
    batch_size: int = 100,
    mesh: Mesh | None = None,
) -> Estimate:
    """Mean bits/dim of quantised images [N, H, W, C], each counted once, with its standard errors.

    Unbiased for the dequantised density, whose bits/dim bound those of the integers from above. Every
    image is dequantised and its log-det estimated `draws` times. Cost: `draws` times the estimator's on N images.
    See `Estimate.from_scores` for the standard errors, `image_bits_per_dim` for the images one by one.

    Args:
      flow: of images [H, W, C].
      images: integers in {0..levels-1}.
      key: PRNG key of dequantisation and estimates.
      levels: number of values that a pixel can have.
      estimator: of the log-det; by default a roulette with eight exact terms. `Exact()` leaves
        only the dequantisation's noise, at D vjps of every block and D^2 numbers an image; use it
        with a small batch size.
      draws: independent passes over the images; the noise is judged from that many values.
      batch_size: images at once.
      mesh: devices along the axis "data" that share each batch, which is rounded up to a multiple of their number;
        None for one device. The result is the same if it is one.

    Raises:
      ValueError: unless the images are integers in {0..levels-1}, N > 0, draws and batch_size positive.
    """
    scores = image_bits_per_dim(
        flow, images, key, levels=levels, estimator=estimator, draws=draws, batch_size=batch_size, mesh=mesh
    )
    return Estimate.from_scores(scores)


def image_bits_per_dim(
    flow: ResidualFlow,
    images: np.ndarray,
    key: Array,
    *,
    levels: int = 256,
    estimator: Estimator | None = None,
    draws: int = 4,
    batch_size: int = 100,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Bits/dim of each of the quantised images [N, H, W, C] in each draw, [draws, N]. Arguments, cost and errors as in
    `evaluate_bits_per_dim`, which returns their mean.
    """
    estimator = Roulette(exact_terms=8) if estimator is None else estimator
    check_quantized("images", images, levels)
    check_count("draws", draws, 1)
    check_count("batch_size", batch_size, 1)
    number = len(images)
    if mesh is not None:
        flow, key, estimator = jax.device_put((flow, key, estimator), NamedSharding(mesh, PartitionSpec()))
    devices = 1 if mesh is None else mesh.size
    batch_size = devices * -(-min(batch_size, number) // devices)
    batches = -(-number // batch_size)
    padded = np.resize(images, (batches * batch_size, *images.shape[1:]))

    scores = np.zeros((draws, batches * batch_size))
    for draw, draw_key in enumerate(jax.random.split(key, draws)):
        keys = jax.random.split(draw_key, batches)
        parts = [
            _image_scores(flow, b, k, levels, estimator, mesh)
            for b, k in zip(np.split(padded, batches), keys, strict=True)
        ]
        scores[draw] = np.concatenate(jax.device_get(parts))
    return scores[:, :number]


@partial(jax.jit, static_argnames=("levels", "mesh"))
def _image_scores(
    flow: ResidualFlow, images: Array, key: Array, levels: int, estimator: Estimator, mesh: Mesh | None
) -> Array:
    """Bits/dim of one draw for each image, [B]."""

    def scores(flow, images, key, estimator):
        noise_key, flow_key = jax.random.split(key)
        return _scores(flow, dequantize(images, noise_key, levels), flow_key, levels, estimator)[0]

    if mesh is None:
        return scores(flow, images, key, estimator)
    whole, shares = PartitionSpec(), PartitionSpec("data")
    spread = jax.shard_map(scores, mesh=mesh, in_specs=(whole, shares, whole, whole), out_specs=shares)
    return spread(flow, images, key, estimator)


def _scores(flow: ResidualFlow, x: Array, key: Array, levels: int, estimator: Estimator) -> tuple[Array, Diagnostics]:
    """Bits/dim of dequantised images x, [B], and the diagnostics of the estimates."""
    log_prob, diagnostics = flow.log_prob(x, key=key, estimator=estimator, return_diagnostics=True)
    return bits_per_dim(log_prob, math.prod(flow.event_shape), levels), diagnostics
