"""A part of a split that stands for the whole: files are often sorted by class or by time, so it is drawn at random."""

from typing import TypeVar

import numpy as np

Examples = TypeVar("Examples")


def subset(examples: Examples, number: int) -> Examples:
    """At most `number` of the examples, the same ones every time, in their order.

    Args:
      examples: an array, `StoredImages` or `Rows`.
      number: of examples to draw without replacement; all are taken if there are no more.
    """
    return examples[:number] if number >= len(examples) else examples[subset_rows(len(examples), number)]


def subset_rows(length: int, number: int) -> np.ndarray:
    """The numbers of the rows that `subset` takes of `length` examples, in ascending order."""
    return np.sort(np.random.default_rng(0).permutation(length)[:number])
