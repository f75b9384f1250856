"""Image sets of TensorFlow Datasets, prepared on disk and read without TensorFlow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from resflow_jax.data.files import split
from resflow_jax.data.images import Images, ImageSplits, StoredImages, held_if_small, take


def load_tfds(name: str, data_dir: str | Path | None = None, *, bits: int = 8, validation: int = 5000) -> ImageSplits:
    """A prepared image set, 256 levels or fewer. Splits of more than 1 GB of pixels are read as needed.

    The test split is that named "test"; else that named "validation", as of ImageNet, whose likelihoods are
    published on it; else the last tenth of the training images, as of CelebA-HQ.

    Args:
      name: the data set, which has the feature "image"; with its configuration if there are several, as in
        "downsampled_imagenet/32x32".
      data_dir: where it lies prepared as array_record; by default `find_data_dir`.
      bits: the highest bits of a pixel that are kept.
      validation: number of training images, taken from the end, that become the validation split.

    Raises:
      FileNotFoundError: if it is not there; the message says how to prepare it.
      ValueError: if it cannot be read, as when it is damaged or prepared in another format; if it has no training
        split, or no images of eight bits and one shape.
    """
    import tensorflow_datasets as tfds

    directory = Path(data_dir) if data_dir is not None else find_data_dir(name)
    if not (directory / name).is_dir():
        raise FileNotFoundError(
            f"data_dir: expected a prepared {name!r} in {directory / name}, found none. Prepare it, where there is "
            f"a network, by {_build(name, directory)}, or name its directory by --data.dir or $TFDS_DATA_DIR."
        )
    with _readable(name, directory):
        sources = tfds.data_source(name, data_dir=str(directory), download=False)
    if "train" not in sources:
        raise ValueError(f"name: expected a data set with the split 'train', got {', '.join(sources)} in {name!r}")
    _check_features(name, dict(sources["train"].dataset_info.features))
    parts = {"train": _stored(sources["train"], name, directory)}
    if "test" in sources or "validation" in sources:
        parts["test"] = _stored(sources["test" if "test" in sources else "validation"], name, directory)
    else:
        parts["train"], parts["test"] = _cut(parts["train"], max(1, len(parts["train"]) // 10))
    if not 0 < validation < len(parts["train"]):
        raise ValueError(f"validation: expected between 1 and {len(parts['train']) - 1} images, got {validation}")
    parts["train"], parts["validation"] = _cut(parts["train"], validation)
    return split(parts, bits=bits)


def find_data_dir(name: str, *others: Path) -> Path:
    """The first of $TFDS_DATA_DIR, ~/tensorflow_datasets and `others` that holds the data set."""
    home = Path.home() / "tensorflow_datasets"
    named = os.environ.get("TFDS_DATA_DIR")
    candidates = [*([Path(named)] if named else []), home, *others]
    return next((path for path in candidates if (path / name).is_dir()), candidates[0])


def _build(name: str, directory: Path) -> str:
    return f"`tfds build {name} --data_dir {directory} --file_format array_record` (needs TensorFlow)"


@contextmanager
def _readable(name: str, directory: Path) -> Iterator[None]:
    """What is raised within, of all kinds by TFDS, protobuf and array_record, as an error that says what to do."""
    try:
        yield
    except ImportError:  # no fault of the data set
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]  # TFDS may go on with the names of all data sets
        raise ValueError(
            f"data_dir: expected {name!r} prepared as array_record, could not read {directory / name} ({reason}). "
            f"Remove it and prepare it again, where there is a network, by {_build(name, directory)}."
        ) from error


def _check_features(name: str, features: dict[str, Any]) -> None:
    image = features.get("image")
    if image is None or image.np_dtype != np.uint8 or len(image.shape) != 3:
        raise ValueError(
            f"name: expected a data set of images, with the feature 'image' of uint8 [H, W, C]; got the features "
            f"{features} of {name!r}"
        )


def _stored(source: Any, name: str, directory: Path) -> Images:
    def read(numbers):
        with _readable(name, directory):
            images = [example["image"] for example in source.__getitems__([int(n) for n in numbers])]
        shapes = sorted({image.shape for image in images})
        if len(shapes) > 1:
            raise ValueError(f"name: expected images of one shape, got {shapes[0]} and {shapes[1]} in {name!r}")
        return np.stack(images)

    return held_if_small(StoredImages(read, np.arange(len(source))))


def _cut(images: Images, last: int) -> tuple[Images, Images]:
    """All but the last so many, and these."""
    rows = np.arange(len(images))
    return take(images, rows[:-last]), take(images, rows[-last:])
