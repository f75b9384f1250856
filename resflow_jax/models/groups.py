"""Groups of settings that the configs of flows share. Each is a small frozen dataclass that checks itself.

A group is never None: without its feature it has zero blocks, depth or channels. Errors name a setting by its path in
the config of a flow, such as "tail.blocks".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from resflow_jax.functional.checks import (
    check_choice,
    check_count,
    check_finite,
    check_flags,
    check_open_interval,
    check_positive,
    check_type,
)
from resflow_jax.functional.orders import parse_norms
from resflow_jax.functional.splines import MOST_BINS
from resflow_jax.layers.padding import NOISES, Noise

CENTERINGS = (None, "blocks", "layers")
OrderTies = Literal["closed", "all", "none"]
ORDER_TIES = get_args(OrderTies)


@dataclass(frozen=True)
class Padding:
    """Channels of noise e = shift + scale * n appended to the data (elements, for vectors); see `ChannelPadding`.

    With padding the flow is not a bijection, and log p(x) in nats is a lower bound in expectation.

    Attributes:
      channels: number of channels; 0 for none.
      noise: distribution of n: "uniform" on [0, 1] or "gaussian".
      scale: positive factor on n.
      shift: added to scale * n.

    Raises:
      ValueError: for values outside their ranges.

    Source: Huang et al. (2020, arXiv 2002.07101).

    Example:
      >>> rf.Padding(channels=2).noise
      'uniform'
    """

    channels: int = 0
    noise: Noise = "uniform"
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        check_count("padding.channels", self.channels, 0)
        check_choice("padding.noise", self.noise, NOISES)
        check_positive("padding.scale", self.scale)
        check_finite("padding.scale", self.scale)
        check_finite("padding.shift", self.shift)


@dataclass(frozen=True)
class Dequantization:
    """The noise that images with integer pixels get: uniform, or by a small flow that is trained with the model.

    See `VariationalDequantization`. The model's bits/dim stay an upper bound; with the flow it is tighter.

    Attributes:
      couplings: number of its coupling layers; 0 for uniform noise.
      width: number of channels of its networks.

    Raises:
      ValueError: for fewer than no couplings, and for a width below one.

    Source: Ho et al. (2019, arXiv 1902.00275), section 3.1.

    Example:
      >>> data = rf.ImageTransform(dequantization=rf.Dequantization(couplings=2, width=8))
      >>> config = rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, tail=rf.DenseTail(0), data=data)
      >>> type(rf.ResidualFlow(config, rngs=nnx.Rngs(0)).dequantizer).__name__
      'VariationalDequantization'
    """

    couplings: int = 0
    width: int = 32

    def __post_init__(self):
        check_count("dequantization.couplings", self.couplings, 0)
        check_count("dequantization.width", self.width, 1)


@dataclass(frozen=True)
class VectorTransform:
    """The fixed transform of vectors before a flow's first block: x -> (x - mean) / std, then padding.

    Attributes:
      mean: mean of every element, in the unit of x, to be subtracted; None for none.
      std: with `mean`, standard deviation of every element, by which it is divided.
      padding: elements of noise appended to the result.

    Raises:
      ValueError: for only one of mean and std, numbers that are not finite, and a std that is not positive.

    Example:
      >>> transform = rf.VectorTransform(mean=(0.0, 5.0), std=(1.0, 2.0))
      >>> rf.VectorFlowConfig(dim=2, data=transform).data.std
      (1.0, 2.0)
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    padding: Padding = Padding()

    def __post_init__(self):
        check_type("data.padding", self.padding, Padding)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if (values is None) != (self.mean is None):
                raise ValueError(f"data.{name}: expected both or none of data.mean and data.std, got {values}")
            if values is not None:
                make_tuples(self, name, prefix="data.")
        for value in self.mean or ():
            check_finite("data.mean", value)
        for value in self.std or ():
            check_positive("data.std", value)
            check_finite("data.std", value)

    def check_channels(self, channels: int) -> None:
        """Raises ValueError unless mean and std have one number for each of `channels` channels."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != channels:
                raise ValueError(f"data.{name}: expected {channels} numbers, one a channel, got {values}")


@dataclass(frozen=True)
class ImageTransform(VectorTransform):
    """The transform of images before a flow's first block: a logit, or (x - mean) / std; then padding.

    Attributes:
      mean: without the logit, mean of every channel, which is subtracted; None for none.
      std: with `mean`, standard deviation of every channel, by which it is divided.
      padding: channels of noise appended after that.
      logit_alpha: alpha of the logit (see `Logit`), in (0, 1/2); None for no logit.
      dequantization: the noise of integer pixels, uniform by default.
      spline_bins: number of bins of a learned spline for each channel after the logit, see `Spline`; 0 for
        none. It pays where many pixels have the same value, such as a black background.

    Raises:
      ValueError: as `VectorTransform`, for alpha outside its range, for a mean together with the logit, and for a
        spline without it or with less than 2 or more than 500 pieces.

    Source: Dinh et al. (2017, arXiv 1605.08803), section 4.1, for the logit.

    Example:
      >>> rf.ImageTransform().logit_alpha, rf.ImageTransform(logit_alpha=None, mean=(0.5,), std=(0.2,)).mean
      (1e-06, (0.5,))
    """

    logit_alpha: float | None = 1e-6
    dequantization: Dequantization = Dequantization()
    spline_bins: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_count("data.spline_bins", self.spline_bins, 0)
        if self.spline_bins == 1 or self.spline_bins > MOST_BINS:
            raise ValueError(f"data.spline_bins: expected 0, or 2 to {MOST_BINS}, got {self.spline_bins}")
        if self.spline_bins and self.logit_alpha is None:
            raise ValueError(f"data.spline_bins: expected 0 without data.logit_alpha, got {self.spline_bins}")
        check_type("data.dequantization", self.dequantization, Dequantization)
        if self.logit_alpha is not None:
            check_open_interval("data.logit_alpha", self.logit_alpha, 0, 0.5)
            if self.mean is not None:
                raise ValueError(f"data.mean: expected None together with data.logit_alpha, got {self.mean}")


@dataclass(frozen=True)
class BetweenBlocks:
    """The layers between residual blocks.

    Attributes:
      actnorm: an ActNorm after every block: per channel of images, per feature after dense blocks and for vectors.
      feature_actnorm: for images, an ActNorm per feature after every block, in addition to `actnorm`.
      first_actnorm: with `actnorm` or `feature_actnorm`, one also before the first block.
      batchnorm: a `MovingBatchNorm` per channel (per feature after dense blocks) after every block.
      centering: a `MovingCentering` per channel: "blocks" for one after every block (per feature after dense blocks),
        "layers" for one inside the blocks after every linear layer, and before the first activation; dense blocks of
        images have none inside. None for none.
      invertible_linear: an invertible linear layer over the channels before every block; the tail of images has none.

    Raises:
      ValueError: for flags that are not bools, and an unknown centering.

    Example:
      >>> between = rf.BetweenBlocks(invertible_linear=True)
      >>> rf.VectorFlowConfig(dim=2, between=between).between.actnorm
      True
    """

    actnorm: bool = True
    feature_actnorm: bool = False
    first_actnorm: bool = True
    batchnorm: bool = False
    centering: Literal["blocks", "layers"] | None = None
    invertible_linear: bool = False

    def __post_init__(self):
        check_flags(self, "between.")
        check_choice("between.centering", self.centering, CENTERINGS)


@dataclass(frozen=True)
class Norms:
    """Orders of the norms between the linear layers of a block.

    Attributes:
      orders: one more than layers: a string like "f12f" (f for infinity) or a tuple of numbers; None for 2 throughout.
        For images they are those of the convolutional blocks, see `DenseTail.norms`. If the last order is above the
        first, as in "222f", the coefficients guarantee no contraction in any norm, and `Roulette` has no bound to adapt
        to. Only `tighten` and the certificate then ensure that the block is invertible.
      learned: learn these orders, from 2; those of dense blocks too.
      ties: which learned orders of a block are equal: "closed" for the last and the first, "all", or "none". With
        "none" g need not be a contraction in any one norm, for example with increasing orders.

    Raises:
      ValueError: for orders below 1, orders together with `learned`, and unknown ties.

    Source: Chen et al. (2019, arXiv 1906.02735), section 3.3.

    Example:
      >>> rf.Norms("f12f").orders
      (inf, 1.0, 2.0, inf)
    """

    orders: str | tuple[float, ...] | None = None
    learned: bool = False
    ties: OrderTies = "closed"

    def __post_init__(self):
        check_flags(self, "norms.")
        check_choice("norms.ties", self.ties, ORDER_TIES)
        if self.orders is not None:
            if self.learned:
                raise ValueError(f"norms.orders: expected None together with norms.learned, got {self.orders!r}")
            object.__setattr__(self, "orders", parse_norms(self.orders, None, "norms.orders"))


@dataclass(frozen=True)
class DenseTail:
    """Residual blocks of dense layers on the flattened image, after the last scale.

    Attributes:
      blocks: number of blocks; 0 for none.
      hidden: width of the blocks.
      layers: linear layers in a block.
      norms: orders of the norms in a block, as in `Norms.orders`.
      densenet_first: with DenseNets, width of the layer before the dense layers.
      densenet_growth: with DenseNets, features that each dense layer adds.

    Raises:
      ValueError: for numbers outside their ranges, and a wrong number of orders.

    Source: Chen et al. (2019, arXiv 1906.02735), appendix E.

    Example:
      >>> rf.DenseTail(blocks=2).hidden
      128
    """

    blocks: int = 4
    hidden: int = 128
    layers: int = 3
    norms: str | tuple[float, ...] | None = None
    densenet_first: int = 64
    densenet_growth: int = 32

    def __post_init__(self):
        check_count("tail.blocks", self.blocks, 0)
        for name in ("hidden", "layers", "densenet_first", "densenet_growth"):
            check_count(f"tail.{name}", getattr(self, name), 1)
        if self.norms is not None:
            object.__setattr__(self, "norms", parse_norms(self.norms, self.layers, "tail.norms"))


@dataclass(frozen=True)
class DenseNetBlocks:
    """Invertible DenseNets as residual blocks.

    A block is dense layers, each concatenated to its input, and a linear layer back to the shape of x. On images the
    dense layers are 3x3 convolutions and the last one is 1x1.

    Attributes:
      depth: dense layers in a block, instead of the chain of layers; 0 for that chain.
      growth: channels (features, of vectors) that each dense layer adds.

    Raises:
      ValueError: for numbers outside their ranges.

    Source: Perugachi-Diaz et al. (2021, arXiv 2102.02694).

    Example:
      >>> rf.VectorFlowConfig(dim=2, densenet=rf.DenseNetBlocks(depth=3, growth=16)).densenet.depth
      3
    """

    depth: int = 0
    growth: int = 64

    def __post_init__(self):
        check_count("densenet.depth", self.depth, 0)
        check_count("densenet.growth", self.growth, 1)


@dataclass(frozen=True)
class Scales:
    """How a flow of images passes from scale to scale.

    Attributes:
      squeeze_first: whether a 2x2 squeeze precedes the first scale.
      factor_out: whether half of the channels passes straight to z after each squeeze (see `MultiScale`).

    Raises:
      ValueError: for values that are not bools.

    Source: Dinh et al. (2017, arXiv 1605.08803), section 3.6, for factoring out.

    Example:
      >>> rf.Scales(factor_out=True).squeeze_first
      False
    """

    squeeze_first: bool = False
    factor_out: bool = False

    def __post_init__(self):
        check_flags(self, "scales.")


def make_tuples(config: object, *names: str, prefix: str = "") -> None:
    """Turns iterables into tuples, in place, so that a config made from lists, for example from JSON, is hashable."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Iterable):
            raise ValueError(f"{prefix}{name}: expected a tuple of numbers, got {value!r}")
        object.__setattr__(config, name, tuple(value))
