"""Labelled images of a run: loading by name or path, and rows of images with their labels."""

from typing import NamedTuple

import numpy as np

from experiments.configs.base import DataConfig
from resflow_jax.data.embedded import load_labelled_digits, load_labelled_photographs
from resflow_jax.data.images import Images, ImageSplits
from resflow_jax.data.labelled_files import load_labelled_path
from resflow_jax.data.labels import LabelledImages
from resflow_jax.data.splits import SPLITS
from resflow_jax.data.tfds import load_labelled_tfds


class Rows(NamedTuple):
    """Images [N, H, W, C] of a split and their labels [N]. The length is N.

    A slice, and an array of row numbers, give rows too.
    """

    images: Images
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | np.ndarray) -> "Rows":
        return Rows(self.images[index], self.labels[index])


class LabelledSplits(NamedTuple):
    """The rows of all splits.

    Attributes:
      train, validation, test: `Rows`.
      shape: (H, W, C) of an image.
      levels: number of levels of a pixel.
      names: names of the classes.
    """

    train: Rows
    validation: Rows
    test: Rows
    shape: tuple[int, int, int]
    levels: int
    names: tuple[str, ...]

    @property
    def images(self) -> ImageSplits:
        """The images of all splits without labels."""
        return ImageSplits(self.train.images, self.validation.images, self.test.images, self.levels)

    @classmethod
    def of(cls, data: LabelledImages) -> "LabelledSplits":
        """The rows of labelled images."""
        rows = (Rows(getattr(data.images, n), getattr(data.labels, n)) for n in SPLITS)
        return cls(*rows, data.shape, data.levels, data.labels.names)


def load_labelled(config: DataConfig) -> LabelledSplits:
    """Loads the images that a config names, with their labels."""
    if config.path is not None:
        return LabelledSplits.of(load_labelled_path(config.path, bits=config.bits))
    if config.name == "images":
        raise ValueError("data.path: expected a folder or a file of images, as --data.path FOLDER; got None")
    if config.name == "digits":
        return LabelledSplits.of(load_labelled_digits())
    if config.name == "photographs":
        return LabelledSplits.of(load_labelled_photographs(config.size, config.channels, bits=config.bits))
    return LabelledSplits.of(load_labelled_tfds(config.name, config.dir, bits=config.bits))
