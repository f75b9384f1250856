"""Images and vectors that scikit-learn ships: data sets that need no network."""

import math

import numpy as np

from resflow_jax.data.images import ImageSplits, reduce_bits
from resflow_jax.data.vectors import VectorSplits
from resflow_jax.functional.checks import check_count

_TRAIN, _VALIDATION = 0.7, 0.8  # the photographs' columns left of these parts of their width


def load_digits() -> ImageSplits:
    """The 1797 8x8 digits that scikit-learn ships, 17 levels.

    The split is fixed: of the images permuted by a fixed seed, 1347 train, 150 validate, 300 test.
    """
    from sklearn.datasets import load_digits as load

    return ImageSplits(*_split_digits(load().images.astype(np.uint8)[..., None]), levels=17)


def load_digit_labels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes {0..9} of the images of `load_digits`: integers [N] for training, validation, test."""
    from sklearn.datasets import load_digits as load

    return tuple(_split_digits(load().target))


def _split_digits(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values[np.random.default_rng(0).permutation(len(values))], [1347, 1497])


def load_photographs(size: int = 16, channels: int = 3, *, bits: int = 8) -> ImageSplits:
    """Square crops of the two photographs that scikit-learn ships, a temple and a flower, 427x640 pixels.

    Split by region: crops of the left 70 % of the columns train, overlapping by half; of the next 10 % they
    validate, of the last 20 % they test, side by side. No pixel is in two splits; their order is a fixed permutation.

    Args:
      size: side of a crop; above 64 the photographs are enlarged first, so that there are regions of that width.
      channels: 3, or 1 for grey.
      bits: of a pixel.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    check_count("size", size, 1)
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    zoom = math.ceil(size / 64)
    parts = {"train": [], "validation": [], "test": []}
    for array in load_sample_images().images:
        photograph = Image.fromarray(array).convert("RGB" if channels == 3 else "L")
        photograph = photograph.resize((zoom * photograph.width, zoom * photograph.height))
        pixels = np.asarray(photograph).reshape(photograph.height, photograph.width, channels)
        ends = [0, int(_TRAIN * photograph.width), int(_VALIDATION * photograph.width), photograph.width]
        for (name, crops), left, right in zip(parts.items(), ends[:-1], ends[1:], strict=True):
            crops += _crops(pixels[:, left:right], size, max(1, size // 2) if name == "train" else size)
    rng = np.random.default_rng(0)
    splits = {name: reduce_bits(rng.permutation(np.stack(crops)), bits) for name, crops in parts.items()}
    return ImageSplits(**splits, levels=2**bits)


def load_cell_nuclei() -> VectorSplits:
    """30 measurements of each of 569 cell nuclei (the breast cancer data of Wolberg et al. 1995), in their own units.

    The split is fixed: of the rows permuted by a fixed seed, 400 train, 69 validate, 100 test.
    """
    from sklearn.datasets import load_breast_cancer

    rows = load_breast_cancer().data.astype(np.float32)
    train, validation, test = np.split(np.random.default_rng(0).permutation(rows), [400, 469])
    return VectorSplits(train, validation, test)


def _crops(pixels: np.ndarray, size: int, stride: int) -> list[np.ndarray]:
    rows, columns = (range(0, side - size + 1, stride) for side in pixels.shape[:2])
    return [pixels[row : row + size, column : column + size] for row in rows for column in columns]
