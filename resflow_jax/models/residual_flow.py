"""`ResidualFlow`: the residual flow of a config, for images and for vectors."""

from collections.abc import Callable
from functools import lru_cache, singledispatch
from typing import Any

import jax
from flax import nnx

from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.lipschitz import TIGHT, deferred_norms, map_linears, norms_are_deferred
from resflow_jax.layers.multi_scale import MultiScale
from resflow_jax.layers.norm_updates import update_norms
from resflow_jax.models.build import build_bijector
from resflow_jax.models.config import FlowConfig, ImageFlowConfig, VectorFlowConfig, has_mixed_norms
from resflow_jax.models.dequantization import VariationalDequantization
from resflow_jax.models.image_values import OfUnitImages
from resflow_jax.models.recipe_checks import check_rngs

Array = jax.Array


class ResidualFlow(OfUnitImages):
    """The residual flow of a config: z = f(x; c) [B, D] from N(0, I).

    The scales run in order. With factor-out, half of the channels go straight to z after each of them (`MultiScale`). z
    is ordered by scales, the first scale first, each part flattened in H, W, C order. Parameters have JAX's default
    float dtype. Methods, their costs and errors are those of `Flow`.

    Args:
      config: an `ImageFlowConfig` or a `VectorFlowConfig`.
      rngs: `rngs.params` draws the parameters.

    Randomness: as in `Flow`. Cost: construction iterates each linear layer's norm to convergence, in one compiled
    program.

    Raises:
      ValueError: for another config, and for rngs without a stream for parameters.

    Source: Chen et al. (2019, arXiv 1906.02735), appendix E.

    Example:
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (8, 2))
      >>> flow.initialize(x)                                      # ActNorm from a batch of data
      >>> flow.log_prob(x, estimator=rf.Exact()).shape            # in nats
      (8,)
    """

    config_types = (
        ImageFlowConfig,
        VectorFlowConfig,
    )  # exactly these; a subclass of a config has its own class of flows

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs):
        """Makes a flow with random parameters, the norm of each linear layer iterated to convergence.

        Raises:
          ValueError: for another config, and for rngs without a stream for parameters.
        """
        if type(config) not in self.config_types:
            expected = " or ".join(cls.__name__ for cls in self.config_types)
            raise ValueError(f"config: expected {expected}, got {type(config).__name__}")
        check_rngs(rngs)
        try:
            bijector = made_bijector(config, type(self)._build, rngs)
        except OverflowError as error:
            raise ValueError(f"config: expected arrays of sizes within 64 bits, got {config}: {error}") from error
        is_image = isinstance(config, ImageFlowConfig)
        super().__init__(bijector, event_shape=config.shape if is_image else (config.dim,))
        self.config = config
        if is_image and config.data.dequantization.couplings:
            self.dequantizer = VariationalDequantization.of(config, rngs=rngs)
        if has_mixed_norms(config) and not norms_are_deferred():  # learned orders start at 2, where no search is needed
            map_linears(self, lambda layer: layer.search_norm())
            self.converge_norms()

    @property
    def scales(self) -> list[Bijector]:
        """The bijector of every scale, in order."""
        if isinstance(self.config, VectorFlowConfig):
            return [self.bijector]
        if isinstance(self.bijector, MultiScale):
            return list(self.bijector.scales)
        return list(self.bijector.bijectors[: len(self.config.blocks)])

    @staticmethod
    def _build(config: FlowConfig, rngs: nnx.Rngs) -> Bijector:
        """The bijector of a config."""
        return build_bijector(config, rngs)


@singledispatch
def flow_from_config(config: FlowConfig, *, rngs: nnx.Rngs) -> ResidualFlow:
    """The flow of any config that a flow has as `flow.config`: a `ResidualFlow`, or the subclass for that config.

    Raises:
      ValueError: as `ResidualFlow`.
    """
    return ResidualFlow(config, rngs=rngs)


def made_bijector(config: Any, build: Callable[[Any, nnx.Rngs], Bijector], rngs: nnx.Rngs) -> Bijector:
    """The bijector of a config with random parameters, and with converged norms unless those are deferred."""
    if norms_are_deferred():  # only the structure matters: the arrays come from a file
        return build(config, rngs)
    create, static = _creator(config, build)
    state = create(rngs.params())
    return nnx.merge(static["graphdef"], state)


@lru_cache(maxsize=16)
def _creator(config, build):
    """A compiled program that makes all parameters of a config's bijector, with converged norms.

    Returns:
      The program, key -> state, and a dict that receives the structure as "graphdef" at its first call.
    """
    static = {}

    @jax.jit
    def create(key):
        with deferred_norms():
            bijector = build(config, nnx.Rngs(key))
        update_norms(bijector, TIGHT, restart=False)  # random vectors need no restart
        static["graphdef"], state = nnx.split(bijector)
        return state

    return create, static
