"""Layers of ordinary residual networks: residual blocks without a bound, and blocks that change the resolution.

    UnconstrainedBlock   y = x + g(x)
    StridedBlock         y = S x + g(x),   S a convolution with kernels of one pixel and a stride

They are here for comparison with invertible networks (Behrmann et al. 2019, arXiv 1811.00995, section 4.1). Neither has
a log-det. Their `inverse` runs the iteration of invertible blocks all the same, and its status says if it failed.
"""

import math
from numbers import Integral

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.activations import get_plain_activation
from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_shape, check_count, check_type
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.primitives.convolution import conv2d
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.bijector import Inverse, Shape, as_row
from resflow_jax.layers.block_certificate import BlockCertificate
from resflow_jax.layers.initial import fan_in_uniform
from resflow_jax.layers.module import List, Module
from resflow_jax.layers.without_log_det import NoBijection, WithoutLogDet

Array = jax.Array

_NO_BOUND = BlockCertificate(math.inf, math.inf, 2.0, math.inf, math.inf, ())
_STEPS = 100  # of the iteration of a `StridedBlock`, at most


class UnconstrainedBlock(NoBijection):
    """Residual block y = x + g(x) of three convolutions, without a bound on Lip(g): in general no bijection.

        g = conv 3x3 o phi o conv 1x1 o phi o conv 3x3 (o phi with pre-activation)

    `inverse` runs the same iteration as for a `ResidualBlock`. It may diverge, or find another x with the same y.

    Args:
      shape: (H, W, C) of one x.
      hidden_channels: width of g.
      activation: phi, a name in `ACTIVATIONS` of one without parameters that keeps the channels.
      preactivation: whether an activation precedes the first convolution.
      rngs: draws the parameters.

    Randomness: `rngs` only. Cost: one evaluation of g; the inverse evaluates g up to the cap of the solver.

    Raises:
      ValueError: for sizes below one and an unknown activation; from `forward`, since there is no log-det [B].

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1 ("vanilla"); He et al. (2016, arXiv 1603.05027).

    Example:
      >>> block = rf.UnconstrainedBlock((4, 4, 2), 8, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((3, 4, 4, 2))).shape, rf.certify(rf.Flow(block)).is_certified
      ((3, 4, 4, 2), False)
    """

    blocks = 1
    takes_noise = True
    reason = "the block has no bound that makes it a bijection"

    def __init__(
        self,
        shape: Shape,
        hidden_channels: int,
        *,
        activation: str = "elu",
        preactivation: bool = True,
        rngs: nnx.Rngs,
    ):
        self.shape = self.event_shape = _image_shape(shape)
        check_count("hidden_channels", hidden_channels, 1)
        self.hidden_channels, self.activation, self.preactivation = hidden_channels, activation, preactivation
        self.branch = Branch(self.shape[-1], hidden_channels, self.shape[-1], activation, preactivation, rngs=rngs)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        return x + self.branch(x)

    def passed(self, x: Array, key: Array | None, without: WithoutLogDet) -> Array:
        return x + without.dropped(self.branch(x), key)

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        graphdef, state = nnx.split(self.branch)
        g = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
        x, status = residual_inverse(g, state, y, solver=solver, return_status=True)
        return x, [as_row(status)]

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        blocks.append(_NO_BOUND)
        return math.inf, math.inf


