"""`ResidualFlow`: the flows of the papers, for images and for vectors, made from a config."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_type
from resflow_jax.functional.values import UNIT_INTERVAL, Domain
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import MultiScale
from resflow_jax.layers.lipschitz import TIGHT, deferred_norms, map_linears
from resflow_jax.layers.norm_updates import update_norms
from resflow_jax.models.build import build_bijector, build_classifier, feature_shapes
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig, has_mixed_norms
from resflow_jax.models.flow import Flow

Array = jax.Array


class ResidualFlow(Flow):
    """The flow of a config: z [B, D] from N(0, I).

    The scales run in order; with factor-out, half of the channels leave for z after each of them (`MultiScale`).
    z is ordered scale by scale, the part factored out first in front, each part flattened in
    H, W, C order. Parameters have JAX's default float dtype.

    Example:
      flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2), rngs=nnx.Rngs(0))
      flow.initialize(x)                                  # ActNorm from a batch of data
      log_p = flow.log_prob(x, estimator=rf.Exact())      # [B]
    """

    def __init__(self, config: ImageFlowConfig | VectorFlowConfig, *, rngs: nnx.Rngs):
        """Makes a flow with random parameters, each linear layer's norm iterated to convergence."""
        if not isinstance(config, ImageFlowConfig | VectorFlowConfig):
            raise ValueError(f"config: expected ImageFlowConfig or VectorFlowConfig, got {type(config).__name__}")
        check_type("rngs", rngs, nnx.Rngs)
        if not hasattr(rngs, "params"):
            raise ValueError("rngs: expected a stream for params, as of nnx.Rngs(0) or nnx.Rngs(params=0), got none")
        create, static = _creator(config)
        state = create(rngs.params())
        bijector, classifier = nnx.merge(static["graphdef"], state)
        is_image = isinstance(config, ImageFlowConfig)
        super().__init__(bijector, event_shape=config.shape if is_image else (config.dim,))
        self.config = config
        self.classifier = classifier
        if has_mixed_norms(config):  # learned ones start at 2, where any start will do
            map_linears(self, lambda layer: layer.search_norm())
            self.converge_norms()

    @property
    def scales(self) -> list[Bijector]:
        """The bijector of every scale."""
        if isinstance(self.config, VectorFlowConfig):
            return [self.bijector]
        if isinstance(self.bijector, MultiScale):
            return list(self.bijector.scales)
        return list(self.bijector.bijectors[: len(self.config.blocks)])

    def logits(self, x: Array) -> Array:
        """Logits [B, classes] of the classifier on the flow's features (see `models.classifier`), for images x.

        Padding is by the mean of its noise. Costs one evaluation of every g. Raises ValueError for a flow whose config
        has no `classes`, and as `forward` for x.
        """
        if self.classifier is None:
            raise ValueError("classes: expected a flow whose config has classes, got none")
        with self._checked_input(x, are_data=True) as x:
            return _logits(*nnx.split(self), x)

    @property
    def support(self) -> tuple[Any, Any] | None:
        return (0.0, 1.0) if isinstance(self.config, ImageFlowConfig) else None

    def _domain(self, are_data: bool) -> Domain:
        is_image = isinstance(self.config, ImageFlowConfig)
        if is_image and self.config.logit_alpha is None and are_data:  # without a logit samples may be anywhere
            return UNIT_INTERVAL
        return super()._domain(are_data)

    def _run_initialize(self, x: Array, condition: Array | None) -> None:
        if self.classifier is None:
            super()._run_initialize(x, condition)
        else:
            self.classifier.initialize(_features(self, x, lambda scale, x: scale.initialize(x)))


@lru_cache(maxsize=16)
def _creator(config):
    """One compiled program that makes all parameters; what is not an array leaves it by the side."""
    static = {}

    @jax.jit
    def create(key):
        rngs = nnx.Rngs(key)
        with deferred_norms():
            bijector = build_bijector(config, rngs)
        update_norms(bijector, TIGHT, restart=False)  # their vectors are random: they lack nothing
        static["graphdef"], state = nnx.split((bijector, build_classifier(config, rngs)))
        return state

    return create, static


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, state, x):
    flow = nnx.merge(graphdef, state)
    return flow.classifier(_features(flow, x.astype(flow.dtype), lambda scale, x: scale(x)))


def _features(flow, x, apply):
    """The features [B, H, W, C] of every scale by apply(scale, x); see `models.classifier`."""
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
        return [*emitted, emitted[-1]]
    shapes = feature_shapes(flow.config)
    return [output.reshape(-1, *shape) for output, shape in zip(outputs, shapes, strict=True)]
