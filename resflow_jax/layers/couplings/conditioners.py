"""The settings of the network inside a coupling layer. Each builds its network for the shapes that the layer needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
from flax import nnx

from resflow_jax.functional.activations import ACTIVATIONS, ActivationName
from resflow_jax.functional.checks import as_shape, check_choice, check_count, check_flags
from resflow_jax.layers.couplings.networks import Layers, PlainNetwork, ResNet
from resflow_jax.layers.networks import check_widths

Shape = tuple[int, ...]


class Conditioner(Protocol):
    """Interface of the settings of a network: a frozen value with the method `build`; no base class is needed."""

    def build(
        self, shape_in: Shape, shape_out: Shape, condition_shape: Shape | None, *, rngs: nnx.Rngs
    ) -> Callable[..., jax.Array]:
        """A module that maps x [B, *shape_in], and a condition [B, *condition_shape] if any, to [B, *shape_out]."""


@dataclass(frozen=True)
class MLPConditioner:
    """Dense layers on the flattened elements that a coupling layer keeps.

    Attributes:
      hidden: output widths of the activations; () for a single linear layer.
      activation: name of the activation, one of `ACTIVATIONS`.
      preactivation: whether an activation precedes the first layer too.
      zero: whether the last layer starts at zero, so that the coupling layer starts as the identity.

    Raises:
      ValueError: for widths below one or that the activation cannot return, and for an unknown activation.

    Example:
      >>> layer = rf.AdditiveCoupling((4,), rf.MLPConditioner(hidden=(16,)), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 4))).tolist()[0]
      [1.0, 1.0, 1.0, 1.0]
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: ActivationName = "relu"
    preactivation: bool = False
    zero: bool = True

    def __post_init__(self):
        check_flags(self)
        object.__setattr__(self, "hidden", as_shape("hidden", self.hidden))
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_widths(ACTIVATIONS[self.activation], self.hidden)

    def build(
        self, shape_in: Shape, shape_out: Shape, condition_shape: Shape | None, *, rngs: nnx.Rngs
    ) -> PlainNetwork:
        """The network, with random parameters."""
        shapes = shape_in, shape_out, condition_shape
        return Layers(
            *shapes, self.hidden, None, ACTIVATIONS[self.activation], self.preactivation, self.zero, rngs=rngs
        )


@dataclass(frozen=True)
class CNNConditioner:
    """Convolutions on the channels of the pixels that a coupling layer keeps; zeros surround the grid.

    Attributes:
      hidden: output channels of the activations, one fewer than kernels.
      kernels: sizes of the kernels, odd.
      activation, preactivation, zero: as in `MLPConditioner`.

    Raises:
      ValueError: as `MLPConditioner`, for even kernels and for a wrong number of widths; from a coupling layer, for
        events without a grid.

    Source: Kingma & Dhariwal (2018, arXiv 1807.03039), section 5, with `hidden` 512 and `kernels` 3, 1, 3.

    Example:
      >>> conditioner = rf.CNNConditioner(hidden=(8, 8), kernels=(3, 1, 3))
      >>> layer = rf.AffineCoupling((4, 4, 2), conditioner, rngs=nnx.Rngs(0))
      >>> layer.forward(jnp.ones((2, 4, 4, 2)))[1].tolist()
      [0.0, 0.0]
    """

    hidden: tuple[int, ...] = (128, 128)
    kernels: tuple[int, ...] = (3, 1, 3)
    activation: ActivationName = "relu"
    preactivation: bool = False
    zero: bool = True

    def __post_init__(self):
        check_flags(self)
        for name in ("hidden", "kernels"):
            object.__setattr__(self, name, as_shape(name, getattr(self, name)))
        if len(self.kernels) != len(self.hidden) + 1:
            expected = f"{len(self.hidden) + 1} sizes, one more than hidden {self.hidden}"
            raise ValueError(f"kernels: expected {expected}, got {self.kernels}")
        for size in self.kernels:
            check_odd("kernels", size)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_widths(ACTIVATIONS[self.activation], self.hidden)

    def build(
        self, shape_in: Shape, shape_out: Shape, condition_shape: Shape | None, *, rngs: nnx.Rngs
    ) -> PlainNetwork:
        """The network, with random parameters."""
        sides = [(size,) * (len(shape_in) - 1) for size in self.kernels]
        shapes = shape_in, shape_out, condition_shape
        return Layers(
            *shapes, self.hidden, sides, ACTIVATIONS[self.activation], self.preactivation, self.zero, rngs=rngs
        )


@dataclass(frozen=True)
class ResNetConditioner:
    """A convolutional residual network on the channels of the pixels that a coupling layer keeps.

    A first convolution, `depth` blocks h + conv(act(conv(act(h)))), and a last convolution of one pixel; no batch
    normalisation, since a coupling layer must treat each example independently.

    Attributes:
      width: number of channels inside.
      depth: number of blocks.
      kernel: size of the kernels, odd.
      activation, zero: as in `MLPConditioner`.

    Raises:
      ValueError: for sizes below one, an even kernel, a width that the activation cannot return, and an unknown
        activation; from a coupling layer, for events without a grid.

    Source: Dinh et al. (2017, arXiv 1605.08803), section 3.7 and section 4.1.

    Example:
      >>> layer = rf.AffineCoupling((4, 4, 1), rf.ResNetConditioner(8, 1), mask="checkerboard", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 4, 4, 1))).shape
      (2, 4, 4, 1)
    """

    width: int = 64
    depth: int = 2
    kernel: int = 3
    activation: ActivationName = "relu"
    zero: bool = True

    def __post_init__(self):
        check_flags(self)
        check_count("width", self.width, 1)
        check_count("depth", self.depth, 1)
        check_odd("kernel", self.kernel)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_widths(ACTIVATIONS[self.activation], (self.width,))

    def build(
        self, shape_in: Shape, shape_out: Shape, condition_shape: Shape | None, *, rngs: nnx.Rngs
    ) -> PlainNetwork:
        """The network, with random parameters."""
        sizes = self.width, self.depth, self.kernel
        return ResNet(shape_in, shape_out, condition_shape, *sizes, ACTIVATIONS[self.activation], self.zero, rngs=rngs)


def check_odd(name: str, size: int) -> None:
    """Expects the odd size of a kernel."""
    check_count(name, size, 1)
    if size % 2 == 0:
        raise ValueError(f"{name}: expected odd sizes, got {size}")
