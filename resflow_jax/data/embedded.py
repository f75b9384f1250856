"""Data sets of images and vectors that scikit-learn contains, which need no network."""

import math

import numpy as np

from resflow_jax.data.images import ImageSplits, reduce_bits
from resflow_jax.data.labels import LabelledImages, Labels, number_names
from resflow_jax.data.vectors import VectorSplits
from resflow_jax.functional.checks import check_count

_TRAIN, _VALIDATION = 0.7, 0.8  # ends of the training and the validation region, as fractions of a photograph's width


def load_digits() -> ImageSplits:
    """The 1797 images of digits in scikit-learn, 8x8 pixels, 17 levels.

    The split is fixed: after a permutation with a fixed seed, 1347 images are for training, 150 for validation and 300
    for testing.

    Example:
      >>> from resflow_jax.data.embedded import load_digits
      >>> digits = load_digits()
      >>> digits.train.shape, digits.test.shape, digits.levels
      ((1347, 8, 8, 1), (300, 8, 8, 1), 17)
    """
    from sklearn.datasets import load_digits as load

    return ImageSplits(*_split_digits(load().images.astype(np.uint8)[..., None]), levels=17)


def load_digit_labels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes 0..9 of the images of `load_digits`: integers [N] for training, validation and testing."""
    from sklearn.datasets import load_digits as load

    return tuple(_split_digits(load().target))


def load_labelled_digits() -> LabelledImages:
    """The images of `load_digits` with their classes, the digits "0" to "9".

    Example:
      >>> from resflow_jax.data.embedded import load_labelled_digits
      >>> digits = load_labelled_digits()
      >>> digits.images.test.shape, digits.labels.test.shape, digits.labels.classes
      ((300, 8, 8, 1), (300,), 10)
    """
    return LabelledImages(load_digits(), Labels(*load_digit_labels(), names=number_names(10)))


def _split_digits(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values[np.random.default_rng(0).permutation(len(values))], [1347, 1497])


def load_photographs(size: int = 16, channels: int = 3, *, bits: int = 8) -> ImageSplits:
    """Square crops of the two photographs in scikit-learn, a temple and a flower, of 427x640 pixels.

    The splits are regions: the left 70 % of the columns are for training, with crops that overlap by half, the next
    10 % for validation and the last 20 % for testing, with crops side by side. No pixel is in two splits. The order of
    the crops is a permutation with a fixed seed.

    Args:
      size: side of a crop in pixels. For sizes above 64 the photographs are enlarged first, so that every region is
        wide enough.
      channels: 3, or 1 for grey.
      bits: number of bits of a pixel that are kept, at most 8.

    Raises:
      ValueError: for a size below 1, another number of channels, or a number of bits outside of 1..8.
    """
    return load_labelled_photographs(size, channels, bits=bits).images


def load_labelled_photographs(size: int = 16, channels: int = 3, *, bits: int = 8) -> LabelledImages:
    """The crops of `load_photographs`, each with the photograph that it is from: "temple" or "flower".

    Arguments and errors are those of `load_photographs`.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    check_count("size", size, 1)
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    zoom = math.ceil(size / 64)
    parts = {"train": [], "validation": [], "test": []}
    labels = {name: [] for name in parts}
    for number, array in enumerate(load_sample_images().images):
        photograph = Image.fromarray(array).convert("RGB" if channels == 3 else "L")
        photograph = photograph.resize((zoom * photograph.width, zoom * photograph.height))
        pixels = np.asarray(photograph).reshape(photograph.height, photograph.width, channels)
        ends = [0, int(_TRAIN * photograph.width), int(_VALIDATION * photograph.width), photograph.width]
        for (name, crops), left, right in zip(parts.items(), ends[:-1], ends[1:], strict=True):
            crops += _crops(pixels[:, left:right], size, max(1, size // 2) if name == "train" else size)
            labels[name] += [number] * (len(crops) - len(labels[name]))
    rng = np.random.default_rng(0)
    orders = {name: rng.permutation(len(crops)) for name, crops in parts.items()}
    splits = {name: reduce_bits(np.stack(crops)[orders[name]], bits) for name, crops in parts.items()}
    classes = {name: np.array(labels[name], np.int32)[orders[name]] for name in parts}
    return LabelledImages(ImageSplits(**splits, levels=2**bits), Labels(**classes, names=("temple", "flower")))


def load_cell_nuclei() -> VectorSplits:
    """30 measurements of cell nuclei in 569 samples (breast cancer data, Wolberg et al. 1995), in their own units.

    The split is fixed: after a permutation with a fixed seed, 400 rows are for training, 69 for validation and 100 for
    testing.
    """
    from sklearn.datasets import load_breast_cancer

    rows = load_breast_cancer().data.astype(np.float32)
    train, validation, test = np.split(np.random.default_rng(0).permutation(rows), [400, 469])
    return VectorSplits(train, validation, test)


def _crops(pixels: np.ndarray, size: int, stride: int) -> list[np.ndarray]:
    rows, columns = (range(0, side - size + 1, stride) for side in pixels.shape[:2])
    return [pixels[row : row + size, column : column + size] for row in rows for column in columns]
