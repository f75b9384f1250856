"""Class labels of images in three splits, and the choice of the few that semi-supervised learning keeps."""

from dataclasses import dataclass

import numpy as np

from resflow_jax.data.images import ImageSplits
from resflow_jax.data.splits import SPLITS
from resflow_jax.functional.checks import check_count


@dataclass(frozen=True)
class Labels:
    """Class numbers [N] in 0..classes-1, in three splits.

    Attributes:
      train, validation, test: integer arrays [N]; they are held as int32.
      names: name of each class, at least two.

    Raises:
      ValueError: for labels that are not integers [N] or not numbers of classes, and for fewer than two names.

    Example:
      >>> from resflow_jax.data.labels import Labels
      >>> labels = Labels(np.asarray([0, 1, 1]), np.asarray([1]), np.asarray([0]), names=("cat", "dog"))
      >>> labels.classes, labels.train.dtype.name
      (2, 'int32')
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self):
        if self.classes < 2:
            raise ValueError(f"names: expected the names of at least 2 classes, got {self.names!r}")
        for split in SPLITS:
            labels = getattr(self, split)
            check_labels(split, labels, self.classes)
            object.__setattr__(self, split, labels.astype(np.int32, copy=False))

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)


@dataclass(frozen=True)
class LabelledImages:
    """Images in three splits, and the class of each.

    Attributes:
      images: images [N, H, W, C] of each split.
      labels: labels [N] of each split, in the order of the images.

    Raises:
      ValueError: if a split has not as many labels as images.
    """

    images: ImageSplits
    labels: Labels

    def __post_init__(self):
        for split in SPLITS:
            images, labels = len(getattr(self.images, split)), len(getattr(self.labels, split))
            if images != labels:
                raise ValueError(f"labels.{split}: expected {images} labels, one for each image, got {labels}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.images.shape

    @property
    def levels(self) -> int:
        """The number of levels of a pixel."""
        return self.images.levels


def check_labels(name: str, labels: np.ndarray, classes: int) -> None:
    """Raises ValueError unless labels are integers [N] in 0..classes-1."""
    if not isinstance(labels, np.ndarray):
        raise ValueError(f"{name}: expected an array of integer labels [N], got {type(labels).__name__}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(f"{name}: expected integer labels [N], got {labels.dtype} {labels.shape}")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = wrong.argmax()
        raise ValueError(f"{name}: expected labels in 0..{classes - 1}, got {labels[row]} in row {row}")


def number_names(classes: int) -> tuple[str, ...]:
    """The numbers "0", "1", ... as names of classes that have none."""
    return tuple(map(str, range(classes)))


def keep_labels(labels: np.ndarray, number: int, classes: int, seed: int) -> np.ndarray:
    """Keeps the labels of `number` rows and replaces the others by -1, for semi-supervised learning.

    The rows are drawn with a seed, as equally among the classes as possible: a class with too few rows keeps all, and
    the others keep more. Of one seed, a larger number keeps the rows of a smaller one, and more.

    Args:
      labels: integers [N] in 0..classes-1.
      number: how many labels are kept, between `classes` and N.
      classes: number of classes, of which labels may lack some.
      seed: seed of the drawing.

    Returns:
      int32 labels [N]; -1 stands for an unknown class.

    Raises:
      ValueError: for labels of another kind, or fewer than `classes` or more than N rows to keep.

    Example:
      >>> from resflow_jax.data.labels import keep_labels
      >>> kept = keep_labels(np.arange(1000) % 10, 40, 10, seed=0)
      >>> np.unique(kept, return_counts=True)
      (array([-1,  0,  ...  9], dtype=int32), array([960,   4,  ...   4]))
    """
    check_count("classes", classes, 1)
    check_labels("labels", labels, classes)
    check_count("number", number, classes)
    if number > len(labels):
        raise ValueError(f"number: expected at most {len(labels)}, the number of labels, got {number}")
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = labels[order]
    turns = np.empty(len(labels), int)  # each class offers its first row, then each its second, and so on
    for label in range(classes):
        rows = np.flatnonzero(drawn == label)
        turns[rows] = np.arange(len(rows))
    kept = order[np.argsort(turns, kind="stable")[:number]]
    result = np.full(len(labels), -1, np.int32)
    result[kept] = labels[kept]
    return result
