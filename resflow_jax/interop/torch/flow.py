"""Flows that only the authors' PyTorch implementation has. An imported file may need more than `ImageFlowConfig`.

They may have coupling blocks, blocks of dense layers in every scale, noise that is appended before the logit, a
normalisation after the first squeeze, and a classifier on the flow's features.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_count, check_flag, check_flags
from resflow_jax.functional.estimators import Estimator
from resflow_jax.interop.torch.classifier import Classifier
from resflow_jax.interop.torch.couplings import coupling_bijector
from resflow_jax.layers.bijector import Bijector, join_diagnostics, own_condition, split_estimator, split_key
from resflow_jax.layers.multi_scale import MultiScale
from resflow_jax.layers.shapes import Flatten
from resflow_jax.models.blocks import Around
from resflow_jax.models.build import (
    blocks_of_scale,
    convolutional_blocks,
    data_layers,
    feature_shapes,
    first_squeeze,
    fully_connected,
    image_bijector,
    logit,
    normalization,
    padding_layers,
)
from resflow_jax.models.config import ImageFlowConfig
from resflow_jax.models.residual_flow import ResidualFlow, flow_from_config

Array = jax.Array
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TorchImageConfig(ImageFlowConfig):
    """An `ImageFlowConfig` with the options that only files of the PyTorch implementation need.

    With `scales.squeeze_first`, `data.mean` and `data.std` may have a number for each of the 4C channels after
    the squeeze, and are then applied there.

    Attributes:
      fully_connected: whether every scale has blocks of dense layers on the flattened image. They have one layer for
        each of `kernels`, of width `hidden_channels`. An ActNorm then acts on single features, and an invertible linear
        layer mixes all features.
      padding_first: whether the noise is appended before the logit and passes through it. Noise outside of [0, 1] gives
        NaN; the authors' Gaussian, with mean 1/2 and standard deviation 1/8, leaves it six times in 100000.
      classes: number of classes of the classifier (see `interop.torch.classifier`); 0 for no classifier.
      classifier_channels: number of channels of the classifier's convolutions.
      block: "resblock", or "coupling" for coupling blocks (see `interop.torch.couplings`).
    """

    fully_connected: bool = False
    padding_first: bool = False
    classes: int = 0
    classifier_channels: int = 256
    block: Literal["resblock", "coupling"] = "resblock"
    block_names: ClassVar[tuple[str, ...]] = ("resblock", "coupling")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.hidden_channels, tuple):
            raise ValueError(f"hidden_channels: expected one width for all scales, got {self.hidden_channels}")
        if self.block == "coupling" and self.densenet.depth:
            raise ValueError(f"block: expected 'resblock' with densenet.depth {self.densenet.depth}, got 'coupling'")
        check_flags(self)
        check_count("classes", self.classes, 0)
        check_count("classifier_channels", self.classifier_channels, 1)
        if self.fully_connected and self.densenet.depth:
            raise ValueError(f"fully_connected: expected False with densenet.depth {self.densenet.depth}, got True")

    @property
    def squeezed_data(self) -> bool:
        """Whether `data.mean` is that of the channels after the first squeeze."""
        mean = self.data.mean
        return self.scales.squeeze_first and mean is not None and len(mean) != self.shape[-1]

    @property
    def data_channels(self) -> int:
        return self.shape[-1] * (4 if self.squeezed_data else 1)

    def simplest(self) -> ImageFlowConfig:
        """The same flow as a plain `ImageFlowConfig` if no option of this class matters; this config otherwise."""
        pads_first = self.padding_first and self.data.padding.channels
        if self.fully_connected or pads_first or self.classes or self.squeezed_data or self.block == "coupling":
            return self
        settings = {field.name: getattr(self, field.name) for field in fields(ImageFlowConfig)}
        return ImageFlowConfig(**settings | {"block": "residual"})


class TorchFlow(ResidualFlow):
    """The flow of a `TorchImageConfig`. `load_torch_checkpoint` gives one if the file needs it.

    Attributes:
      classifier: the classifier on the flow's features; None if there are no classes.
    """

    config_types = (TorchImageConfig,)

    def __init__(self, config: TorchImageConfig, *, rngs: nnx.Rngs):
        """Makes a flow with random parameters, and its classifier."""
        super().__init__(config, rngs=rngs)
        sizes = feature_shapes(config), config.classifier_channels, config.classes
        self.classifier = Classifier(*sizes, rngs=rngs) if config.classes else None

    def logits(self, x: Array) -> Array:
        """Returns the logits of the classifier on the flow's features (see `interop.torch.classifier`).

        Padding has the value of the mean of its noise. Cost: one evaluation of every g.

        Args:
          x: images [B, H, W, C].

        Returns:
          Logits [B, classes].

        Raises:
          ValueError: for a flow whose config has no `classes`, and as `forward` for x.
        """
        self._check_classifier()
        with self._checked_input(x, are_data=True) as (x, _):
            return _logits(*nnx.split(self), x)

    def forward_and_log_prob(
        self,
        x: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
        return_logits: bool = False,
    ) -> tuple[Array, ...]:
        """As `Flow.forward_and_log_prob`; with `return_logits` the last value is the logits [B, classes] of this pass.

        They equal those of `logits`, unless the flow pads x: then they belong to the noise that was drawn.

        Cost: that of `forward`, and one convolution a scale for the logits.

        Raises:
          ValueError: as `forward`, and with `return_logits` for a flow whose config has no `classes`.
        """
        check_flag("return_diagnostics", return_diagnostics)
        check_flag("return_logits", return_logits)
        if not return_logits:
            options = {"condition": condition, "key": key, "estimator": estimator}
            return super().forward_and_log_prob(x, return_diagnostics=return_diagnostics, **options)
        self._check_classifier()
        z, log_prob, diagnostics, logits = self._estimated(_forward_and_logits, x, condition, key, estimator, True)
        return (z, log_prob, diagnostics, logits) if return_diagnostics else (z, log_prob, logits)

    def _check_classifier(self) -> None:
        if self.classifier is None:
            raise ValueError("classes: expected a flow whose config has classes, got none")

    def _run_initialize(self, x: Array, condition: Array | None) -> None:
        if self.classifier is None:
            super()._run_initialize(x, condition)
        else:
            self.classifier.initialize(_features(self, x, lambda scale, x: scale.initialize(x))[0])

    @staticmethod
    def _build(config: TorchImageConfig, rngs: nnx.Rngs) -> Bijector:
        if config.block == "coupling":
            return coupling_bijector(config, _data_layers(config), rngs)
        blocks = _fully_connected_blocks if config.fully_connected else convolutional_blocks
        return image_bijector(config, _data_layers(config), blocks, rngs)


@flow_from_config.register
def _(config: TorchImageConfig, *, rngs: nnx.Rngs) -> TorchFlow:
    return TorchFlow(config, rngs=rngs)


def _data_layers(config: TorchImageConfig) -> list[Bijector]:
    """The layers of `build.data_layers`, in the order that the options say."""
    noise, squeeze = padding_layers(config.data.padding), first_squeeze(config)
    if config.squeezed_data:
        return [*noise, *squeeze, *normalization(config, 4 * config.data.padding.channels)]
    if config.padding_first:
        return [*normalization(config), *noise, *logit(config), *squeeze]
    return data_layers(config)


def _fully_connected_blocks(
    config: TorchImageConfig, scale: int, shape: Shape, rngs: nnx.Rngs
) -> tuple[list[Bijector], Shape]:
    """The blocks of one scale on flattened images."""
    dim = math.prod(shape)
    between = config.between
    actnorms = [(dim,)] * (between.actnorm + between.feature_actnorm)
    around = Around(config, actnorms, dim, between.invertible_linear)
    contraction = fully_connected(config, dim, len(config.kernels), config.hidden_channels, config.norms.orders)
    return [Flatten(shape), *blocks_of_scale(config, scale, contraction, around, rngs)], (dim,)


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, state, x):
    flow = nnx.merge(graphdef, state)
    return flow.classifier(_features(flow, x.astype(flow.dtype), lambda scale, x: scale(x))[0])


def _forward_and_logits(graphdef, state, x, key, estimator, condition):
    """(z, log_prob, diagnostics, logits) in one pass, with the keys that the flow's bijector gives to its layers."""
    flow = nnx.merge(graphdef, state)
    layers = list(flow.bijector.scales if isinstance(flow.bijector, MultiScale) else flow.bijector.bijectors)
    inputs = zip(split_key(key, layers), split_estimator(estimator, layers), strict=True)
    log_dets, diagnostics = [], []

    def estimate(scale, x):
        y, log_det, found = scale.estimate(x, *next(inputs), own_condition(scale, condition))
        log_dets.append(log_det)
        diagnostics.extend(found)
        return y

    features, z = _features(flow, x.astype(flow.dtype), estimate)
    log_prob = flow.base.log_prob(z, flow._base_condition(condition)) + sum(log_dets)
    return z, log_prob, join_diagnostics(diagnostics, x), flow.classifier(features)


def _features(flow, x, apply):
    """The features [B, H, W, C] of every scale by apply(scale, x), and z; see `interop.torch.classifier`."""
    *scales, last = flow.scales
    outputs, emitted = [], []
    for scale in scales:
        outputs.append(apply(scale, x))
        x = outputs[-1]
        if isinstance(flow.bijector, MultiScale):
            x, part = jnp.split(x, 2, axis=-1)
            emitted.append(part)
    outputs.append(apply(last, x))
    if isinstance(flow.bijector, MultiScale):
        return [*emitted, emitted[-1]], flow.bijector._joined([*emitted, outputs[-1]])
    shapes = feature_shapes(flow.config)
    features = [output.reshape(-1, *shape) for output, shape in zip(outputs, shapes, strict=True)]
    return features, outputs[-1].reshape(-1, flow.dim)
