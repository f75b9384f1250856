"""From a configuration to residual blocks: which layers g has, and what stands before and behind every block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flax import nnx

from resflow_jax.functional.activations import get_activation
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.contraction import Contraction, Layered
from resflow_jax.layers.densenet import DenseNetOfMaps
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.lipschitz import learned_order
from resflow_jax.layers.networks import MakeLinear, chain_of_maps, check_widths, densenet_maps
from resflow_jax.layers.normalization import MovingBatchNorm, MovingCentering
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig

Config = ImageFlowConfig | VectorFlowConfig
MakeContraction = Callable[[bool, nnx.Rngs], Contraction]  # with pre-activation or without


@dataclass(frozen=True)
class Around:
    """The layers before and behind every residual block of a scale.

    Attributes:
      config: of the flow.
      actnorms: the shape of every ActNorm behind a block.
      channels: of the blocks' last axis.
      invertible_linear: whether an invertible linear layer stands before a block.
    """

    config: Config
    actnorms: Sequence[tuple[int, ...]]
    channels: int
    invertible_linear: bool

    def before(self, rngs: nnx.Rngs) -> list[Bijector]:
        return [InvertibleLinear(self.channels, rngs=rngs)] if self.invertible_linear else []

    def behind(self) -> list[Bijector]:
        layers: list[Bijector] = [ActNorm(shape) for shape in self.actnorms]
        if self.config.batchnorm:
            layers.append(MovingBatchNorm((self.channels,)))
        if self.config.centering == "blocks":
            layers.append(MovingCentering((self.channels,)))
        return layers


def residual_blocks(
    config: Config, contraction: MakeContraction, around: Around, depth: int, *, first: bool, rngs: nnx.Rngs
) -> list[Bijector]:
    """`depth` residual blocks, each with the layers around it, stacked as far as they are alike."""

    def step(preactivation: bool) -> Callable[[nnx.Rngs], Chain]:
        def make(rngs: nnx.Rngs) -> Chain:
            return Chain([*around.before(rngs), ResidualBlock(contraction(preactivation, rngs)), *around.behind()])

        return make

    if config.dense_depth or not first or config.preactivation != "all_but_first":
        return [ResidualStack(step(config.preactivation != "none"), depth, rngs=rngs)]
    head = step(False)(rngs)
    return [head] if depth == 1 else [head, ResidualStack(step(True), depth - 1, rngs=rngs)]


def layered(
    config: Config,
    linear: MakeLinear,
    features: int,
    hidden: Sequence[int],
    kernels: Sequence[int],
    norms: Sequence[float] | None,
    centering: bool,
) -> MakeContraction:
    """Chains of layers; `hidden` are the widths behind the activations, some of which multiply the channels."""
    activation = get_activation(config.activation)
    check_widths(activation, hidden)

    def make(preactivation: bool, rngs: nnx.Rngs) -> Layered:
        if preactivation and features % activation.group:
            raise ValueError(
                f"preactivation: expected 'none' for {activation.name} on {features} channels, which are no multiple "
                f"of {activation.group}, got {config.preactivation!r}"
            )
        maps = chain_of_maps(linear, features, hidden, kernels, activation, preactivation)
        orders = norms
        if config.learn_norms:
            learned = [learned_order() for _ in range(1 if config.order_ties == "all" else len(maps))]
            learned *= len(maps) // len(learned)
            orders = [*learned, learned_order() if config.order_ties == "none" else learned[0]]
        options = {"preactivation": preactivation, "norms": orders, "centering": centering}
        return Layered(maps, activation, config.coefficient, **options, rngs=rngs)

    return make


def densenet(
    config: Config, linear: MakeLinear, features: int, first: int | None, growth: int, kernel: int
) -> MakeContraction:
    """DenseNets of `config.dense_depth` dense layers, behind one of width `first` if that is given."""
    activation = get_activation(config.activation)
    check_widths(activation, [growth])

    def make(preactivation: bool, rngs: nnx.Rngs) -> DenseNetOfMaps:
        maps = densenet_maps(linear, features, first, config.dense_depth, growth, kernel, activation)
        return DenseNetOfMaps(*maps, activation, config.coefficient, rngs=rngs)

    return make
