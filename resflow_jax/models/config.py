"""Frozen configurations of the flows. They hold sizes and names only, and check themselves."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from resflow_jax.functional.activations import ACTIVATIONS
from resflow_jax.functional.checks import (
    check_choice,
    check_count,
    check_finite,
    check_open_interval,
    check_positive,
    check_type,
)
from resflow_jax.functional.convolution import MATMUL_DTYPES
from resflow_jax.functional.orders import parse_norms
from resflow_jax.layers.padding import NOISES

PREACTIVATIONS = ("all_but_first", "all", "none")
CENTERINGS = (None, "blocks", "layers")
ORDER_TIES = ("closed", "all", "none")


@dataclass(frozen=True)
class ImageFlowConfig:
    """A multi-scale residual flow on images [B, H, W, C] with values in [0, 1].

    Chen et al. (2019, arXiv 1906.02735), appendix E: logit, then scales of residual blocks with a
    2x2 squeeze between them, then residual blocks of dense layers on the flattened image.

    Attributes:
      shape: (H, W, C) of one image.
      blocks: residual blocks of each scale; its length is the number of scales.
      hidden_channels: width of the convolutional blocks.
      kernels: kernel sizes of a block's convolutions, odd; their number is the block's depth.
      dense_depth: dense layers in a block of an invertible DenseNet (Perugachi-Diaz et al. 2021, arXiv
        2102.02694): 3x3 convolutions, each concatenated to its input, and a 1x1 convolution, in place of
        `kernels` and `hidden_channels`; 0 for the chain of convolutions of a residual flow.
      dense_growth: channels that each dense layer adds.
      fully_connected: blocks of dense layers on the flattened image in every scale, as many as `kernels`, of width
        `hidden_channels`; an ActNorm is then per feature, an invertible linear layer mixes all features.
      squeeze_first: squeeze before the first scale.
      factor_out: after each squeeze pass half of the channels straight to z.
      fc_blocks: dense residual blocks behind the last scale; 0 for none.
      fc_hidden: width of the dense blocks.
      fc_layers: linear layers in a dense block.
      fc_norms: orders of the norms in a dense block, as `norms`.
      fc_dense_first: with `dense_depth`, width of the layer before the dense layers of a dense block.
      fc_dense_growth: with `dense_depth`, features that each dense layer of a dense block adds.
      actnorm: an ActNorm (per channel; per feature behind dense blocks) after every block.
      feature_actnorm: an ActNorm per feature after every block, on top of `actnorm`.
      first_actnorm: with `actnorm` or `feature_actnorm`, one also before the first block.
      batchnorm: a `MovingBatchNorm` per channel (per feature behind dense blocks) after every block.
      centering: a `MovingCentering` per channel: "blocks" for one after every block (per feature behind dense blocks),
        "layers" for one inside the convolutional blocks behind every linear layer, and before the first activation.
      invertible_linear: an invertible 1x1 convolution before every block of `blocks`.
      activation: name of the activation, one of `functional.activations.ACTIVATIONS`.
      preactivation: which blocks start with an activation: "all_but_first", "all" or "none"; DenseNets never do.
      coefficient: bound on the norm of every linear layer, in (0, 1).
      norms: orders of the norms between the linear layers of a convolutional block, one more than layers:
        a string like "f12f" (f for infinity) or a tuple of numbers; None for 2 throughout. Where the last
        order is above the first, as in "222f", the coefficients promise no contraction in any norm, the
        roulette knows no bound to adapt to, and only `tighten` and the certificate make the block sure.
      learn_norms: learn these orders, from 2; those of dense blocks too.
      order_ties: which learned orders of a block are one: "closed" for the last and the first, "all", or "none", with
        which g, as with norms that rise, need not be a contraction in any one norm.
      logit_alpha: alpha of the logit transform, at least the smallest normal number of the dtype; None leaves it out.
      data_mean: without the logit, mean of every channel, to be subtracted; with `squeeze_first` it may have one of
        every channel behind the squeeze, and is subtracted there.
      data_deviation: with `data_mean`, deviation of every channel, to be divided by.
      padding: channels of noise e appended to the image, after logit or normalisation.
      padding_noise: "uniform" on [0, 1] or "gaussian".
      padding_scale, padding_shift: the noise is e = shift + scale * that.
      padding_first: append the noise before the logit, through which it passes too. Noise beyond [0, 1] gives NaN, as
        of the authors' Gaussian, of mean 1/2 and deviation 1/8, six values in 100000 do.
      classes: of a classifier on the flow's features (see `models.classifier`); 0 for none.
      classifier_channels: of the convolutions of the classifier.
      matmul_dtype: "bfloat16" rounds the factors of every matrix product and convolution in the blocks to it, and
        adds up in float32; parameters, activations and norms stay as they are. None for no rounding. Rounded, g
        is a contraction but for steps of 2^-8 of its values: inverse and log-det lose as much.
    """

    shape: tuple[int, int, int]
    blocks: tuple[int, ...] = (16, 16, 16)
    hidden_channels: int = 512
    kernels: tuple[int, ...] = (3, 1, 3)
    dense_depth: int = 0
    dense_growth: int = 172
    fully_connected: bool = False
    squeeze_first: bool = False
    factor_out: bool = False
    fc_blocks: int = 4
    fc_hidden: int = 128
    fc_layers: int = 3
    fc_norms: str | tuple[float, ...] | None = None
    fc_dense_first: int = 64
    fc_dense_growth: int = 32
    actnorm: bool = True
    feature_actnorm: bool = False
    first_actnorm: bool = True
    batchnorm: bool = False
    centering: str | None = None
    invertible_linear: bool = False
    activation: str = "lipswish"
    preactivation: str = "all_but_first"
    coefficient: float = 0.98
    norms: str | tuple[float, ...] | None = None
    learn_norms: bool = False
    order_ties: str = "closed"
    logit_alpha: float | None = 1e-6
    data_mean: tuple[float, ...] | None = None
    data_deviation: tuple[float, ...] | None = None
    padding: int = 0
    padding_noise: str = "uniform"
    padding_scale: float = 1.0
    padding_shift: float = 0.0
    padding_first: bool = False
    classes: int = 0
    classifier_channels: int = 256
    matmul_dtype: str | None = None

    def __post_init__(self):
        _make_tuples(self, "shape", "blocks", "kernels")
        _check_flags(self)
        if len(self.shape) != 3:
            raise ValueError(f"shape: expected (H, W, C), got {self.shape}")
        for side in self.shape:
            check_count("shape", side, 1)
        if not self.blocks:
            raise ValueError("blocks: expected at least one scale, got ()")
        for number in self.blocks:
            check_count("blocks", number, 1)
        if not self.kernels:
            raise ValueError("kernels: expected at least one kernel size, got ()")
        for size in self.kernels:
            check_count("kernels", size, 1)
            if size % 2 == 0:
                raise ValueError(f"kernels: expected odd sizes, got {self.kernels}")
        check_count("hidden_channels", self.hidden_channels, 1)
        check_count("fc_blocks", self.fc_blocks, 0)
        check_count("fc_hidden", self.fc_hidden, 1)
        check_count("fc_layers", self.fc_layers, 1)
        check_count("fc_dense_first", self.fc_dense_first, 1)
        check_count("fc_dense_growth", self.fc_dense_growth, 1)
        check_count("classes", self.classes, 0)
        check_count("classifier_channels", self.classifier_channels, 1)
        if self.fully_connected and self.dense_depth:
            raise ValueError(f"fully_connected: expected False beside dense_depth {self.dense_depth}, got True")
        squeezes = len(self.blocks) - 1 + self.squeeze_first
        if self.shape[0] % 2**squeezes or self.shape[1] % 2**squeezes:
            raise ValueError(
                f"shape: expected height and width divisible by {2**squeezes}, for {len(self.blocks)} scales"
                f"{' with squeeze_first' if self.squeeze_first else ''}, got {self.shape}"
            )
        _check_common(self, len(self.kernels), self.shape[-1] * (4 if self.squeezed_data else 1))
        _check_norms(self, "fc_norms", self.fc_layers)
        if self.logit_alpha is not None:
            check_open_interval("logit_alpha", self.logit_alpha, 0, 0.5)
            if self.data_mean is not None:
                raise ValueError(f"data_mean: expected None beside logit_alpha, got {self.data_mean}")

    @property
    def squeezed_data(self) -> bool:
        """Whether `data_mean` is that of the channels behind the first squeeze."""
        return self.squeeze_first and self.data_mean is not None and len(self.data_mean) != self.shape[-1]


@dataclass(frozen=True)
class VectorFlowConfig:
    """A residual flow on vectors [B, dim].

    Attributes:
      dim: D, the number of elements of a vector.
      blocks: number of residual blocks.
      hidden: widths of a block's hidden layers.
      dense_depth: dense layers in a block of an invertible DenseNet, in place of `hidden`; 0 for a chain.
      dense_growth: features that each dense layer adds.
      actnorm: an ActNorm per feature after every block.
      first_actnorm: with `actnorm`, one also before the first block.
      batchnorm: a `MovingBatchNorm` per feature after every block.
      centering: a `MovingCentering` per feature: "blocks" for one after every block, "layers" for one inside the blocks
        behind every linear layer, and before the first activation.
      invertible_linear: an invertible linear layer before every block.
      activation: name of the activation, one of `functional.activations.ACTIVATIONS`.
      preactivation: which blocks start with an activation: "none", "all" or "all_but_first"; the last makes the first
        block a kind of its own, which takes XLA half as long again to compile.
      coefficient: bound on the norm of every linear layer, in (0, 1).
      norms, learn_norms, order_ties: as in `ImageFlowConfig`.
      data_mean: mean of every element, to be subtracted.
      data_deviation: with `data_mean`, deviation of every element, to be divided by.
      padding: elements of noise e appended to the vector.
      padding_noise: "uniform" on [0, 1] or "gaussian".
      padding_scale, padding_shift: the noise is e = shift + scale * that.
      matmul_dtype: as in `ImageFlowConfig`.
    """

    dim: int
    blocks: int = 16
    hidden: tuple[int, ...] = (64, 64)
    dense_depth: int = 0
    dense_growth: int = 64
    actnorm: bool = True
    first_actnorm: bool = True
    batchnorm: bool = False
    centering: str | None = None
    invertible_linear: bool = False
    activation: str = "lipswish"
    preactivation: str = "none"
    coefficient: float = 0.98
    norms: str | tuple[float, ...] | None = None
    learn_norms: bool = False
    order_ties: str = "closed"
    data_mean: tuple[float, ...] | None = None
    data_deviation: tuple[float, ...] | None = None
    padding: int = 0
    padding_noise: str = "uniform"
    padding_scale: float = 1.0
    padding_shift: float = 0.0
    matmul_dtype: str | None = None

    def __post_init__(self):
        _make_tuples(self, "hidden")
        _check_flags(self)
        check_count("dim", self.dim, 1)
        check_count("blocks", self.blocks, 1)
        for width in self.hidden:
            check_count("hidden", width, 1)
        _check_common(self, len(self.hidden) + 1, self.dim)


def has_mixed_norms(config: ImageFlowConfig | VectorFlowConfig) -> bool:
    """Whether norms of any block were given, of orders that may be other than 2."""
    return config.norms is not None or getattr(config, "fc_norms", None) is not None


def _make_tuples(config: object, *names: str) -> None:
    """A config is hashable also if it was given lists, as from JSON."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Iterable):
            raise ValueError(f"{name}: expected a tuple of numbers, got {value!r}")
        object.__setattr__(config, name, tuple(value))


