"""Class-conditional density of the 8x8 digits: p(x | class) beside p(x), and classification by Bayes' rule.

    class(x) = argmax_c log p(x | c),    p(x) = 1/10 sum_c p(x | c)

The classes are equally frequent, up to 2 %. A flow that ignored its condition would be right for one image in ten.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import logsumexp

from experiments.configs.base import OptimizerConfig
from resflow_jax import (
    DenseTail,
    Estimate,
    FitResult,
    Flow,
    ImageFlowConfig,
    MixtureOfNormals,
    ResidualFlow,
    Scales,
    fit,
)
from resflow_jax.data.embedded import load_digit_labels, load_digits
from resflow_jax.functional.checks import check_count
from resflow_jax.training.evaluation import image_bits_per_dim

Array = jax.Array

CLASSES = 10
LEVELS = 17
_BATCH = 100  # images per batch in evaluation


@dataclass(frozen=True)
class DigitsConfig:
    """The two flows on digits.

    Attributes:
      model: the flow of p(x). The flow of p(x | c) has the same sizes, a condition in every block, and one normal
        distribution per class as its base.
      steps: number of optimiser steps of each flow; 0 leaves the digits out.
      batch_size: images per step.
      optimizer: learning rate, clipping, averaging.
      draws: number of dequantisations and estimates of every test image.
      images: maximum number of test images.
      samples: number of samples of every class in the picture.
    """

    model: ImageFlowConfig = ImageFlowConfig(
        (8, 8, 1),
        blocks=(6,),
        hidden_channels=32,
        preactivation="all",
        tail=DenseTail(2, hidden=64),
        scales=Scales(squeeze_first=True),
    )
    steps: int = 600
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-2, warmup=60, ema_decay=0.98)
    draws: int = 2
    images: int = 300
    samples: int = 10

    def __post_init__(self):
        if self.model.shape != (8, 8, 1):
            raise ValueError(f"digits.model.shape: expected (8, 8, 1), the shape of the digits, got {self.model.shape}")
        if self.model.condition_dim is not None:
            raise ValueError(
                f"digits.model.condition_dim: expected None, for the classes are added, got {self.model.condition_dim}"
            )
        if self.optimizer.accumulate != 1:
            raise ValueError(f"digits.optimizer.accumulate: expected 1, got {self.optimizer.accumulate}")
        check_count("digits.steps", self.steps, 0)
        check_count("digits.batch_size", self.batch_size, 2)
        check_count("digits.draws", self.draws, 1)
        check_count("digits.images", self.images, 2)
        check_count("digits.samples", self.samples, 1)


class Scores(NamedTuple):
    """The results of a flow on the test images.

    Attributes:
      bits_per_dim: bits/dim of p(x | class of x), or of p(x) for the flow without a condition.
      marginal: bits/dim of 1/10 sum_c p(x | c); None without a condition.
      accuracy: accuracy of Bayes' rule; None without a condition.
      seconds: seconds of training, compilation included.
    """

    bits_per_dim: Estimate
    marginal: Estimate | None
    accuracy: float | None
    seconds: float


def one_hot(labels: np.ndarray) -> np.ndarray:
    """One-hot vectors [..., 10], float32, of integer labels [...]."""
    return np.eye(CLASSES, dtype=np.float32)[labels]


def make_flow(model: ImageFlowConfig, seed: int, *, conditional: bool) -> Flow:
    """The flow of p(x), or of p(x | c) for a one-hot c [10]."""
    rngs = nnx.Rngs(seed)
    if not conditional:
        return ResidualFlow(model, rngs=rngs)
    body = ResidualFlow(replace(model, condition_dim=CLASSES), rngs=rngs)
    return Flow(body.bijector, MixtureOfNormals(CLASSES, body.latent_shape, class_conditional=True, rngs=rngs))


def train(config: DigitsConfig, seed: int, *, conditional: bool) -> FitResult:
    """Trains a flow on all training images, without validation; returns it with its history.

    Raises:
      FloatingPointError: if the loss stops being finite.
    """
    return fit(
        make_flow(config.model, seed, conditional=conditional),
        load_digits().train,
        condition=one_hot(load_digit_labels()[0]) if conditional else None,
        key=seed,
        validation=None,
        steps=config.steps,
        batch_size=config.batch_size,
        optimizer=config.optimizer.build(config.steps),
        ema=config.optimizer.ema_decay,
        validate_every=50,
        levels=LEVELS,
    )


def class_bits_per_dim(flow: Flow, images: np.ndarray, key: Array, draws: int) -> np.ndarray:
    """Bits/dim of images [N, 8, 8, 1] in each draw, given each class: [draws, N, 10], or [draws, N, 1] for p(x).

    Every class has the same dequantised images, and the same noise of the estimate.
    """
    conditions = [None] if flow.condition_shape is None else list(np.eye(CLASSES, dtype=np.float32))
    columns = [
        image_bits_per_dim(flow, images, key, levels=LEVELS, draws=draws, batch_size=_BATCH, condition=condition)
        for condition in conditions
    ]
    return np.stack(columns, axis=-1)


def evaluate(config: DigitsConfig, flow: Flow, seed: int, seconds: float) -> Scores:
    """Measures a flow on test images."""
    images, labels = load_digits().test[: config.images], load_digit_labels()[2][: config.images]
    bits = class_bits_per_dim(flow, images, jax.random.key(seed), config.draws)
    if bits.shape[-1] == 1:
        return Scores(Estimate.from_scores(bits[..., 0]), None, None, seconds)
    nats = bits * math.log(2) * math.prod(flow.event_shape)
    marginal = -(logsumexp(-nats, axis=-1) - math.log(CLASSES)) / math.log(2) / math.prod(flow.event_shape)
    own = np.take_along_axis(bits, labels[None, :, None], axis=-1)[..., 0]
    # Bayes' rule uses the mean of the likelihood over draws.
    accuracy = float(np.mean(np.argmax(logsumexp(-nats, axis=0), axis=-1) == labels))
    return Scores(Estimate.from_scores(own), Estimate.from_scores(marginal), accuracy, seconds)


def sample_classes(flow: Flow, key: Array, number: int) -> np.ndarray:
    """Samples [10 * number, 8, 8, 1], class by class."""
    condition = jnp.broadcast_to(jnp.eye(CLASSES)[:, None], (CLASSES, number, CLASSES))
    samples = flow.sample(key, (CLASSES, number), condition=condition)
    return np.asarray(samples).reshape(-1, *flow.event_shape)


def digits_of_classes(number: int) -> np.ndarray:
    """Test images [10 * number, 8, 8, 1] in [0, 1], class by class; a class with fewer images repeats them."""
    images, labels = load_digits().test, load_digit_labels()[2]
    rows = [np.resize(np.flatnonzero(labels == n), number) for n in range(CLASSES)]
    return images[np.concatenate(rows)] / (LEVELS - 1)
