"""`RecipeFlow`: what the flows of the other recipes share, of coupling, autoregressive and continuous layers."""

from typing import Any, ClassVar

import jax
from flax import nnx

from resflow_jax.functional.checks import check_type
from resflow_jax.functional.values import UNIT_INTERVAL, Domain
from resflow_jax.layers.bijector import Bijector
from resflow_jax.models.build import logit, normalization, padding_layers
from resflow_jax.models.dequantization import VariationalDequantization
from resflow_jax.models.flow import Flow
from resflow_jax.models.residual_flow import compiled_creator

Array = jax.Array
Shape = tuple[int, ...]


class RecipeFlow(Flow):
    """The flow of a config that has `shape` and `data`: a subclass defines `_build`, and gives `_config_type`."""

    _config_type: ClassVar[type]

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        """Makes a flow with random parameters, in one compiled program.

        Raises:
          ValueError: for another config, and for rngs without a stream for parameters.
        """
        if type(config) is not self._config_type:
            raise ValueError(f"config: expected {self._config_type.__name__}, got {type(config).__name__}")
        check_type("rngs", rngs, nnx.Rngs)
        if not hasattr(rngs, "params"):
            raise ValueError("rngs: expected a stream for params, as of nnx.Rngs(0) or nnx.Rngs(params=0), got none")
        create, static = compiled_creator(config, type(self)._build)
        state = create(rngs.params())
        super().__init__(nnx.merge(static["graphdef"], state), event_shape=config.shape)
        self.config = config
        if self._is_image and config.data.dequantization.couplings:
            self.dequantizer = VariationalDequantization.of(config, rngs=rngs)

    @property
    def _is_image(self) -> bool:
        return len(self.config.shape) == 3

    @property
    def support(self) -> tuple[Any, Any] | None:
        return (0.0, 1.0) if self._is_image else None

    def _domain(self, are_data: bool) -> Domain:
        if self._is_image and self.config.data.logit_alpha is None and are_data:  # samples may lie outside
            return UNIT_INTERVAL
        return super()._domain(are_data)

    @staticmethod
    def _build(config: Any, rngs: nnx.Rngs) -> Bijector:
        """The bijector of a config."""
        raise NotImplementedError


def first_layers(config: Any) -> tuple[list[Bijector], Shape]:
    """The layers before all others, which transform the data as `config.data` says, and the shape after them."""
    layers = [*(logit(config) if len(config.shape) == 3 else []), *normalization(config)]
    shape = (*config.shape[:-1], config.shape[-1] + config.data.padding.channels)
    return [*layers, *padding_layers(config.data.padding)], shape
