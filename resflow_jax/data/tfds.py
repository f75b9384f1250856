"""Image sets of TensorFlow Datasets, prepared on disk and read without TensorFlow."""

import os
from pathlib import Path

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
    """
    import tensorflow_datasets as tfds

    directory = Path(data_dir) if data_dir is not None else find_data_dir(name)
    if not (directory / name).is_dir():
        raise FileNotFoundError(
            f"data_dir: expected a prepared {name!r} in {directory / name}, found none. Prepare it, where there is "
            f"a network, by `tfds build {name} --data_dir {directory} --file_format array_record` (needs TensorFlow), "
            f"or name its directory by --data.dir or $TFDS_DATA_DIR."
        )
    sources = tfds.data_source(name, data_dir=str(directory))
    parts = {"train": _stored(sources["train"])}
    if "test" in sources or "validation" in sources:
        parts["test"] = _stored(sources["test" if "test" in sources else "validation"])
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


def _stored(source) -> Images:
    def read(numbers):
        return np.stack([example["image"] for example in source.__getitems__([int(n) for n in numbers])])

    return held_if_small(StoredImages(read, np.arange(len(source))))


def _cut(images: Images, last: int) -> tuple[Images, Images]:
    """All but the last so many, and these."""
    rows = np.arange(len(images))
    return take(images, rows[:-last]), take(images, rows[-last:])
