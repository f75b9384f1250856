"""Ready contractions: networks of Lipschitz layers from plain arguments, for vectors and for grids.

Each is a contraction in x for every condition c, without a bound in c (see `layers.conditioning`):

    block = rf.ResidualBlock(rf.LipschitzMLP(6, (64, 64), condition_dim=3, rngs=rngs))

A width counts the outputs of an activation: `clipswish` doubles channels, so the linear layer before it has half.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from resflow_jax.functional.activations import Activation, get_activation
from resflow_jax.functional.checks import (
    as_sequence,
    as_shape,
    check_choice,
    check_count,
    check_open_interval,
    check_order,
    check_type,
)
from resflow_jax.functional.linear_maps import ConvMap, DenseMap, LinearMap
from resflow_jax.functional.primitives.convolution import PADDINGS
from resflow_jax.layers.contraction import Layered
from resflow_jax.layers.densenet import DenseNetOfMaps

MakeLinear = Callable[[int, int, Any], LinearMap]  # from features in, features out, and kernel size


class LipschitzMLP(Layered):
    """Contraction g on vectors [B, dim]: dense layers of norm at most `coefficient`, with activations between them.

    Lip(g) <= coefficient^(number of layers) for every condition, once the norms have converged (`update_norms`).

    Args:
      dim: D, the size of x and g(x).
      hidden: output widths of the activations; () for a single linear layer.
      condition_dim: number of elements of a condition [condition_dim]; None for none.
      activation: an `Activation`, or its name in `ACTIVATIONS`.
      coefficient: bound on the norm of each layer, in (0, 1).
      preactivation: whether an activation precedes the first layer too.
      norms: orders of the norms from x to g(x), one more than layers; 2 throughout by default. See `Contraction`.
      rngs: draws the parameters.

    Randomness: `rngs` only. Cost: one call is one pass through the layers.

    Raises:
      ValueError: for sizes below one, widths that the activation cannot return, and a wrong number of orders.

    Source: Chen et al. (2019, arXiv 1906.02735), section 3.2 (LipSwish), section 3.3 (mixed norms).

    Example:
      >>> g = rf.LipschitzMLP(4, (4,), rngs=nnx.Rngs(0))
      >>> g(jnp.ones((3, 4))).shape, round(g.lipschitz, 3)
      ((3, 4), 0.96)
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        condition_dim: int | None = None,
        activation: str | Activation = "lipswish",
        coefficient: float = 0.98,
        preactivation: bool = False,
        norms: Sequence[float] | None = None,
        rngs: nnx.Rngs,
    ):
        check_count("dim", dim, 1)
        check_type("preactivation", preactivation, bool)
        self.dim = dim
        self.hidden = as_shape("hidden", hidden)
        kernels = (1,) * (len(self.hidden) + 1)
        maps = chain_of_maps(_dense, dim, self.hidden, kernels, _activation(activation), preactivation)
        _make_layered(self, maps, condition_dim, activation, coefficient, preactivation, norms, rngs)


