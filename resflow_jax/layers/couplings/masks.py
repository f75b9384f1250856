"""How a coupling layer divides an event: the elements that it keeps, and those that it moves.

    "halves"        the first half of the last axis is kept: elements of a vector, channels of an image
    "checkerboard"  elements with an even sum of coordinates are kept: pixels of an image, elements of a vector
    a bool array    True where an element is kept

`flipped` exchanges kept and moved. Halves are cut out, so that the network and the map see no more than they need. With
a checkerboard or an array the network sees the whole event, with zeros instead of the moved elements.

Dinh et al. (2017, arXiv 1605.08803), section 3.4.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Shape = tuple[int, ...]

MASKS = ("halves", "checkerboard")


class Halves:
    """The two halves of the last axis; the second has one element more if their number is odd."""

    def __init__(self, shape: Shape, flipped: bool):
        self.first = shape[-1] // 2
        sizes = self.first, shape[-1] - self.first
        self.flipped = flipped
        self.kept_shape, self.moved_shape = ((*shape[:-1], size) for size in (sizes[::-1] if flipped else sizes))

    def kept(self, x: Array) -> Array:
        return x[..., self.first :] if self.flipped else x[..., : self.first]

    def moved(self, x: Array) -> Array:
        return x[..., : self.first] if self.flipped else x[..., self.first :]

    def joined(self, x: Array, moved: Array) -> Array:
        """x with other moved elements."""
        parts = [moved, self.kept(x)] if self.flipped else [self.kept(x), moved]
        return jnp.concatenate(parts, axis=-1)

    def only_moved(self, values: Array) -> Array:
        """Values of the moved elements, with zeros for those that are kept."""
        return values


class Elements:
    """Any division by a bool array, True where an element is kept."""

    def __init__(self, shape: Shape, keep: Any):
        self.keep = keep[None]
        self.kept_shape = self.moved_shape = shape

    def kept(self, x: Array) -> Array:
        return jnp.where(self.keep, x, jnp.zeros((), x.dtype))

    def moved(self, x: Array) -> Array:
        return x

    def joined(self, x: Array, moved: Array) -> Array:
        return jnp.where(self.keep, x, moved)

    def only_moved(self, values: Array) -> Array:
        return jnp.where(self.keep, jnp.zeros((), values.dtype), values)


def checkerboard(shape: Shape) -> np.ndarray:
    """True where the coordinates have an even sum; the channels of a pixel stay together. bool, of the event's shape.

    For a vector (D,) the coordinate is the number of the element, else those of a pixel: all axes but the last.
    """
    axes = shape if len(shape) == 1 else shape[:-1]
    even = np.indices(axes).sum(axis=0) % 2 == 0
    return even if len(shape) == 1 else np.broadcast_to(even[..., None], shape)


def as_mask(shape: Shape, mask: Any) -> Any:
    """A name of a mask, or a bool array, from what a caller gives.

    Args:
      shape: shape of one event.
      mask: "halves", "checkerboard", or a bool array or lists of that shape; traced arrays are checked by shape alone.

    Raises:
      ValueError: for masks that are unknown, of another shape, or that keep or move no element.
    """
    if isinstance(mask, list | tuple):
        mask = np.asarray(mask)
    if not shape:
        raise ValueError("shape: expected at least one axis to divide, got ()")
    if isinstance(mask, str):
        if mask not in MASKS:
            raise ValueError(f"mask: expected one of {', '.join(MASKS)}, or a bool array; got {mask!r}")
        if mask == "halves" and shape[-1] < 2:
            kind = "one element" if len(shape) == 1 else "one channel; a checkerboard divides pixels"
            raise ValueError(f"shape: expected at least 2 elements on the last axis to halve, got {shape}, {kind}")
        if mask == "checkerboard" and math.prod(shape[: max(1, len(shape) - 1)]) < 2:
            kind = "elements" if len(shape) == 1 else "pixels"
            raise ValueError(f"shape: expected at least 2 {kind} for a checkerboard, got {shape}")
        return mask
    if getattr(mask, "dtype", None) != np.bool_ or mask.shape != shape:
        got = f"{mask.dtype} {mask.shape}" if hasattr(mask, "dtype") else repr(mask)
        raise ValueError(f"mask: expected one of {', '.join(MASKS)}, or a bool array of shape {shape}; got {got}")
    if not isinstance(mask, jax.core.Tracer):
        kept = int(np.asarray(mask).sum())
        if not 0 < kept < mask.size:
            raise ValueError(f"mask: expected some elements kept (True) and some moved, got {kept} of {mask.size} kept")
    return mask
