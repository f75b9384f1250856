"""Quantised images in training, validation and test splits, and their dequantisation.

A pixel k in {0..L-1} of L levels is dequantised to x = (k + u) / L with u uniform in [0, 1) (Theis et al. 2016, arXiv
1511.01844, section 3.1). -log p(x) / (D log 2) + log2 L is, in the mean over u, an upper bound on the bits/dim of the
discrete image.
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
    """Images that are read when they are indexed, like an array [N, H, W, C] of uint8.

    images[n] is one image; images[a:b] and images[indices] are arrays of images. Indexing raises a ValueError if an
    image has another shape than the first.
    """

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray):
        """Makes images from a function that reads them.

        Args:
          read: function from integers [n] to uint8 images [n, H, W, C].
          rows: the integers of these images, in order.
        """
        self._read, self._rows = read, rows
        self.shape = (len(rows), *read(rows[:1]).shape[1:]) if len(rows) else (0,)
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = self._rows[index]
        images = self._read(np.atleast_1d(rows))
        if images.shape[1:] != self.shape[1:]:
            raise ValueError(f"images: expected shape {self.shape[1:]} like the first image, got {images.shape[1:]}")
        return images if rows.ndim else images[0]


Images = np.ndarray | StoredImages

_IN_MEMORY = 2**30  # largest number of bytes of pixels that are read once and held in memory


def held_if_small(images: StoredImages) -> Images:
    """Reads the images into an array if they have up to 1 GB of pixels; otherwise returns them unread."""
    return images[:] if math.prod(images.shape) <= _IN_MEMORY else images


def take(images: Images, rows: np.ndarray) -> Images:
    """The images of these rows. Stored images are not read."""
    if isinstance(images, StoredImages):
        return StoredImages(lambda numbers: images[numbers], rows)
    return images[rows]


@dataclass(frozen=True)
class ImageSplits:
    """Integer images [N, H, W, C] with values in {0..levels-1}, in three splits.

    Attributes:
      train, validation, test: uint8 images of one shape. Of `StoredImages` only the first image is checked.
      levels: number of levels of a pixel.

    Raises:
      ValueError: for images of another rank, dtype, shape or range.
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
    """Dequantises integers k [B, H, W, C] to floats (k + u) / levels in [0, 1], with u uniform in [0, 1).

    The noise of each image is drawn with its own key, so it does not depend on the division of a batch among devices.

    Raises:
      ValueError: if images are not integers, or are not traced and outside of {0..levels-1}.
    """
    _check_pixels("images", images, levels)
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(example_keys(key, images))
    return (images.astype(noise.dtype) + noise) / levels


def reduce_bits(images: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest `bits` of the 8 bits of a pixel: uint8 in {0..255} to {0..2^bits - 1}."""
    check_bits(bits)
    return images >> np.uint8(8 - bits)


def check_bits(bits: int) -> None:
    """Raises ValueError unless bits is an integer in 1..8."""
    check_count("bits", bits, 1)
    if bits > 8:
        raise ValueError(f"bits: expected between 1 and 8, got {bits}")


def check_quantized(name: str, images: np.ndarray, levels: int) -> None:
    """Raises ValueError unless images are integers [N, H, W, C], N > 0, in {0..levels-1}."""
    if len(images.shape) != 4 or len(images) == 0:
        raise ValueError(f"{name}: expected images [N, H, W, C] with N > 0, got shape {images.shape}")
    _check_pixels(name, images, levels)


def _check_pixels(name: str, images: Array | np.ndarray, levels: int) -> None:
    """Raises ValueError unless images are integers, and in {0..levels-1} where they are not traced."""
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integer pixels in 0..{levels - 1}, got dtype {images.dtype}")
    if isinstance(images, jax.core.Tracer) or images.size == 0:
        return
    with jax.ensure_compile_time_eval():  # a program that is being traced may hold images
        low, high = map(int, jax.device_get((images.min(), images.max())))  # uint8 of JAX would wrap 256 levels to 0
    if low < 0 or high >= levels:
        raise ValueError(f"{name}: expected pixels in 0..{levels - 1}, got {low}..{high}")


def to_unit_interval(images: np.ndarray, levels: int) -> Array:
    """Maps pixels k to (k + 1/2) / levels, the middle of their cells, without noise: for pictures.

    Raises:
      ValueError: as `dequantize`.
    """
    _check_pixels("images", images, levels)
    return (jnp.asarray(images).astype(float) + 0.5) / levels
