"""Bijectors that change the shape or the order of an event's elements, and preserve volume.

Squeeze, reshape, flatten, permutation.
"""

import math
from collections.abc import Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import as_shape
from resflow_jax.layers.bijector import Bijector, Shape, no_log_det

Array = jax.Array


class Rearrangement(Bijector):
    """A layer that moves elements; subclasses define how."""

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


class Squeeze(Rearrangement):
    """2x2 space to depth on images: [B, H, W, C] -> [B, H/2, W/2, 4C], output channel = c * 4 + dy * 2 + dx.

    The inverse is depth to space; log_det = 0 [B].

    Args:
      shape: (H, W, C) of one x, H and W even.

    Randomness: none. Cost: one copy of x.

    Raises:
      ValueError: for another rank, and for odd sides.

    Source: Dinh et al. (2017, arXiv 1605.08803), section 3.6.

    Example:
      >>> layer = rf.Squeeze((2, 2, 1))
      >>> y = layer(jnp.arange(4.0).reshape(1, 2, 2, 1))
      >>> y.shape, y.ravel().tolist(), layer.inverse(y).shape
      ((1, 1, 1, 4), [0.0, 1.0, 2.0, 3.0], (1, 2, 2, 1))
    """

    def __init__(self, shape: tuple[int, int, int]):
        if not isinstance(shape, tuple | list) or len(shape) != 3:
            raise ValueError(f"shape: expected (H, W, C), got {shape}")
        shape = as_shape("shape", shape)
        height, width, _ = shape
        if height % 2 or width % 2:
            raise ValueError(f"shape: expected even height and width to squeeze 2x2, got {shape}")
        self.shape = self.event_shape = tuple(shape)

    def output_shape(self, shape: Shape) -> Shape:
        height, width, channels = super().output_shape(shape)
        return height // 2, width // 2, 4 * channels

    def input_shape(self, shape: Shape) -> Shape:
        return self.shape

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        height, width, channels = self.shape
        y = x.reshape(x.shape[0], height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
        return y.reshape(x.shape[0], height // 2, width // 2, 4 * channels), no_log_det(x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        height, width, channels = self.shape
        x = y.reshape(y.shape[0], height // 2, width // 2, channels, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(y.shape[0], height, width, channels)


class Reshape(Rearrangement):
    """[B, *shape] -> [B, *new_shape], in row-major order; log_det = 0 [B].

    Args:
      shape: shape of one x.
      new_shape: shape of one y, with the same number of elements.

    Randomness: none. Cost: none, or one copy of x.

    Raises:
      ValueError: for sizes below one, and for another number of elements.

    Example:
      >>> layer = rf.Reshape((6,), (2, 3))
      >>> y, log_det = layer.forward(jnp.zeros((4, 6)))
      >>> y.shape, log_det.shape, layer.inverse(y).shape
      ((4, 2, 3), (4,), (4, 6))
    """

    def __init__(self, shape: Shape, new_shape: Shape):
        self.shape = self.event_shape = as_shape("shape", shape)
        self.new_shape = as_shape("new_shape", new_shape)
        if math.prod(self.shape) != math.prod(self.new_shape):
            raise ValueError(f"new_shape: expected as many elements as {self.shape} has, got {self.new_shape}")

    def output_shape(self, shape: Shape) -> Shape:
        super().output_shape(shape)
        return self.new_shape

    def input_shape(self, shape: Shape) -> Shape:
        return self.shape

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return x.reshape(x.shape[0], *self.new_shape), no_log_det(x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return y.reshape(y.shape[0], *self.shape)


class Flatten(Reshape):
    """[B, *shape] -> [B, D], in row-major order: H, W, C for images; log_det = 0 [B].

    Args:
      shape: shape of one x.

    Randomness: none. Cost: none, or one copy of x.

    Raises:
      ValueError: for sizes below one.

    Example:
      >>> layer = rf.Flatten((2, 2, 3))
      >>> y = layer(jnp.zeros((4, 2, 2, 3)))
      >>> y.shape, layer.inverse(y).shape
      ((4, 12), (4, 2, 2, 3))
    """

    def __init__(self, shape: Shape):
        shape = as_shape("shape", shape)
        super().__init__(shape, (math.prod(shape),))

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        self.output_shape(shape)
        return (self.shape,)


class Permutation(Rearrangement):
    """y[..., i] = x[..., order[i]] along one axis of every event; log_det = 0 [B]. The inverse is the inverse
    permutation.

    Args:
      order: every index of the axis once, for example `np.random.default_rng(0).permutation(6)`.
      axis: axis of the event, counted from the last, -1, or from the first, 0.

    Randomness: none. Cost: one copy of x.

    Raises:
      ValueError: for an order that is not a permutation and an axis that is not an integer; from `output_shape`, for
        events with another number of elements along the axis.

    Example:
      >>> layer = rf.Permutation([2, 0, 1])
      >>> y = layer(jnp.array([[10.0, 11.0, 12.0]]))
      >>> y.tolist(), layer.inverse(y).tolist()
      ([[12.0, 10.0, 11.0]], [[10.0, 11.0, 12.0]])
    """

    def __init__(self, order: Sequence[int], axis: int = -1):
        found = np.asarray(order)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
            raise ValueError(f"order: expected the indices 0 to n - 1 in some order, got {order!r}")
        if sorted(found.tolist()) != list(range(found.size)):
            raise ValueError(f"order: expected every index from 0 to {found.size - 1} once, got {found.tolist()}")
        if not isinstance(axis, Integral) or isinstance(axis, bool):
            raise ValueError(f"axis: expected an axis of the event, as -1, got {axis!r}")
        self.order = tuple(found.tolist())
        self.axis = int(axis)

    def output_shape(self, shape: Shape) -> Shape:
        shape = super().output_shape(shape)
        if not -len(shape) <= self.axis < len(shape) or shape[self.axis] != len(self.order):
            expected = f"events with {len(self.order)} elements along axis {self.axis}"
            raise ValueError(f"expected {expected}, got events of shape {shape}")
        return shape

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return self._taken(x, np.asarray(self.order)), no_log_det(x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return self._taken(y, np.argsort(self.order))

    def _taken(self, x: Array, order: np.ndarray) -> Array:
        return jnp.take(x, order, axis=self.axis if self.axis < 0 else self.axis + 1)
