"""`ContinuousFlow` and its config: flows of ordinary differential equations (FFJORD)."""

from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.continuous import ADJOINTS, Adjoint, ContinuousBlock, VelocityField, check_times
from resflow_jax.layers.couplings.conditioners import CNNConditioner, MLPConditioner
from resflow_jax.layers.multi_scale import MultiScale
from resflow_jax.layers.residual import ResidualStack
from resflow_jax.layers.shapes import Flatten, Squeeze
from resflow_jax.models.groups import ImageTransform, VectorTransform
from resflow_jax.models.recipe import RecipeFlow, first_layers
from resflow_jax.models.recipe_checks import (
    Network,
    OfEvents,
    as_event_shape,
    check_network,
    check_shape_and_data,
    check_squeezes,
    halvings,
)
from resflow_jax.models.residual_flow import flow_from_config

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ContinuousFlowConfig(OfEvents):
    """Configuration of a continuous flow, on vectors [B, D] or images [B, H, W, C] with values in [0, 1].

    The preset `ffjord` is for either; its arguments are the shape and any fields that are to replace the preset's.
    Every block has an `ActNorm` before it. With a convolutional network a 2x2 squeeze follows each scale but the last,
    and half of the channels then leaves for z; with an `MLPConditioner` images are flattened.

    It holds sizes and names only, is frozen and hashable, and has no randomness.

    Attributes:
      shape: shape of one x: (D,) or (H, W, C).
      blocks: number of blocks, of each scale for images.
      conditioner: settings of the networks of the vector fields; their activation should be smooth.
      squeezes: number of squeezes between scales of images.
      time: length of the interval of each block.
      tolerance: relative and absolute tolerance of the solver.
      max_steps: cap on the steps of a solve.
      adjoint: how gradients are computed; see `ContinuousBlock`.
      condition_dim: number of elements of a condition c, for p(x | c); None for p(x).
      data: transform of the data; the default stands for `ImageTransform()` where x is an image.

    Cost: a `ContinuousFlow` of it takes some ten steps of six evaluations for each block, and more as it learns.

    Raises:
      ValueError: for values outside their ranges, and for a network that does not fit the events.

    Source: Grathwohl et al. (2019, arXiv 1810.01367), section 4.

    Example:
      >>> rf.ContinuousFlowConfig.ffjord((2,)).conditioner.activation
      'tanh'
    """

    shape: Shape
    blocks: int = 1
    conditioner: Network = MLPConditioner((64, 64, 64), "tanh")
    squeezes: int = 0
    time: float = 1.0
    tolerance: float = 1e-4
    max_steps: int = 1000
    adjoint: Adjoint = "checkpointed"
    condition_dim: int | None = None
    data: VectorTransform | ImageTransform = VectorTransform()

    def __post_init__(self):
        check_shape_and_data(self)
        check_count("blocks", self.blocks, 1)
        check_count("squeezes", self.squeezes, 0)
        check_times(self.time, self.tolerance)
        check_count("max_steps", self.max_steps, 1)
        check_choice("adjoint", self.adjoint, ADJOINTS)
        check_network(self)
        if self.squeezes and self.is_flat:
            raise ValueError(f"squeezes: expected 0 for vectors and MLPConditioner, got {self.squeezes}")
        check_squeezes(self.shape, self.squeezes)

    def fitted(self, shape: Shape) -> "ContinuousFlowConfig":
        """The same settings for events of another shape, with as many squeezes as its sides allow."""
        shape = as_event_shape(shape)
        squeezes = 0 if self.is_flat else halvings(shape, self.squeezes)
        return replace(self, shape=shape, squeezes=squeezes)

    @classmethod
    def ffjord(cls, shape: Shape, **settings: Any) -> "ContinuousFlowConfig":
        """One block for vectors; for images convolutions of 32 channels, with up to two squeezes."""
        shape = as_event_shape(shape)
        if len(shape) == 1 or isinstance(settings.get("conditioner"), MLPConditioner):
            return cls(shape, **settings)
        network = CNNConditioner((32, 32), (3, 3, 3), "softplus")
        preset = {"conditioner": network, "squeezes": halvings(shape, 2)}
        return cls(shape, **{**preset, **settings})


class ContinuousFlow(RecipeFlow):
    """The continuous flow of a config: z = f(x; c) [B, D] from N(0, I), the solution of differential equations.

    It needs diffrax, from the extra `diffrax`. Log-densities are estimated with one Hutchinson probe by default, and
    exact with `estimator=rf.Exact()`, up to the tolerance of the solver. `inverse` returns a status. Methods and errors
    are those of `Flow`.

    Args:
      config: a `ContinuousFlowConfig`, such as `ContinuousFlowConfig.ffjord((2,))`.
      rngs: `rngs.params` draws the parameters.

    Randomness: as in `ContinuousBlock`. Cost: a solve for every block, in either direction.

    Raises:
      ImportError: without diffrax.
      ValueError: for another config, and for rngs without a stream for parameters.

    Source: Grathwohl et al. (2019, arXiv 1810.01367).

    Example:
      >>> config = rf.ContinuousFlowConfig.ffjord((2,), conditioner=rf.MLPConditioner((8,), "tanh"))
      >>> flow = rf.ContinuousFlow(config, rngs=nnx.Rngs(0))
      >>> flow.log_prob(jnp.zeros((4, 2)), estimator=rf.Exact()).shape
      (4,)
    """

    _config_type = ContinuousFlowConfig

    @staticmethod
    def _build(config: ContinuousFlowConfig, rngs: nnx.Rngs) -> Bijector:
        layers, shape = first_layers(config)
        if config.is_flat:
            layers += [Flatten(shape)] if len(shape) > 1 else []
            dim = config.dim + config.data.padding.channels * (config.dim // config.shape[-1])
            return Chain([*layers, _blocks(config, (dim,), rngs)])
        scales = []
        for n in range(config.squeezes + 1):
            layers.append(_blocks(config, shape, rngs))
            if n < config.squeezes:
                layers.append(Squeeze(shape))
                height, width, channels = layers[-1].output_shape(shape)
                shape = height, width, channels // 2
            scales.append(Chain(layers))
            layers = []
        return MultiScale(scales, config.shape)


@flow_from_config.register
def _(config: ContinuousFlowConfig, *, rngs: nnx.Rngs) -> ContinuousFlow:
    return ContinuousFlow(config, rngs=rngs)


def _blocks(config: ContinuousFlowConfig, shape: Shape, rngs: nnx.Rngs) -> ResidualStack:
    def step(rngs: nnx.Rngs) -> Chain:
        field = VelocityField(shape, config.conditioner, config.condition_dim, rngs=rngs)
        settings = {name: getattr(config, name) for name in ("time", "tolerance", "max_steps", "adjoint")}
        return Chain([ActNorm(shape[-1:]), ContinuousBlock(field, **settings)])

    return ResidualStack(step, config.blocks, rngs=rngs)