class LipschitzCNN(Layered):
    """Contraction g on grids [B, *size, C] of one to three axes: convolutions of norm at most `coefficient`, and
    activations.

    Lip(g) <= coefficient^(number of layers) for every condition, once the norms have converged (`update_norms`).

    Args:
      shape: (*size, C) of one x, channels last.
      hidden: output channels of the activations, one fewer than kernels.
      kernels: sizes of the kernels, odd.
      padding: "zero" or "periodic": the values beyond the edges of the grid.
      condition_dim: number of elements of a condition [condition_dim], which gives every channel a gate and a shift;
        None for none.
      activation, coefficient, preactivation, norms, rngs: as in `LipschitzMLP`.

    Randomness: `rngs` only. Cost: one call is one pass through the layers.

    Raises:
      ValueError: for a shape of another rank, sizes below one, even kernels, a wrong number of widths, widths that the
        activation cannot return, and a wrong number of orders.

    Source: Chen et al. (2019, arXiv 1906.02735), appendix E.

    Example:
      >>> g = rf.LipschitzCNN((4, 4, 2), (2,), (3, 3), rngs=nnx.Rngs(0))
      >>> g(jnp.ones((3, 4, 4, 2))).shape, round(g.lipschitz, 3)
      ((3, 4, 4, 2), 0.96)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: Sequence[int] = (64, 64),
        kernels: Sequence[int] = (3, 1, 3),
        *,
        padding: str = "zero",
        condition_dim: int | None = None,
        activation: str | Activation = "lipswish",
        coefficient: float = 0.98,
        preactivation: bool = False,
        norms: Sequence[float] | None = None,
        rngs: nnx.Rngs,
    ):
        self.shape = as_shape("shape", shape)
        check_type("preactivation", preactivation, bool)
        if len(self.shape) < 2:
            raise ValueError(f"shape: expected (*size, C), the channels last, got {self.shape}")
        self.hidden, self.kernels, self.padding = as_shape("hidden", hidden), as_shape("kernels", kernels), padding
        if len(self.kernels) != len(self.hidden) + 1:
            expected = f"{len(self.hidden) + 1} sizes, one more than hidden {self.hidden}"
            raise ValueError(f"kernels: expected {expected}, got {self.kernels}")
        for size in self.kernels:
            if size % 2 == 0:
                raise ValueError(f"kernels: expected odd sizes, got {self.kernels}")
        conv = _convolution(self.shape[:-1], padding)
        maps = chain_of_maps(conv, self.shape[-1], self.hidden, self.kernels, _activation(activation), preactivation)
        _make_layered(self, maps, condition_dim, activation, coefficient, preactivation, norms, rngs)


class DenseNet(DenseNetOfMaps):
    """Contraction g of layers that are concatenated to their input, on vectors or grids; see `layers.densenet`.

    Lip(g) <= coefficient^(depth + 1), with one more factor if `first` is given, for every condition, once the norms
    have converged (`update_norms`).

    Args:
      shape: shape of one x: (D,) or D for vectors, (*size, C) for grids of one to three axes, channels last.
      depth: number of dense layers.
      growth: features, or channels, that each dense layer adds.
      first: width of a layer before the dense ones; None for none.
      kernel: size of the kernels of the dense layers on a grid, odd; the kernels of the other layers have size 1.
      padding: "zero" or "periodic": the values beyond the edges of a grid.
      condition_dim, activation, coefficient, rngs: as in `LipschitzMLP`.

    Randomness: `rngs` only. Cost: one call is one pass through the layers.

    Raises:
      ValueError: for sizes below one, an even kernel, and a growth that the activation cannot return.

    Source: Perugachi-Diaz et al. (2021, arXiv 2102.02694), section 3.

    Example:
      >>> g = rf.DenseNet(2, depth=1, growth=4, rngs=nnx.Rngs(0))
      >>> g(jnp.ones((3, 2))).shape, round(g.lipschitz, 3)
      ((3, 2), 0.96)
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        depth: int = 3,
        growth: int = 16,
        *,
        first: int | None = None,
        kernel: int = 3,
        padding: str = "zero",
        condition_dim: int | None = None,
        activation: str | Activation = "clipswish",
        coefficient: float = 0.98,
        rngs: nnx.Rngs,
    ):
        self.shape = as_shape("shape", shape if isinstance(shape, tuple | list) else (shape,))
        check_count("depth", depth, 1)
        check_count("growth", growth, 1)
        check_count("kernel", kernel, 1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd size, got {kernel}")
        if first is not None:
            check_count("first", first, 1)
        check_type("rngs", rngs, nnx.Rngs)
        linear = _dense if len(self.shape) == 1 else _convolution(self.shape[:-1], padding)
        found = _activation(activation)
        maps = densenet_maps(linear, self.shape[-1], first, depth, growth, kernel, found)
        super().__init__(*maps, found, coefficient, condition_shape=_condition_shape(condition_dim), rngs=rngs)
        self.depth, self.growth, self.first, self.kernel, self.padding = depth, growth, first, kernel, padding
        self.condition_dim = condition_dim


def chain_of_maps(
    linear: MakeLinear,
    features: int,
    hidden: Sequence[int],
    kernels: Sequence[Any],
    activation: Activation,
    preactivation: bool,
) -> list[LinearMap]:
    """The maps of a `Layered` whose activations have the output widths `hidden`."""
    check_widths(activation, hidden)
    if preactivation and features % activation.group:
        raise ValueError(
            f"preactivation: expected none for {activation.name} on {features} channels, which is not a multiple of "
            f"{activation.group}"
        )
    outputs = [*(width // activation.expansion for width in hidden), features]
    inputs = [features * (activation.expansion if preactivation else 1), *hidden]
    return [linear(*sizes) for sizes in zip(inputs, outputs, kernels, strict=True)]


def densenet_maps(
    linear: MakeLinear,
    features: int,
    first: int | None,
    depth: int,
    growth: int,
    kernel: Any,
    activation: Activation,
) -> tuple[LinearMap | None, list[LinearMap], LinearMap]:
    """The maps of a `DenseNetOfMaps`."""
    check_widths(activation, [growth])
    head = linear(features, first, 1) if first else None
    widths = [(first or features) + n * growth for n in range(depth + 1)]
    dense = [linear(width, growth // activation.expansion, kernel) for width in widths[:-1]]
    return head, dense, linear(widths[-1], features, 1)


def check_widths(activation: Activation, widths: Sequence[int]) -> None:
    """Raises ValueError unless the activation can return these numbers of channels."""
    multiple = activation.group * activation.expansion
    for width in widths:
        if width % multiple:
            raise ValueError(f"activation: expected widths that {multiple} divides for {activation.name}, got {width}")


def _make_layered(contraction, maps, condition_dim, activation, coefficient, preactivation, norms, rngs) -> None:
    """`Layered.__init__` with checked arguments, which the contraction stores."""
    check_type("rngs", rngs, nnx.Rngs)
    check_open_interval("coefficient", coefficient, 0, 1)
    if norms is not None:
        norms = tuple(as_sequence("norms", norms, f"{len(maps) + 1} orders"))
        if len(norms) != len(maps) + 1:
            raise ValueError(f"norms: expected {len(maps) + 1} orders, one more than layers, got {norms}")
        for order in norms:
            check_order("norms", order)
        norms = tuple(map(float, norms))
    options = {"preactivation": preactivation, "norms": norms, "condition_shape": _condition_shape(condition_dim)}
    Layered.__init__(contraction, maps, _activation(activation), coefficient, **options, rngs=rngs)
    contraction.coefficient, contraction.condition_dim = coefficient, condition_dim


def _condition_shape(condition_dim: int | None) -> tuple[int, ...] | None:
    if condition_dim is None:
        return None
    check_count("condition_dim", condition_dim, 1)
    return (condition_dim,)


def _activation(activation: str | Activation) -> Activation:
    return activation if isinstance(activation, Activation) else get_activation(activation)


def _dense(features_in: int, features_out: int, _: Any) -> DenseMap:
    return DenseMap(features_in, features_out)


def _convolution(size: tuple[int, ...], padding: str) -> MakeLinear:
    check_choice("padding", padding, PADDINGS)
    # Zero padding is every map's default.
    options = {} if padding == "zero" else {"padding": padding}
    return lambda channels_in, channels_out, kernel: ConvMap(size, channels_in, channels_out, kernel, **options)
