"""Quantised images, split in train, validation and test; dequantisation.

A pixel of L levels, k in {0..L-1}, is dequantised to x = (k + u) / L with u uniform in [0, 1)
(Theis et al. 2016, arXiv 1511.01844, section 3.1), a density on [0, 1] whose bits/dim bound those
of the discrete image from above.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.batch_axes import example_keys
from resflow_jax.functional.checks import check_count

Array = jax.Array


class StoredImages:
    """Images that stay where they are until they are asked for, like an array [N, H, W, C] of uint8.

    images[n] is one image, images[a:b] and images[indices] are arrays of them. What is read is checked: every
    image has the shape of the first.
    """

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray):
        """read: from numbers [n] to uint8 images [n, H, W, C]; rows: which numbers these images have."""
        self._read, self._rows = read, rows
        self.shape = (len(rows), *read(rows[:1]).shape[1:]) if len(rows) else (0,)
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = self._rows[index]
        images = self._read(np.atleast_1d(rows))
        if images.shape[1:] != self.shape[1:]:
            raise ValueError(f"images: expected shape {self.shape[1:]}, that of the first, got {images.shape[1:]}")
        return images if rows.ndim else images[0]


Images = np.ndarray | StoredImages

_IN_MEMORY = 2**30  # bytes of pixels up to which images are decoded once, and not in every epoch


def held_if_small(images: StoredImages) -> Images:
    """The images read now, up to 1 GB of pixels; else as they are."""
    return images[:] if math.prod(images.shape) <= _IN_MEMORY else images


def take(images: Images, rows: np.ndarray) -> Images:
    """The images of these rows; stored ones stay where they are."""
    if isinstance(images, StoredImages):
        return StoredImages(lambda numbers: images[numbers], rows)
    return images[rows]


@dataclass(frozen=True)
class ImageSplits:
    """Integer images [N, H, W, C] with values in {0..levels-1}.

    Attributes:
      train, validation, test: uint8, of equal image shape; of stored images the first alone is checked.
      levels: number of grey levels of a pixel.
    """

    train: Images
    validation: Images
    test: Images
    levels: int

    def __post_init__(self):
        for name in ("train", "validation", "test"):
            images = getattr(self, name)
            check_quantized(name, images[:1] if isinstance(images, StoredImages) else images, self.levels)
            if images.shape[1:] != self.shape:
                raise ValueError(f"{name}: expected images {self.shape}, got {images.shape[1:]}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.train.shape[1:]


def dequantize(images: Array, key: Array, levels: int) -> Array:
    """(k + u) / levels with u uniform in [0, 1), for integers k [B, H, W, C]; floats in [0, 1].

    Each image has noise of its own, which does not depend on how the batch is divided among devices.
    """
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(f"images: expected integer pixels in 0..{levels - 1}, got dtype {images.dtype}")
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(example_keys(key, images))
    return (images.astype(noise.dtype) + noise) / levels


def reduce_bits(images: np.ndarray, bits: int) -> np.ndarray:
    """The highest `bits` of the eight of a pixel: uint8 in {0..255} to {0..2^bits - 1}."""
    check_bits(bits)
    return images >> np.uint8(8 - bits)


def check_bits(bits: int) -> None:
    """Raises ValueError unless a pixel of eight bits has so many."""
    check_count("bits", bits, 1)
    if bits > 8:
        raise ValueError(f"bits: expected between 1 and 8, got {bits}")


def check_quantized(name: str, images: np.ndarray, levels: int) -> None:
    """Raises ValueError unless images are integers [N, H, W, C], N > 0, in {0..levels-1}."""
    if len(images.shape) != 4 or len(images) == 0:
        raise ValueError(f"{name}: expected images [N, H, W, C] with N > 0, got shape {images.shape}")
    if not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"{name}: expected integer pixels in 0..{levels - 1}, got dtype {images.dtype}")
    if images.min() < 0 or images.max() >= levels:
        raise ValueError(f"{name}: expected pixels in 0..{levels - 1}, got {images.min()}..{images.max()}")


def to_unit_interval(images: np.ndarray, levels: int) -> Array:
    """Pixel k to (k + 1/2) / levels, the middle of its cell: images without noise, to look at."""
    return (jnp.asarray(images).astype(float) + 0.5) / levels
