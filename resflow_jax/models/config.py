"""Frozen configurations of the flows. They hold sizes and names only, and check themselves."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

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
Block = Literal["residual", "monotone", "implicit"]


@dataclass(frozen=True)
class ImageFlowConfig:
    """Configuration of a multi-scale residual flow on images [B, H, W, C] with values in [0, 1].

    A logit, then scales of residual blocks with a 2x2 squeeze between them, then residual blocks of dense layers on the
    flattened image. It holds sizes and names only, is frozen and hashable, and has no randomness.

    Attributes:
      shape: (H, W, C) of one image; H and W divisible by 2 for every squeeze.
      blocks: residual blocks of each scale; its length is the number of scales.
      hidden_channels: width of the convolutional blocks, one number or one for each scale.
      kernels: kernel sizes of a block's convolutions, odd; their number is the block's depth.
      activation: name of the activation, one of `ACTIVATIONS`.
      preactivation: which blocks start with an activation: "all_but_first", "all" or "none"; DenseNets never do.
      coefficient: bound on the norm of every linear layer, in (0, 1).
      condition_dim: number of elements of a condition c, for p(x | c); None for p(x).
      matmul_dtype: "bfloat16" rounds the factors of every matrix product and convolution in the blocks to bfloat16, and
        sums in float32; parameters, activations and norms stay as they are. None for no rounding. With rounding g is a
        contraction only up to relative steps of 2^-8 in its values: inverse and log-det lose the same accuracy.
      data: logit, normalisation and padding of the images.
      between: layers between the blocks.
      norms: orders of the norms between the linear layers.
      tail: dense blocks after the last scale.
      densenet: DenseNets instead of chains of layers, with `kernels` and `hidden_channels`.
      scales: squeezes and factoring out.
      block: the kind of block: "residual", y = x + g(x); "monotone", see `MonotoneBlock`; or "implicit", which has two
        contractions, see `ImplicitBlock`. The last two stretch more, and their map is a solve.

    Cost: a `ResidualFlow` of it evaluates sum(blocks) + tail.blocks contractions for each pass.

    Raises:
      ValueError: for values outside their ranges, and settings that exclude each other; the message names the setting.

    Source: Chen et al. (2019, arXiv 1906.02735), appendix E; Ahn et al. (2022, arXiv 2210.08176) and Lu et al. (2021,
    arXiv 2103.09527) for the other blocks.

    Example:
      >>> config = rf.ImageFlowConfig((8, 8, 1), blocks=(2, 2), hidden_channels=16)
      >>> config.kernels, config.tail.blocks
      ((3, 1, 3), 4)
    """

    shape: tuple[int, int, int]
    blocks: tuple[int, ...] = (16, 16, 16)
    hidden_channels: int | tuple[int, ...] = 512
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
    block: Block = "residual"
    block_names: ClassVar[tuple[str, ...]] = get_args(Block)

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
        self._check_widths()
        squeezes = len(self.blocks) - 1 + self.scales.squeeze_first
        if self.shape[0] % 2**squeezes or self.shape[1] % 2**squeezes:
            raise ValueError(
                f"shape: expected height and width divisible by {2**squeezes}, for {len(self.blocks)} scales"
                f"{' with scales.squeeze_first' if self.scales.squeeze_first else ''}, got {self.shape}"
            )
        _check_common(self, len(self.kernels))
        _check_norms(self, "tail.norms", self.tail.norms)
        self.data.check_channels(self.data_channels)

    def _check_widths(self) -> None:
        if not isinstance(self.hidden_channels, tuple | list):
            check_count("hidden_channels", self.hidden_channels, 1)
            return
        make_tuples(self, "hidden_channels")
        if len(self.hidden_channels) != len(self.blocks):
            raise ValueError(
                f"hidden_channels: expected one width, or {len(self.blocks)}, one for each scale, got "
                f"{self.hidden_channels}"
            )
        for width in self.hidden_channels:
            check_count("hidden_channels", width, 1)

    @property
    def data_channels(self) -> int:
        """The number of channels that `data.mean` and `data.std` have."""
        return self.shape[-1]


@dataclass(frozen=True)
class VectorFlowConfig:
    """Configuration of a residual flow on vectors [B, dim].

    It holds sizes and names only, is frozen and hashable, and has no randomness.

    Attributes:
      dim: D, the number of elements of a vector.
      blocks: number of residual blocks.
      hidden: widths of a block's hidden layers.
      activation: name of the activation, one of `ACTIVATIONS`.
      preactivation: which blocks start with an activation: "none", "all" or "all_but_first". With the last, the first
        block has another structure, and compilation takes half as long again.
      coefficient: bound on the norm of every linear layer, in (0, 1).
      condition_dim: number of elements of a condition c, for p(x | c); None for p(x).
      matmul_dtype: as in `ImageFlowConfig`.
      data: normalisation and padding of the vectors.
      between: layers between the blocks.
      norms: orders of the norms between the linear layers.
      densenet: DenseNets instead of chains of layers, with `hidden`.
      block: the kind of block: "residual", y = x + g(x); "monotone", see `MonotoneBlock`; or "implicit", which has two
        contractions, see `ImplicitBlock`. The last two stretch more, and their map is a solve.

    Cost: a `ResidualFlow` of it evaluates `blocks` contractions for each pass.

    Raises:
      ValueError: for values outside their ranges, and settings that exclude each other; the message names the setting.

    Source: Chen et al. (2019, arXiv 1906.02735), section 3 and appendix E.

    Example:
      >>> config = rf.VectorFlowConfig(dim=2, blocks=4, hidden=(16, 16))
      >>> config.coefficient, config.between.actnorm
      (0.98, True)
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
    block: Block = "residual"
    block_names: ClassVar[tuple[str, ...]] = get_args(Block)

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
            raise ValueError(
                "between.feature_actnorm: expected False, since `actnorm` is per feature for vectors, got True"
            )
        self.data.check_channels(self.dim)


FlowConfig = ImageFlowConfig | VectorFlowConfig


def has_mixed_norms(config: FlowConfig) -> bool:
    """Whether the config gives orders of norms, which may differ from 2."""
    return config.norms.orders is not None or (isinstance(config, ImageFlowConfig) and config.tail.norms is not None)


def _check_norms(config: FlowConfig, name: str, norms: tuple[float, ...] | None) -> None:
    """Raises if orders of norms are given together with learned orders or DenseNets."""
    if norms is not None and (config.densenet.depth or config.norms.learned):
        other = "densenet.depth" if config.densenet.depth else "norms.learned"
        raise ValueError(f"{name}: expected None together with {other}, got {norms!r}")


def _check_common(config: FlowConfig, layers: int) -> None:
    """Checks the settings that both kinds of flows have; `layers` is the number of linear layers in a plain block."""
    check_choice("activation", config.activation, tuple(ACTIVATIONS))
    check_choice("block", config.block, config.block_names)
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
            raise ValueError("between.centering: expected None or 'blocks' with densenet.depth, got 'layers'")
        if config.norms.learned:
            raise ValueError("norms.learned: expected False together with densenet.depth, got True")
