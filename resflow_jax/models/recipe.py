"""`RecipeFlow`: what the flows of the other recipes share, of coupling, autoregressive and continuous layers."""

from typing import Any, ClassVar

import jax
from flax import nnx

from resflow_jax.layers.bijector import Bijector
from resflow_jax.models.build import logit, normalization, padding_layers
from resflow_jax.models.dequantization import VariationalDequantization
from resflow_jax.models.image_values import OfUnitImages
from resflow_jax.models.recipe_checks import check_rngs
from resflow_jax.models.residual_flow import made_bijector

Array = jax.Array
Shape = tuple[int, ...]


class RecipeFlow(OfUnitImages):
    """The flow of a config that has `shape` and `data`: a subclass defines `_build`, and gives `_config_type`."""

    _config_type: ClassVar[type]

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        """Makes a flow with random parameters, in one compiled program.

        Raises:
          ValueError: for another config, and for rngs without a stream for parameters.
        """
        if type(config) is not self._config_type:
            raise ValueError(f"config: expected {self._config_type.__name__}, got {type(config).__name__}")
        check_rngs(rngs)
        super().__init__(made_bijector(config, type(self)._build, rngs), event_shape=config.shape)
        self.config = config
        if self._is_image and config.data.dequantization.couplings:
            self.dequantizer = VariationalDequantization.of(config, rngs=rngs)

    @staticmethod
    def _build(config: Any, rngs: nnx.Rngs) -> Bijector:
        """The bijector of a config."""
        raise NotImplementedError


def first_layers(config: Any) -> tuple[list[Bijector], Shape]:
    """The layers before all others, which transform the data as `config.data` says, and the shape after them."""
    layers = [*(logit(config) if len(config.shape) == 3 else []), *normalization(config)]
    shape = (*config.shape[:-1], config.shape[-1] + config.data.padding.channels)
    return [*layers, *padding_layers(config.data.padding)], shape
