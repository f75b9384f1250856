"""Makes the residual blocks of a configuration: the layers of g, and the layers before and after every block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flax import nnx

from resflow_jax.functional.activations import get_activation
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.contraction import Contraction, Layered
from resflow_jax.layers.densenet import DenseNetOfMaps
from resflow_jax.layers.implicit import ImplicitBlock
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.lipschitz import learned_order
from resflow_jax.layers.monotone import MonotoneBlock
from resflow_jax.layers.networks import MakeLinear, chain_of_maps, check_widths, densenet_maps
from resflow_jax.layers.normalization import MovingBatchNorm, MovingCentering
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.models.config import FlowConfig

MakeContraction = Callable[[bool, nnx.Rngs], Contraction]  # with pre-activation or without


@dataclass(frozen=True)
class Around:
    """The layers before and after every residual block of a scale.

    Attributes:
      config: config of the flow.
      actnorms: the shape of every ActNorm after a block.
      channels: number of channels, the size of the last axis.
      invertible_linear: whether an invertible linear layer precedes a block.
    """

    config: FlowConfig
    actnorms: Sequence[tuple[int, ...]]
    channels: int
    invertible_linear: bool

    def before(self, rngs: nnx.Rngs) -> list[Bijector]:
        return [InvertibleLinear(self.channels, rngs=rngs)] if self.invertible_linear else []

    def after(self) -> list[Bijector]:
        layers: list[Bijector] = [ActNorm(shape) for shape in self.actnorms]
        if self.config.between.batchnorm:
            layers.append(MovingBatchNorm((self.channels,)))
        if self.config.between.centering == "blocks":
            layers.append(MovingCentering((self.channels,)))
        return layers


def residual_blocks(
    config: FlowConfig, contraction: MakeContraction, around: Around, depth: int, *, first: bool, rngs: nnx.Rngs
) -> list[Bijector]:
    """`depth` residual blocks, each with the layers around it; blocks of one structure are stacked."""

    def step(preactivation: bool) -> Callable[[nnx.Rngs], Chain]:
        def make(rngs: nnx.Rngs) -> Chain:
            block = _block(config.block, partial(contraction, preactivation, rngs))
            return Chain([*around.before(rngs), block, *around.after()])

        return make

    if config.densenet.depth or not first or config.preactivation != "all_but_first":
        return [ResidualStack(step(config.preactivation != "none"), depth, rngs=rngs)]
    head = step(False)(rngs)
    return [head] if depth == 1 else [head, ResidualStack(step(True), depth - 1, rngs=rngs)]


def _block(name: str, contraction: Callable[[], Contraction]) -> Bijector:
    """A block of the kind `name`, by default a residual one."""
    if name == "monotone":
        return MonotoneBlock(contraction())
    if name == "implicit":
        return ImplicitBlock(contraction(), contraction())
    return ResidualBlock(contraction())


def layered(
    config: FlowConfig,
    linear: MakeLinear,
    features: int,
    hidden: Sequence[int],
    kernels: Sequence[int],
    norms: Sequence[float] | None,
    centering: bool,
) -> MakeContraction:
    """Chains of layers; `hidden` are the output widths of the activations, some of which multiply the channels."""
    activation = get_activation(config.activation)
    check_widths(activation, hidden)
    condition_shape = condition_shape_of(config)

    def make(preactivation: bool, rngs: nnx.Rngs) -> Layered:
        if preactivation and features % activation.group:
            raise ValueError(
                f"preactivation: expected 'none' for {activation.name} on {features} channels, which is not a multiple "
                f"of {activation.group}, got {config.preactivation!r}"
            )
        maps = chain_of_maps(linear, features, hidden, kernels, activation, preactivation)
        orders = learned_orders(config.norms.ties, len(maps)) if config.norms.learned else norms
        options = {"preactivation": preactivation, "norms": orders, "centering": centering}
        return Layered(maps, activation, config.coefficient, **options, condition_shape=condition_shape, rngs=rngs)

    return make


def learned_orders(ties: str, layers: int) -> list[nnx.Param]:
    """Learnable orders of the norms before, between and after the layers; `Norms.ties` says which are shared."""
    return {"all": _one_order, "closed": _closed_orders, "none": _free_orders}[ties](layers)


def _one_order(layers: int) -> list[nnx.Param]:
    return [learned_order()] * (layers + 1)


def _closed_orders(layers: int) -> list[nnx.Param]:
    """The last order is the first, so that g maps a normed space into itself."""
    orders = [learned_order() for _ in range(layers)]
    return [*orders, orders[0]]


def _free_orders(layers: int) -> list[nnx.Param]:
    return [learned_order() for _ in range(layers + 1)]


def densenet(
    config: FlowConfig, linear: MakeLinear, features: int, first: int | None, growth: int, kernel: int
) -> MakeContraction:
    """DenseNets of `config.densenet.depth` dense layers, after a layer of width `first` if that is given."""
    activation = get_activation(config.activation)
    check_widths(activation, [growth])

    def make(preactivation: bool, rngs: nnx.Rngs) -> DenseNetOfMaps:
        maps = densenet_maps(linear, features, first, config.densenet.depth, growth, kernel, activation)
        condition_shape = condition_shape_of(config)
        return DenseNetOfMaps(*maps, activation, config.coefficient, condition_shape=condition_shape, rngs=rngs)

    return make


def condition_shape_of(config: FlowConfig) -> tuple[int] | None:
    """The shape of one condition."""
    return None if config.condition_dim is None else (config.condition_dim,)
