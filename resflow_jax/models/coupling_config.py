"""The settings of flows of coupling layers, with those of the papers as presets."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from resflow_jax.functional.checks import check_choice, check_count, check_flags, check_type
from resflow_jax.functional.splines import MOST_BINS
from resflow_jax.layers.couplings.affine import SCALES, Scale
from resflow_jax.layers.couplings.conditioners import CNNConditioner, MLPConditioner, ResNetConditioner
from resflow_jax.models.groups import Dequantization, ImageTransform, VectorTransform
from resflow_jax.models.recipe_checks import (
    Network,
    OfEvents,
    as_event_shape,
    check_network,
    check_shape_and_data,
    check_squeezes,
    halvings,
)

CouplingName = Literal["additive", "affine", "spline", "mixture"]
COUPLINGS = get_args(CouplingName)
IN_PIECES = ("spline", "mixture")  # couplings that have bins or components
Shape = tuple[int, ...]


@dataclass(frozen=True)
class CouplingScales:
    """How a coupling flow of images passes from scale to scale.

    Attributes:
      squeezes: number of scales: each ends with a 2x2 squeeze, and coupling layers on channels.
      checkerboard: number of coupling layers on pixels before each squeeze.
      last: number of coupling layers on pixels after the last scale.
      factor_out: whether half of the channels passes straight to z between scales (see `MultiScale`).

    Raises:
      ValueError: for negative numbers, and for a `factor_out` that is not a bool.

    Source: Dinh et al. (2017, arXiv 1605.08803), sections 3.4 and 3.6.

    Example:
      >>> rf.CouplingFlowConfig.real_nvp((8, 8, 1)).scales.checkerboard
      4
    """

    squeezes: int = 0
    checkerboard: int = 0
    last: int = 0
    factor_out: bool = True

    def __post_init__(self):
        for name in ("squeezes", "checkerboard", "last"):
            check_count(f"scales.{name}", getattr(self, name), 0)
        check_flags(self, "scales.")


@dataclass(frozen=True)
class CouplingFlowConfig(OfEvents):
    """Configuration of a flow of coupling layers, on vectors [B, D] or images [B, H, W, C] with values in [0, 1].

    The presets `nice`, `real_nvp`, `glow`, `flow_pp` and `neural_spline` are the flows of the papers, at sizes for
    small images and tables: `rf.CouplingFlowConfig.glow((32, 32, 3), couplings=32)`. Their arguments are the shape and
    any fields that are to replace the preset's. Batch normalisation, which some papers have, is an `ActNorm` here, and
    every flow of vectors starts with one, so that the unit of x does not matter.

    With an `MLPConditioner` images are flattened, even pixels before odd ones, and treated as vectors.

    It holds sizes and names only, is frozen and hashable, and has no randomness.

    Attributes:
      shape: shape of one x: (D,) or (H, W, C).
      coupling: "additive", "affine", "spline" or "mixture".
      couplings: number of coupling layers; for images, on the channels of each scale, after its squeeze.
      conditioner: settings of the networks.
      scale: only for "affine": "exp" or "sigmoid"; see `AffineCoupling`.
      pieces: number of bins of "spline" or of components of "mixture"; only for these.
      linear: whether an invertible linear layer (on images a 1x1 convolution) precedes each coupling layer. Without it
        kept and moved elements are exchanged in turn.
      actnorm: whether an `ActNorm` precedes each coupling layer. Without it a learned scale of every element is last.
      condition_dim: number of elements of a condition c, for p(x | c); None for p(x).
      scales: squeezes and coupling layers on the pixels of images.
      data: transform of the data; the default stands for `ImageTransform()` where x is an image.

    Cost: a `CouplingFlow` of it evaluates each network once, in either direction.

    Raises:
      ValueError: for values outside their ranges, and where a coupling layer would have nothing to divide.

    Source: Dinh et al. (2015, arXiv 1410.8516) (NICE); Dinh et al. (2017, arXiv 1605.08803) (Real NVP); Kingma &
    Dhariwal (2018, arXiv 1807.03039) (Glow); Ho et al. (2019, arXiv 1902.00275) (Flow++); Durkan et al. (2019, arXiv
    1906.04032) (neural spline flows).

    Example:
      >>> config = rf.CouplingFlowConfig.glow((8, 8, 1), couplings=4)
      >>> config.coupling, config.linear, config.scales.squeezes
      ('affine', True, 3)
    """

    shape: Shape
    coupling: CouplingName = "affine"
    couplings: int = 8
    conditioner: Network = MLPConditioner()
    scale: Scale = "exp"
    pieces: int = 8
    linear: bool = False
    actnorm: bool = True
    condition_dim: int | None = None
    scales: CouplingScales = CouplingScales()
    data: VectorTransform | ImageTransform = VectorTransform()

    def __post_init__(self):
        check_shape_and_data(self)
        check_choice("coupling", self.coupling, COUPLINGS)
        check_choice("scale", self.scale, SCALES)
        check_count("couplings", self.couplings, 1)
        check_count("pieces", self.pieces, 2 if self.coupling == "spline" else 1)
        if self.coupling == "spline" and self.pieces > MOST_BINS:
            raise ValueError(f"pieces: expected at most {MOST_BINS} of a spline, got {self.pieces}")
        check_flags(self)
        for name, default, couplings in (("scale", "exp", ("affine",)), ("pieces", 8, IN_PIECES)):
            if getattr(self, name) != default and self.coupling not in couplings:
                expected = f"{default!r} where coupling is not {' or '.join(map(repr, couplings))}"
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r} for {self.coupling!r}")
        check_network(self)
        check_type("scales", self.scales, CouplingScales)
        if self.is_flat:
            if self.dim + self.data.padding.channels < 2:
                raise ValueError(f"shape: expected at least 2 elements to divide, got {self.shape}")
            if self.scales != CouplingScales():
                raise ValueError(f"scales: expected the default for vectors and MLPConditioner, got {self.scales}")
            return
        if math.prod(self.shape[:2]) < 2:
            raise ValueError(f"shape: expected images of at least 2 pixels, or MLPConditioner, got {self.shape}")
        check_squeezes(self.shape, self.scales.squeezes)
        if not self.scales.squeezes and not self.scales.last:
            raise ValueError("scales: expected squeezes or last coupling layers, got none of either")
        sides = 2**self.scales.squeezes
        if self.scales.last and self.shape[0] * self.shape[1] < 2 * sides**2:
            raise ValueError(
                f"scales.last: expected 0 where the last scale has one pixel, got {self.scales.last} for {self.shape}"
            )

    def fitted(self, shape: Shape) -> "CouplingFlowConfig":
        """The same settings for events of another shape, with as many squeezes as its sides allow."""
        shape = as_event_shape(shape)
        scales = self.scales if self.is_flat else _fitted(self.scales, shape, self.couplings)
        return replace(self, shape=shape, scales=scales)

    @classmethod
    def nice(cls, shape: Shape, **settings: Any) -> "CouplingFlowConfig":
        """Four additive coupling layers with dense networks, and a learned scale at the end; no ActNorm between."""
        shape = as_event_shape(shape)
        network = MLPConditioner((256, 256))
        return _preset(cls, shape, settings, coupling="additive", couplings=4, conditioner=network, actnorm=False)

    @classmethod
    def real_nvp(cls, shape: Shape, **settings: Any) -> "CouplingFlowConfig":
        """Affine coupling layers; on images four on pixels and four on channels a scale, and four on pixels last."""
        shape = as_event_shape(shape)
        if len(shape) == 1:
            return _preset(cls, shape, settings)
        scales = CouplingScales(2, checkerboard=4, last=4)
        return _preset(cls, shape, settings, couplings=4, conditioner=ResNetConditioner(32, 2), scales=scales)

    @classmethod
    def glow(cls, shape: Shape, **settings: Any) -> "CouplingFlowConfig":
        """Steps of ActNorm, invertible 1x1 convolution and an affine coupling layer; on images three scales."""
        shape = as_event_shape(shape)
        if len(shape) == 1:
            return _preset(cls, shape, settings, linear=True, scale="sigmoid")
        network = CNNConditioner((128, 128), (3, 1, 3))
        options = {"conditioner": network, "scale": "sigmoid", "linear": True, "scales": CouplingScales(3)}
        return _preset(cls, shape, settings, **options)

    @classmethod
    def flow_pp(cls, shape: Shape, **settings: Any) -> "CouplingFlowConfig":
        """A small Flow++: mixtures of logistics, 1x1 convolutions and, for images, variational dequantisation.

        On images four coupling layers on pixels, two on channels after a squeeze, four on pixels last. The networks
        are residual, without attention.
        """
        shape = as_event_shape(shape)
        if len(shape) == 1:
            return _preset(cls, shape, settings, coupling="mixture", linear=True)
        options = {
            "couplings": 2,
            "conditioner": ResNetConditioner(32, 2),
            "scales": CouplingScales(1, checkerboard=4, last=4, factor_out=False),
            "data": ImageTransform(dequantization=Dequantization(4, 16)),
        }
        return _preset(cls, shape, settings, coupling="mixture", linear=True, **options)

    @classmethod
    def neural_spline(cls, shape: Shape, **settings: Any) -> "CouplingFlowConfig":
        """Rational-quadratic splines between invertible linear layers; on images as `glow`."""
        shape = as_event_shape(shape)
        if len(shape) == 1:
            return _preset(cls, shape, settings, coupling="spline", linear=True)
        options = {"conditioner": ResNetConditioner(48, 2), "linear": True, "scales": CouplingScales(3)}
        return _preset(cls, shape, settings, coupling="spline", couplings=4, **options)


def _preset(cls: type, shape: Shape, settings: dict[str, Any], **preset: Any) -> CouplingFlowConfig:
    """The preset for a shape, with the settings that replace its own."""
    if isinstance(settings.get("conditioner"), MLPConditioner):
        preset.pop("scales", None)  # it takes the image as one vector
    own = {name: settings[name] for name in ("couplings", "conditioner") if name in settings}
    config = cls((64, 64, 1) if len(shape) == 3 else (2,), **{**preset, **own})
    scales = config.scales if config.is_flat else _fitted(config.scales, shape, config.couplings)
    return cls(shape, **{**preset, "scales": scales, **settings})


def _fitted(scales: CouplingScales, shape: Shape, couplings: int) -> CouplingScales:
    """The scales with as many squeezes as the sides of images allow; coupling layers on pixels where none is possible.

    Args:
      scales: settings for larger images.
      shape: (H, W, C).
      couplings: number of layers on pixels, where there is no squeeze.
    """
    squeezes = halvings(shape, scales.squeezes)
    last = scales.last if squeezes else max(scales.last, couplings)
    has_pixels = shape[0] * shape[1] >= 2 * 4**squeezes
    return replace(scales, squeezes=squeezes, last=last if has_pixels else 0)