def _check_flags(config: "ImageFlowConfig | VectorFlowConfig") -> None:
    """What is on or off."""
    for field in fields(config):
        if isinstance(field.default, bool):
            check_type(field.name, getattr(config, field.name), bool)


def _check_norms(config: "ImageFlowConfig | VectorFlowConfig", name: str, layers: int) -> None:
    """The orders of the norms in a block of so many layers, which are stored as numbers."""
    norms = getattr(config, name)
    if norms is not None:
        orders = parse_norms(norms, layers, name)
        if config.dense_depth or config.learn_norms:
            other = "dense_depth" if config.dense_depth else "learn_norms"
            raise ValueError(f"{name}: expected None beside {other}, got {norms!r}")
        object.__setattr__(config, name, orders)


def _check_common(config: "ImageFlowConfig | VectorFlowConfig", layers: int, channels: int) -> None:
    """The settings that both kinds of flows have; `layers` of a plain block, `channels` of the data."""
    check_choice("activation", config.activation, tuple(ACTIVATIONS))
    check_choice("preactivation", config.preactivation, PREACTIVATIONS)
    check_open_interval("coefficient", config.coefficient, 0, 1)
    check_count("dense_depth", config.dense_depth, 0)
    check_count("dense_growth", config.dense_growth, 1)
    check_count("padding", config.padding, 0)
    check_choice("padding_noise", config.padding_noise, NOISES)
    check_positive("padding_scale", config.padding_scale)
    check_finite("padding_scale", config.padding_scale)
    check_finite("padding_shift", config.padding_shift)
    check_choice("centering", config.centering, CENTERINGS)
    if config.centering == "layers" and config.dense_depth:
        raise ValueError("centering: expected None or 'blocks' beside dense_depth, got 'layers'")
    check_choice("order_ties", config.order_ties, ORDER_TIES)
    check_choice("matmul_dtype", config.matmul_dtype, MATMUL_DTYPES)
    _check_norms(config, "norms", layers)
    if config.learn_norms and config.dense_depth:
        raise ValueError("learn_norms: expected False beside dense_depth, got True")
    for name in ("data_mean", "data_deviation"):
        values = getattr(config, name)
        if (values is None) != (config.data_mean is None):
            raise ValueError(f"{name}: expected both or none of data_mean and data_deviation, got {values}")
        if values is not None:
            _make_tuples(config, name)
            if len(values) != channels:
                raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {values}")
    for value in config.data_mean or ():
        check_finite("data_mean", value)
    for value in config.data_deviation or ():
        check_positive("data_deviation", value)
        check_finite("data_deviation", value)
