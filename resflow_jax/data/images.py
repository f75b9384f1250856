"""Quantised images in memory, split in train, validation and test; dequantisation.

A pixel of L levels, k in {0..L-1}, is dequantised to x = (k + u) / L with u uniform in [0, 1)
(Theis et al. 2016, arXiv 1511.01844, section 3.1), a density on [0, 1] whose bits/dim bound those
of the discrete image from above.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.manual_axes import example_keys

Array = jax.Array


@dataclass(frozen=True)
class ImageSplits:
    """Integer images [N, H, W, C] with values in {0..levels-1}.

    Attributes:
      train, validation, test: uint8 arrays of equal image shape.
      levels: number of grey levels of a pixel.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    levels: int

    def __post_init__(self):
        for name in ("train", "validation", "test"):
            check_quantized(name, getattr(self, name), self.levels)
            if getattr(self, name).shape[1:] != self.shape:
                raise ValueError(f"{name}: expected images {self.shape}, got {getattr(self, name).shape[1:]}")

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


def check_quantized(name: str, images: np.ndarray, levels: int) -> None:
    """Raises ValueError unless images are integers [N, H, W, C], N > 0, in {0..levels-1}."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"{name}: expected images [N, H, W, C] with N > 0, got shape {images.shape}")
    if not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"{name}: expected integer pixels in 0..{levels - 1}, got dtype {images.dtype}")
    if images.min() < 0 or images.max() >= levels:
        raise ValueError(f"{name}: expected pixels in 0..{levels - 1}, got {images.min()}..{images.max()}")


def load_digits() -> ImageSplits:
    """The 1797 8x8 digits that scikit-learn ships, 17 levels; no network.

    The split is fixed: of the images permuted by a fixed seed, 1347 train, 150 validate, 300 test.
    """
    from sklearn.datasets import load_digits as load

    images = load().images.astype(np.uint8)[..., None]
    images = images[np.random.default_rng(0).permutation(len(images))]
    train, validation, test = np.split(images, [1347, 1497])
    return ImageSplits(train, validation, test, levels=17)


def load_tfds(name: str, data_dir: str | None = None, *, validation: int = 5000) -> ImageSplits:
    """A prepared TensorFlow Datasets image set, 256 levels, read without TensorFlow.

    Args:
      name: the data set, with "train" and "test" splits and an "image" feature.
      data_dir: where it lies prepared as array_record; by default `find_data_dir`.
      validation: number of training images, taken from the end, that become the validation split.

    Raises:
      FileNotFoundError: if it is not there; the message says how to prepare it.
    """
    import tensorflow_datasets as tfds

    directory = Path(data_dir) if data_dir is not None else find_data_dir(name)
    if not (directory / name).is_dir():
        raise FileNotFoundError(
            f"data_dir: expected a prepared {name!r} in {directory / name}, found none. Prepare it, where there is "
            f"a network, by `tfds build {name} --data_dir {directory} --file_format array_record` (needs TensorFlow), "
            f"or name its directory by --data.dir or $TFDS_DATA_DIR."
        )
    splits = {}
    for split in ("train", "test"):
        source = tfds.data_source(name, split=split, data_dir=str(directory))
        splits[split] = np.stack([example["image"] for example in source.__getitems__(range(len(source)))])
    if not 0 < validation < len(splits["train"]):
        raise ValueError(f"validation: expected between 1 and {len(splits['train']) - 1} images, got {validation}")
    return ImageSplits(splits["train"][:-validation], splits["train"][-validation:], splits["test"], levels=256)


def find_data_dir(name: str, *others: Path) -> Path:
    """The first of $TFDS_DATA_DIR, ~/tensorflow_datasets and `others` that holds the data set."""
    home = Path.home() / "tensorflow_datasets"
    named = os.environ.get("TFDS_DATA_DIR")
    candidates = [*([Path(named)] if named else []), home, *others]
    return next((path for path in candidates if (path / name).is_dir()), candidates[0])


def epoch_batch(seed: int, step: int, size: int, batch_size: int) -> np.ndarray:
    """Indices [batch_size] of training batch `step`: consecutive pieces of one permutation an epoch.

    A function of its arguments alone, so a resumed run sees the same batches. The ragged rest of an
    epoch is left out.
    """
    if not 0 < batch_size <= size:
        raise ValueError(f"batch_size: expected between 1 and {size}, the number of training images, got {batch_size}")
    epoch, position = divmod(step, size // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return order[position * batch_size : (position + 1) * batch_size]


def to_unit_interval(images: np.ndarray, levels: int) -> Array:
    """Pixel k to (k + 1/2) / levels, the middle of its cell: images without noise, to look at."""
    return (jnp.asarray(images).astype(float) + 0.5) / levels
