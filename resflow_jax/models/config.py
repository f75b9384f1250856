"""Frozen configurations of the flows. They hold sizes and names only, and check themselves."""

from dataclasses import dataclass
from typing import Literal, get_args

from resflow_jax.functional.activations import ACTIVATIONS, ActivationName
from resflow_jax.functional.checks import check_choice, check_count, check_open_interval, check_type
from resflow_jax.functional.orders import parse_norms
from resflow_jax.functional.primitives.convolution import MATMUL_DTYPES
from resflow_jax.models.groups import (
    BetweenBlocks,
    DenseNetBlocks,
    DenseTail,
    ImageTransform,
    Norms,
    Scales,
    VectorTransform,
    make_tuples,
)

Preactivation = Literal["all_but_first", "all", "none"]
PREACTIVATIONS = get_args(Preactivation)


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
      activation: of the layers; see `functional.activations`.
      preactivation: which blocks start with an activation: "all_but_first", "all" or "none"; DenseNets never do.
      coefficient: bound on the norm of every linear layer, in (0, 1).
      condition_dim: numbers of a condition c, for p(x | c); None for p(x).
      matmul_dtype: "bfloat16" rounds the factors of every matrix product and convolution in the blocks to it, and
        adds up in float32; parameters, activations and norms stay as they are. None for no rounding. Rounded, g
        is a contraction but for steps of 2^-8 of its values: inverse and log-det lose as much.
      data: logit, normalisation and padding of the images.
      between: layers between the blocks.
      norms: orders of the norms between the linear layers.
      tail: dense blocks after the last scale.
      densenet: DenseNets in place of chains of layers, with `kernels` and `hidden_channels`.
      scales: squeezes and factoring out.
    """

    shape: tuple[int, int, int]
    blocks: tuple[int, ...] = (16, 16, 16)
    hidden_channels: int = 512
    kernels: tuple[int, ...] = (3, 1, 3)
    activation: ActivationName = "lipswish"
    preactivation: Preactivation = "all_but_first"
    coefficient: float = 0.98
    condition_dim: int | None = None
    matmul_dtype: Literal["bfloat16"] | None = None
    data: ImageTransform = ImageTransform()
    between: BetweenBlocks = BetweenBlocks()
    norms: Norms = Norms()
    tail: DenseTail = DenseTail()
    densenet: DenseNetBlocks = DenseNetBlocks(growth=172)
    scales: Scales = Scales()

    def __post_init__(self):
        make_tuples(self, "shape", "blocks", "kernels")
        check_type("data", self.data, ImageTransform)
        check_type("tail", self.tail, DenseTail)
        check_type("scales", self.scales, Scales)
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
        squeezes = len(self.blocks) - 1 + self.scales.squeeze_first
        if self.shape[0] % 2**squeezes or self.shape[1] % 2**squeezes:
            raise ValueError(
                f"shape: expected height and width divisible by {2**squeezes}, for {len(self.blocks)} scales"
                f"{' with scales.squeeze_first' if self.scales.squeeze_first else ''}, got {self.shape}"
            )
        _check_common(self, len(self.kernels))
        _check_norms(self, "tail.norms", self.tail.norms)
        self.data.check_channels(self.data_channels)

    @property
    def data_channels(self) -> int:
        """How many channels `data.mean` is of."""
        return self.shape[-1]


@dataclass(frozen=True)
class VectorFlowConfig:
    """A residual flow on vectors [B, dim].

    Attributes:
      dim: D, the number of elements of a vector.
      blocks: number of residual blocks.
      hidden: widths of a block's hidden layers.
      activation: of the layers; see `functional.activations`.
      preactivation: which blocks start with an activation: "none", "all" or "all_but_first"; the last makes the first
        block a kind of its own, which takes XLA half as long again to compile.
      coefficient: bound on the norm of every linear layer, in (0, 1).
      condition_dim: numbers of a condition c, for p(x | c); None for p(x).
      matmul_dtype: as in `ImageFlowConfig`.
      data: normalisation and padding of the vectors.
      between: layers between the blocks.
      norms: orders of the norms between the linear layers.
      densenet: DenseNets in place of chains of layers, with `hidden`.
    """

    dim: int
    blocks: int = 16
    hidden: tuple[int, ...] = (64, 64)
    activation: ActivationName = "lipswish"
    preactivation: Preactivation = "none"
    coefficient: float = 0.98
    condition_dim: int | None = None
    matmul_dtype: Literal["bfloat16"] | None = None
    data: VectorTransform = VectorTransform()
    between: BetweenBlocks = BetweenBlocks()
    norms: Norms = Norms()
    densenet: DenseNetBlocks = DenseNetBlocks()

    def __post_init__(self):
        make_tuples(self, "hidden")
        check_type("data", self.data, VectorTransform)
        if isinstance(self.data, ImageTransform):
            raise ValueError("data: expected VectorTransform, got ImageTransform")
        check_count("dim", self.dim, 1)
        check_count("blocks", self.blocks, 1)
        for width in self.hidden:
            check_count("hidden", width, 1)
        _check_common(self, len(self.hidden) + 1)
        if self.between.feature_actnorm:
            raise ValueError("between.feature_actnorm: expected False, for `actnorm` is one per feature, got True")
        self.data.check_channels(self.dim)


FlowConfig = ImageFlowConfig | VectorFlowConfig


def has_mixed_norms(config: FlowConfig) -> bool:
    """Whether norms of any block were given, of orders that may be other than 2."""
    return config.norms.orders is not None or (isinstance(config, ImageFlowConfig) and config.tail.norms is not None)


def _check_norms(config: FlowConfig, name: str, norms: tuple[float, ...] | None) -> None:
    """Raises for norms that were given beside others, or to blocks that have none."""
    if norms is not None and (config.densenet.depth or config.norms.learned):
        other = "densenet.depth" if config.densenet.depth else "norms.learned"
        raise ValueError(f"{name}: expected None beside {other}, got {norms!r}")


def _check_common(config: FlowConfig, layers: int) -> None:
    """The settings that both kinds of flows have; `layers` of a plain block."""
    check_choice("activation", config.activation, tuple(ACTIVATIONS))
    check_choice("preactivation", config.preactivation, PREACTIVATIONS)
    check_open_interval("coefficient", config.coefficient, 0, 1)
    if config.condition_dim is not None:
        check_count("condition_dim", config.condition_dim, 1)
    check_choice("matmul_dtype", config.matmul_dtype, MATMUL_DTYPES)
    for name, kind in (("between", BetweenBlocks), ("norms", Norms), ("densenet", DenseNetBlocks)):
        check_type(name, getattr(config, name), kind)
    if config.norms.orders is not None:
        parse_norms(config.norms.orders, layers, "norms.orders")
    _check_norms(config, "norms.orders", config.norms.orders)
    if config.densenet.depth:
        if config.between.centering == "layers":
            raise ValueError("between.centering: expected None or 'blocks' beside densenet.depth, got 'layers'")
        if config.norms.learned:
            raise ValueError("norms.learned: expected False beside densenet.depth, got True")
