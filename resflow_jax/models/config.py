"""Frozen configurations of the flows. They hold sizes and names only, and check themselves."""

from collections.abc import Iterable
from dataclasses import dataclass

from resflow_jax.functional.activations import ACTIVATIONS
from resflow_jax.functional.checks import check_choice, check_count, check_open_interval

PREACTIVATIONS = ("all_but_first", "all", "none")


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
      squeeze_first: squeeze before the first scale.
      factor_out: after each squeeze pass half of the channels straight to z.
      fc_blocks: dense residual blocks behind the last scale; 0 for none.
      fc_hidden: width of the dense blocks.
      fc_layers: linear layers in a dense block.
      actnorm: an ActNorm (per channel; per feature behind dense blocks) after every block.
      feature_actnorm: an ActNorm per feature after every block, on top of `actnorm`.
      first_actnorm: with `actnorm` or `feature_actnorm`, one also before the first block.
      activation: name of the activation, one of `functional.activations.ACTIVATIONS`.
      preactivation: which blocks start with an activation: "all_but_first", "all" or "none".
      coefficient: bound on the norm of every linear layer, in (0, 1).
      logit_alpha: alpha of the logit transform; None leaves it out.
    """

    shape: tuple[int, int, int]
    blocks: tuple[int, ...] = (16, 16, 16)
    hidden_channels: int = 512
    kernels: tuple[int, ...] = (3, 1, 3)
    squeeze_first: bool = False
    factor_out: bool = False
    fc_blocks: int = 4
    fc_hidden: int = 128
    fc_layers: int = 3
    actnorm: bool = True
    feature_actnorm: bool = False
    first_actnorm: bool = True
    activation: str = "lipswish"
    preactivation: str = "all_but_first"
    coefficient: float = 0.98
    logit_alpha: float | None = 1e-6

    def __post_init__(self):
        _make_tuples(self, "shape", "blocks", "kernels")
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
        squeezes = len(self.blocks) - 1 + self.squeeze_first
        if self.shape[0] % 2**squeezes or self.shape[1] % 2**squeezes:
            raise ValueError(
                f"shape: expected height and width divisible by {2**squeezes}, for {len(self.blocks)} scales"
                f"{' with squeeze_first' if self.squeeze_first else ''}, got {self.shape}"
            )
        _check_common(self.activation, self.preactivation, self.coefficient)
        if self.logit_alpha is not None:
            check_open_interval("logit_alpha", self.logit_alpha, 0, 0.5)


@dataclass(frozen=True)
class VectorFlowConfig:
    """A residual flow on vectors [B, dim].

    Attributes:
      dim: D, the number of elements of a vector.
      blocks: number of residual blocks.
      hidden: widths of a block's hidden layers.
      actnorm: an ActNorm per feature after every block.
      first_actnorm: with `actnorm`, one also before the first block.
      activation: name of the activation, one of `functional.activations.ACTIVATIONS`.
      preactivation: which blocks start with an activation: "all_but_first", "all" or "none".
      coefficient: bound on the norm of every linear layer, in (0, 1).
    """

    dim: int
    blocks: int = 16
    hidden: tuple[int, ...] = (64, 64)
    actnorm: bool = True
    first_actnorm: bool = True
    activation: str = "lipswish"
    preactivation: str = "all_but_first"
    coefficient: float = 0.98

    def __post_init__(self):
        _make_tuples(self, "hidden")
        check_count("dim", self.dim, 1)
        check_count("blocks", self.blocks, 1)
        for width in self.hidden:
            check_count("hidden", width, 1)
        _check_common(self.activation, self.preactivation, self.coefficient)


def _make_tuples(config: object, *names: str) -> None:
    """A config is hashable also if it was given lists, as from JSON."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Iterable):
            raise ValueError(f"{name}: expected a tuple of integers, got {value!r}")
        object.__setattr__(config, name, tuple(value))


def _check_common(activation: str, preactivation: str, coefficient: float) -> None:
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_choice("preactivation", preactivation, PREACTIVATIONS)
    check_open_interval("coefficient", coefficient, 0, 1)
