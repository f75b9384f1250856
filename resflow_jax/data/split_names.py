"""Which names of folders and arrays are those of splits, and which only look so."""

import re
from collections.abc import Iterable

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_OTHERS = {"dev", "eval", "evaluation", "holdout"}  # meant for one split or another
_BESIDE = {"set", "data", "image", "images", "img", "imgs", "split", "samples"}


def split_of(name: str) -> str | None:
    """The split that a name is for: "train", "validation", "test", in any case and some short forms; or None.

    Example:
      >>> from resflow_jax.data.split_names import split_of
      >>> split_of("Train"), split_of("VAL"), split_of("cats")
      ('train', 'validation', None)
    """
    return _SPLITS.get(name.lower())


def by_split_name(names: Iterable[str]) -> dict[str, str] | None:
    """The name for each split, "train" among them; None if not all names are those of splits."""
    names = list(names)
    found = {split_of(name): name for name in names}
    return found if len(found) == len(names) and "train" in found and None not in found else None


def splits_among(names: Iterable[str]) -> set[str]:
    """The splits that words in names are for, in whatever other words: of "digits_train" and "testA" train and test.

    "dev", "eval" and "holdout" count as splits of their own.
    """
    return {_SPLITS.get(word, word) for name in names for word in _words(name) if word in _SPLITS or word in _OTHERS}


def look_like_splits(names: Iterable[str]) -> bool:
    """Whether any of some names, for example of neighbouring folders, may be that of a split.

    One name is if it has no other word, such as "train2017" or "test_images". Two or more are if they have the words of
    two splits, as "digits_train" and "digits_test".

    Example:
      >>> from resflow_jax.data.split_names import look_like_splits
      >>> look_like_splits(["bullet_train", "cats"]), look_like_splits(["train2017", "cats"])
      (False, True)
    """
    names = list(names)
    own = _SPLITS.keys() | _OTHERS | _BESIDE
    alone = (name for name in names if all(word in own or len(word) == 1 for word in _words(name)))
    return bool(splits_among(alone)) or len(splits_among(names)) > 1


def _words(name: str) -> list[str]:
    """The words of a name, such as "train" and "a" of "trainA_2017"."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