class StridedBlock(NoBijection):
    """Residual block y = S x + g(x) that changes the resolution and the channels: no bijection.

    S is a convolution with kernels of one pixel and the stride; the first convolution of g has the stride too. With a
    stride of 2, S drops three pixels of four, and y has in general fewer elements than x.

    `inverse` iterates x <- S^+ (y - g(x)) with the pseudo-inverse S^+, which leaves dropped pixels at zero. Its status
    says whether f(x) = y for the x that it found; that may be another x than the one that y was computed from.

    Args:
      shape: (H, W, C) of one x.
      channels: number of channels of y.
      hidden_channels: width of g.
      stride: 1 or 2; it divides H and W.
      activation, preactivation, rngs: as in `UnconstrainedBlock`.

    Randomness: `rngs` only. Cost: one evaluation of g and S; the inverse up to 100 of each.

    Raises:
      ValueError: for sizes below one, another stride, and sides that the stride does not divide; from `forward`, since
        there is no log-det [B].

    Source: He et al. (2016, arXiv 1603.05027).

    Example:
      >>> block = rf.StridedBlock((4, 4, 2), 8, 4, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((3, 4, 4, 2))).shape
      (3, 2, 2, 8)
    """

    blocks = 1
    takes_noise = True
    reason = "a block that changes the shape of its input is not a bijection"

    def __init__(
        self,
        shape: Shape,
        channels: int,
        hidden_channels: int,
        *,
        stride: int = 2,
        activation: str = "elu",
        preactivation: bool = True,
        rngs: nnx.Rngs,
    ):
        self.shape = self.event_shape = _image_shape(shape)
        check_count("channels", channels, 1)
        check_count("hidden_channels", hidden_channels, 1)
        if not isinstance(stride, Integral) or isinstance(stride, bool) or stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
        if any(side % stride for side in self.shape[:2]):
            raise ValueError(f"shape: expected sides divisible by the stride {stride}, got {self.shape}")
        self.channels, self.hidden_channels, self.stride = channels, hidden_channels, stride
        self.activation, self.preactivation = activation, preactivation
        self.shortcut = nnx.Param(fan_in_uniform(rngs, (self.shape[-1], channels)))
        self.branch = Branch(self.shape[-1], hidden_channels, channels, activation, preactivation, stride, rngs=rngs)

    def output_shape(self, shape: Shape) -> Shape:
        height, width, _ = super().output_shape(shape)
        return height // self.stride, width // self.stride, self.channels

    def input_shape(self, shape: Shape) -> Shape:
        return self.shape

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        return self._shortcut(x) + self.branch(x)

    def passed(self, x: Array, key: Array | None, without: WithoutLogDet) -> Array:
        return self._shortcut(x) + without.dropped(self.branch(x), key)

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        pseudo_inverse = jnp.linalg.pinv(self.shortcut[...])

        def step(_, x):
            rest = (y - self.branch(x)) @ pseudo_inverse
            return jnp.zeros_like(x).at[:, :: self.stride, :: self.stride].set(rest)

        axes = varying_axes((y, nnx.state(self)))
        start = jnp.zeros((y.shape[0], *self.shape), y.dtype)
        x = jax.lax.fori_loop(0, _STEPS, step, vary_over(start, axes))
        rest = jnp.abs(y - self(x)).reshape(y.shape[0], -1)
        residual, scale = jnp.max(rest, axis=1), jnp.max(jnp.abs(y), axis=(1, 2, 3))
        tolerance = jnp.maximum(solver.tolerance_for(y.dtype), 64 * float(jnp.finfo(y.dtype).eps))
        converged = residual <= tolerance.astype(y.dtype) * jnp.maximum(1, scale)
        iterations = vary_over(jnp.full(y.shape[0], _STEPS, jnp.int32), axes)
        status = InverseStatus(iterations, residual, jnp.linalg.norm(rest, axis=1), converged)
        return x, [as_row(status)]

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        blocks.append(_NO_BOUND)
        return math.inf, math.inf

    def _shortcut(self, x: Array) -> Array:
        return x[:, :: self.stride, :: self.stride] @ self.shortcut[...]


class Branch(Module):
    """g: three convolutions, 3x3, 1x1 and 3x3, with activations between them; the first may have a stride."""

    def __init__(
        self,
        channels_in: int,
        hidden: int,
        channels_out: int,
        activation: str,
        preactivation: bool,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        check_type("preactivation", preactivation, bool)
        check_type("rngs", rngs, nnx.Rngs)
        self.activation, self.preactivation, self.stride = get_plain_activation(activation), preactivation, stride
        shapes = [(3, 3, channels_in, hidden), (1, 1, hidden, hidden), (3, 3, hidden, channels_out)]
        self.kernels = List(nnx.Param(fan_in_uniform(rngs, shape)) for shape in shapes)
        self.biases = List(nnx.Param(jnp.zeros(shape[-1:])) for shape in shapes)

    def __call__(self, x: Array) -> Array:
        for n, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            if n or self.preactivation:
                x = self.activation({}, x)
            x = conv2d(x, kernel[...])
            if not n and self.stride > 1:
                x = x[:, :: self.stride, :: self.stride]
            x = x + trailing(bias[...], x)
        return x


def _image_shape(shape: Shape) -> Shape:
    shape = as_shape("shape", shape)
    if len(shape) != 3:
        raise ValueError(f"shape: expected (H, W, C), got {shape}")
    return shape
