"""Class-conditional density of the 8x8 digits: p(x | class) beside p(x), and classification by Bayes' rule.

    class(x) = argmax_c log p(x | c),    p(x) = 1/10 sum_c p(x | c)

The classes are as frequent as each other, to 2 %. A flow whose condition did nothing would be right one time in ten.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import logsumexp

from experiments.configs.base import OptimizerConfig
from resflow_jax import DenseTail, Estimate, Flow, ImageFlowConfig, MixtureOfNormals, ResidualFlow, Roulette, Scales
from resflow_jax.data.embedded import load_digit_labels, load_digits
from resflow_jax.data.images import dequantize
from resflow_jax.functional.checks import check_count
from resflow_jax.training.evaluation import image_bits_per_dim
from resflow_jax.training.losses import dequantized_bits_per_dim
from resflow_jax.training.step import Trainer

Array = jax.Array

CLASSES = 10
LEVELS = 17
_BATCH = 100  # images at once in evaluation


@dataclass(frozen=True)
class DigitsConfig:
    """The two flows on digits.

    Attributes:
      model: the flow of p(x); that of p(x | c) has the same sizes, a condition in every block, and a normal
        distribution a class as its base.
      steps: optimiser steps of either flow; 0 leaves the digits out.
      batch_size: images a step.
      optimizer: learning rate, clipping, averaging.
      draws: dequantisations and estimates of every test image.
      images: at most so many images of the test split.
      samples: of every class in the picture.
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
            raise ValueError(f"digits.model.shape: expected (8, 8, 1), that of the digits, got {self.model.shape}")
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
    """What the test images tell.

    Attributes:
      bits_per_dim: of p(x | its class), or of p(x) for the flow without a condition.
      marginal: bits/dim of 1/10 sum_c p(x | c); None without a condition.
      accuracy: of Bayes' rule; None without a condition.
      seconds: of the training.
      first_step: of these, of the first step with its compilation.
    """

    bits_per_dim: Estimate
    marginal: Estimate | None
    accuracy: float | None
    seconds: float
    first_step: float


def one_hot(labels: np.ndarray) -> np.ndarray:
    """[..., 10] float32 for integers [...]."""
    return np.eye(CLASSES, dtype=np.float32)[labels]


def make_flow(model: ImageFlowConfig, seed: int, *, conditional: bool) -> Flow:
    """p(x), or p(x | c) for a one-hot c [10]."""
    rngs = nnx.Rngs(seed)
    if not conditional:
        return ResidualFlow(model, rngs=rngs)
    body = ResidualFlow(replace(model, condition_dim=CLASSES), rngs=rngs)
    return Flow(body.bijector, MixtureOfNormals(CLASSES, body.latent_shape, class_conditional=True, rngs=rngs))


def batches(config: DigitsConfig, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training images [B, 8, 8, 1] with one-hot classes [B, 10], without end, each epoch in a new order."""
    images, labels = load_digits().train, load_digit_labels()[0]
    rng = np.random.default_rng((seed, 2))
    while True:
        order = rng.permutation(len(images))
        for rows in np.split(order, range(config.batch_size, len(order), config.batch_size)):
            if len(rows) == config.batch_size:
                yield images[rows], one_hot(labels[rows])


def train(config: DigitsConfig, seed: int, *, conditional: bool) -> Iterator[tuple[int, float, float, Flow | None]]:
    """Trains a flow; yields steps done, mean bits/dim since the last yield, seconds in all, and, at the end, the flow.

    Raises:
      FloatingPointError: if the loss stops being finite.
    """
    flow, stream = make_flow(config.model, seed, conditional=conditional), batches(config, seed)
    images, classes = (np.concatenate(parts) for parts in zip(*(next(stream) for _ in range(8)), strict=True))
    first = dequantize(jnp.asarray(images), jax.random.key(seed), LEVELS)
    flow.initialize(first, jnp.asarray(classes) if conditional else None)
    objective = dequantized_bits_per_dim(LEVELS)
    trainer = Trainer(nnx.split(flow)[0], objective, config.optimizer.build(config.steps), config.optimizer.ema_decay)
    state, step, key = trainer.create_state(flow, Roulette()), trainer.compiled_step(), jax.random.key(seed)
    losses, began = [], time.perf_counter()
    for done in range(1, config.steps + 1):
        pair = next(stream)
        state, metrics = step(state, pair if conditional else pair[0], key)
        losses.append(metrics["loss"])
        if done == 1 or done % 50 == 0 or done == config.steps:
            loss = float(np.mean(jax.device_get(losses)))
            if not math.isfinite(loss):
                raise FloatingPointError(f"training on digits diverged by step {done}: loss {loss}")
            losses = []
            seconds = time.perf_counter() - began
            yield done, loss, seconds, trainer.averaged_flow(state) if done == config.steps else None


def class_bits_per_dim(flow: Flow, images: np.ndarray, key: Array, draws: int) -> np.ndarray:
    """Bits/dim of images [N, 8, 8, 1] in each draw, given each class: [draws, N, 10], or [draws, N, 1] of p(x).

    Every class sees the same dequantised images, and the same noise of the estimate.
    """
    conditions = [None] if flow.condition_shape is None else list(np.eye(CLASSES, dtype=np.float32))
    columns = [
        image_bits_per_dim(flow, images, key, levels=LEVELS, draws=draws, batch_size=_BATCH, condition=condition)
        for condition in conditions
    ]
    return np.stack(columns, axis=-1)


def evaluate(config: DigitsConfig, flow: Flow, seed: int, seconds: float, first_step: float) -> Scores:
    """Measures a flow on test images."""
    images, labels = load_digits().test[: config.images], load_digit_labels()[2][: config.images]
    bits = class_bits_per_dim(flow, images, jax.random.key(seed), config.draws)
    if bits.shape[-1] == 1:
        return Scores(Estimate.from_scores(bits[..., 0]), None, None, seconds, first_step)
    nats = bits * math.log(2) * math.prod(flow.event_shape)
    marginal = -(logsumexp(-nats, axis=-1) - math.log(CLASSES)) / math.log(2) / math.prod(flow.event_shape)
    own = np.take_along_axis(bits, labels[None, :, None], axis=-1)[..., 0]
    # The mean of the likelihood over draws is what Bayes' rule takes; with a single draw it is that of the draw.
    accuracy = float(np.mean(np.argmax(logsumexp(-nats, axis=0), axis=-1) == labels))
    return Scores(Estimate.from_scores(own), Estimate.from_scores(marginal), accuracy, seconds, first_step)


def sample_classes(flow: Flow, key: Array, number: int) -> np.ndarray:
    """Samples [10 * number, 8, 8, 1], class by class."""
    condition = jnp.broadcast_to(jnp.eye(CLASSES)[:, None], (CLASSES, number, CLASSES))
    samples = flow.sample(key, (CLASSES, number), condition=condition)
    return np.asarray(samples).reshape(-1, *flow.event_shape)


def digits_of_classes(number: int) -> np.ndarray:
    """Test images [10 * number, 8, 8, 1] in [0, 1], class by class; a class with fewer begins again."""
    images, labels = load_digits().test, load_digit_labels()[2]
    rows = [np.resize(np.flatnonzero(labels == n), number) for n in range(CLASSES)]
    return images[np.concatenate(rows)] / (LEVELS - 1)
