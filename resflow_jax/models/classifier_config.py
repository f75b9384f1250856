"""The configuration of a residual network that classifies images."""

from dataclasses import dataclass
from typing import Literal, get_args

from resflow_jax.functional.activations import ActivationName, check_single_channels, get_plain_activation
from resflow_jax.functional.checks import check_choice, check_count, check_open_interval, check_type
from resflow_jax.models.groups import make_tuples

Architecture = Literal["invertible", "standard"]
HeadName = Literal["pooled", "mixture"]
ARCHITECTURES, HEADS = get_args(Architecture), get_args(HeadName)
_LAYERS = 3  # convolutions in a block


@dataclass(frozen=True)
class ClassifierConfig:
    """Configuration of a residual network on images [B, H, W, C] with values in [0, 1], and of its classes.

    The defaults are the i-ResNet of Behrmann et al. (2019) for CIFAR-10. It holds sizes and names only, is frozen and
    hashable, and has no randomness.

    Attributes:
      shape: (H, W, C) of one image; H and W divisible by 2 for every change of the resolution.
      classes: K, the number of classes.
      blocks: residual blocks of each stage.
      hidden_channels: width of the blocks of each stage.
      padding: number of channels of zeros that are appended before the first stage. If positive, x has no density.
      squeeze_first: whether the resolution is halved before the first stage.
      activation: an activation without parameters that keeps the number of channels; for the pooled head also one that
        does not mix them (fullsort does).
      coefficient: bound on the norm of every convolution, in (0, 1); None for no bound ("vanilla"): the network then
        has no inverse that can be relied on, and no density.
      architecture: "invertible" halves the resolution by squeezes, which lose nothing; "standard" by strides, with
        convolutions of one pixel as shortcuts, to the same number of channels.
      head_channels: output channels of a 1x1 convolution before the pooled head; None for no convolution.
      head: "pooled" for a linear layer on pooled features (`PooledHead`); "mixture" for Bayes' rule with a normal
        distribution of the output for each class (`MixtureOfNormals`).
      logit_alpha: alpha of a logit of the images, as densities use it; None for none.

    Cost: a `ResNetClassifier` of it evaluates sum(blocks) residual branches for each pass.

    Raises:
      ValueError: for values outside their ranges, and settings that exclude each other; the message names the setting.

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1 and appendix.

    Example:
      >>> config = rf.ClassifierConfig((32, 32, 3), classes=10)
      >>> config.blocks, config.channels, config.has_density
      ((7, 7, 7), (16, 64, 256), False)
    """

    shape: tuple[int, int, int]
    classes: int
    blocks: tuple[int, ...] = (7, 7, 7)
    hidden_channels: tuple[int, ...] = (32, 64, 128)
    padding: int = 13
    squeeze_first: bool = False
    activation: ActivationName = "elu"
    coefficient: float | None = 0.9
    architecture: Architecture = "invertible"
    head: HeadName = "pooled"
    head_channels: int | None = None
    logit_alpha: float | None = None

    def __post_init__(self):
        make_tuples(self, "shape", "blocks", "hidden_channels")
        if len(self.shape) != 3:
            raise ValueError(f"shape: expected (H, W, C), got {self.shape}")
        for side in self.shape:
            check_count("shape", side, 1)
        check_count("classes", self.classes, 2)
        if not self.blocks:
            raise ValueError("blocks: expected at least one stage, got ()")
        for number in self.blocks:
            check_count("blocks", number, 1)
        if len(self.hidden_channels) != len(self.blocks):
            raise ValueError(
                f"hidden_channels: expected {len(self.blocks)} widths, one for each stage of blocks, got "
                f"{self.hidden_channels}"
            )
        for width in self.hidden_channels:
            check_count("hidden_channels", width, 1)
        check_count("padding", self.padding, 0)
        check_type("squeeze_first", self.squeeze_first, bool)
        halvings = len(self.blocks) - 1 + self.squeeze_first
        if any(side % 2**halvings for side in self.shape[:2]):
            raise ValueError(
                f"shape: expected height and width divisible by {2**halvings}, for {len(self.blocks)} stages"
                f"{' with squeeze_first' if self.squeeze_first else ''}, got {self.shape}"
            )
        get_plain_activation(self.activation)  # checks it
        if self.coefficient is not None:
            check_open_interval("coefficient", self.coefficient, 0, 1)
        check_choice("architecture", self.architecture, ARCHITECTURES)
        check_choice("head", self.head, HEADS)
        if self.head == "pooled":
            check_single_channels(self.activation)
        if self.head_channels is not None:
            check_count("head_channels", self.head_channels, 1)
            if self.head != "pooled":
                raise ValueError(
                    f"head_channels: expected None together with head {self.head!r}, got {self.head_channels}"
                )
        if self.logit_alpha is not None:
            check_open_interval("logit_alpha", self.logit_alpha, 0, 0.5)
        if self.architecture == "standard" and self.coefficient is not None:
            raise ValueError(f"coefficient: expected None for the standard architecture, got {self.coefficient}")
        if self.head == "mixture" and not self.has_density:
            raise ValueError(
                f"head: expected 'pooled' for a network without a density ({self.no_density}), got 'mixture'"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """The number of channels of each stage."""
        first = self.shape[-1] * (4 if self.squeeze_first else 1) + self.padding
        return tuple(first * 4**stage for stage in range(len(self.blocks)))

    @property
    def has_density(self) -> bool:
        """Whether the network also is a density model of x."""
        return self.no_density is None

    @property
    def no_density(self) -> str | None:
        """The reason why there is no density of x; None if there is one."""
        if self.coefficient is None:
            return "coefficient None: the blocks need not be bijections"
        if self.padding:
            return f"padding {self.padding}: with appended zeros the network is injective, but not a bijection"
        return None
