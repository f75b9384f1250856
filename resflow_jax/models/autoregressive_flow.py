"""`AutoregressiveFlow` and its config: MADE and masked autoregressive flows of vectors."""

from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from resflow_jax.functional.activations import ActivationName, check_single_channels
from resflow_jax.functional.checks import as_shape, check_count, check_flags
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.autoregressive import MaskedAutoregressive
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.residual import ResidualStack
from resflow_jax.layers.shapes import Permutation
from resflow_jax.models.groups import VectorTransform
from resflow_jax.models.recipe import RecipeFlow, first_layers
from resflow_jax.models.recipe_checks import OfEvents, check_shape_and_data
from resflow_jax.models.residual_flow import flow_from_config


@dataclass(frozen=True)
class AutoregressiveFlowConfig(OfEvents):
    """Configuration of a flow of masked autoregressive layers on vectors [B, D].

    The presets are `made`, one layer with Gaussian conditionals, and `maf`, five layers with reversed orders between
    them. Their arguments are the shape and any fields that are to replace the preset's.

    It holds sizes and names only, is frozen and hashable, and has no randomness.

    Attributes:
      shape: (D,), the shape of one x.
      layers: number of layers, each with the order of the elements reversed after it.
      hidden: widths of a network's hidden layers.
      activation: name of the activation, one of `ACTIVATIONS` that acts on single channels.
      actnorm: whether an `ActNorm` follows each layer; one precedes all of them in any case.
      condition_dim: number of elements of a condition c, for p(x | c); None for p(x).
      data: normalisation and padding of the vectors.

    Cost: an `AutoregressiveFlow` of it evaluates each network once for a density, and D times for a sample.

    Raises:
      ValueError: for values outside their ranges, and for the shape of an image.

    Source: Germain et al. (2015, arXiv 1502.03509) (MADE); Papamakarios et al. (2017, arXiv 1705.07057), section 3
    (MAF).

    Example:
      >>> rf.AutoregressiveFlowConfig.maf((6,), hidden=(32,)).layers
      5
    """

    shape: tuple[int, ...]
    layers: int = 5
    hidden: tuple[int, ...] = (128, 128)
    activation: ActivationName = "relu"
    actnorm: bool = True
    condition_dim: int | None = None
    data: VectorTransform = VectorTransform()

    def __post_init__(self):
        object.__setattr__(self, "shape", as_shape("shape", self.shape))
        if len(self.shape) != 1:
            raise ValueError(f"shape: expected (D,), since autoregressive flows are for vectors, got {self.shape}")
        check_shape_and_data(self)
        check_count("layers", self.layers, 1)
        object.__setattr__(self, "hidden", as_shape("hidden", self.hidden))
        check_single_channels(self.activation)
        check_flags(self)

    def fitted(self, shape: tuple[int, ...]) -> "AutoregressiveFlowConfig":
        """The same settings for another number of elements."""
        return replace(self, shape=shape)

    @classmethod
    def made(cls, shape: tuple[int, ...], **settings: Any) -> "AutoregressiveFlowConfig":
        """One autoregressive layer."""
        return cls(shape, **{"layers": 1, "actnorm": False, **settings})

    @classmethod
    def maf(cls, shape: tuple[int, ...], **settings: Any) -> "AutoregressiveFlowConfig":
        """Five autoregressive layers, with an ActNorm instead of each batch normalisation."""
        return cls(shape, **settings)


class AutoregressiveFlow(RecipeFlow):
    """The masked autoregressive flow of a config: z = f(x; c) [B, D] from N(0, I).

    Log-densities are exact, in nats, and take no key unless the flow pads x. Samples take D passes, one after the
    other. There is no bound on its Lipschitz constants. Methods and errors are those of `Flow`.

    Args:
      config: an `AutoregressiveFlowConfig`, for example one of its presets.
      rngs: `rngs.params` draws the parameters.

    Randomness: none but in samples and padding. Cost: one pass through every network; D for the inverse.

    Raises:
      ValueError: for another config, and for rngs without a stream for parameters.

    Source: Papamakarios et al. (2017, arXiv 1705.07057), section 3.

    Example:
      >>> config = rf.AutoregressiveFlowConfig.made((3,), hidden=(16,))
      >>> flow = rf.AutoregressiveFlow(config, rngs=nnx.Rngs(0))
      >>> flow.log_prob(jnp.zeros((4, 3))).shape
      (4,)
    """

    _config_type = AutoregressiveFlowConfig

    @staticmethod
    def _build(config: AutoregressiveFlowConfig, rngs: nnx.Rngs) -> Bijector:
        first, (dim,) = first_layers(config)

        def step(rngs: nnx.Rngs) -> Chain:
            options = {"condition_dim": config.condition_dim, "activation": config.activation}
            layers = [MaskedAutoregressive(dim, config.hidden, **options, rngs=rngs)]
            layers += [ActNorm((dim,))] if config.actnorm else []
            return Chain([*layers, Permutation(range(dim - 1, -1, -1))])

        return Chain([*first, ActNorm((dim,)), ResidualStack(step, config.layers, rngs=rngs)])


@flow_from_config.register
def _(config: AutoregressiveFlowConfig, *, rngs: nnx.Rngs) -> AutoregressiveFlow:
    return AutoregressiveFlow(config, rngs=rngs)
