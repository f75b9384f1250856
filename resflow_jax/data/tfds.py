"""Reads image sets of TensorFlow Datasets that are prepared on disk, without TensorFlow, with labels if asked."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from resflow_jax.data.files import split
from resflow_jax.data.images import Images, ImageSplits, StoredImages, held_if_small, take
from resflow_jax.data.labels import LabelledImages, Labels, number_names

_CHUNK = 1024  # number of examples that are read at once for their labels
_VALIDATION, _LARGE = 5000, 20000  # images that validate by default, in a set of at least so many training images


def load_tfds(
    name: str, data_dir: str | Path | None = None, *, bits: int = 8, validation: int | None = None
) -> ImageSplits:
    """Reads a prepared image set, with up to 256 levels. A split of more than 1 GB of pixels is read as needed.

    The test split is the data set's split "test". If it has none, it is the split "validation", as for ImageNet, where
    likelihoods are published on it. If it has neither, it is the last tenth of the training images, as for CelebA-HQ.

    Args:
      name: name of the data set, which must have the feature "image". Add the configuration if there are several, as in
        "downsampled_imagenet/32x32".
      data_dir: directory with the data set, prepared as array_record. None takes `find_data_dir`.
      bits: number of bits of a pixel that are kept, 1..8.
      validation: number of training images, from the end, that become the validation split. None takes 5000, or a tenth
        if there are fewer than 20000 training images.

    Returns:
      `ImageSplits` of uint8 images [N, H, W, C] with 2^bits levels.

    Raises:
      FileNotFoundError: if the data set is not there; the message says how to prepare it.
      ValueError: if it cannot be read, for example because it is damaged or prepared in another format; if it has no
        training split; or if its images are not of 8 bits and one shape.
    """
    sources, directory = _open(name, data_dir)
    return split(_images(sources, name, directory, validation), bits=bits)


def load_labelled_tfds(
    name: str, data_dir: str | Path | None = None, *, bits: int = 8, validation: int | None = None
) -> LabelledImages:
    """Reads a prepared image set with its labels; the images are those of `load_tfds`.

    The labels are read at once, also those of images that are read as needed. No image is decoded for them.

    Args:
      name: name of the data set, as for `load_tfds`; it must have the feature "label" too, a class or an integer.
      data_dir: directory with the data set, as for `load_tfds`.
      bits: number of bits of a pixel that are kept, 1..8.
      validation: number of training images, from the end, that become the validation split, as for `load_tfds`.

    Returns:
      `LabelledImages`, of uint8 images [N, H, W, C] with 2^bits levels. The classes have the names that the data set
      gives them; if it gives none, they are the numbers up to the largest label.

    Raises:
      FileNotFoundError: as `load_tfds`.
      ValueError: as `load_tfds`; also if the data set has no such labels, or images without a label.
    """
    import tensorflow_datasets as tfds

    sources, directory = _open(name, data_dir)
    names = _class_names(name, dict(sources["train"].dataset_info.features))
    images = _images(sources, name, directory, validation)
    undecoded, _ = _open(name, directory, decoders={"image": tfds.decode.SkipDecoding()})
    labels = _by_split(undecoded, lambda source: _labels(source, name, directory), validation)
    if names is None:
        names = number_names(1 + max(int(numbers.max()) for numbers in labels.values()))
    return LabelledImages(split(images, bits=bits), Labels(**labels, names=names))


def _open(name: str, data_dir: str | Path | None, **options: Any) -> tuple[dict[str, Any], Path]:
    """The data source of each split of an image set, and the directory in which it is. Options are those of TFDS."""
    import tensorflow_datasets as tfds

    directory = Path(data_dir) if data_dir is not None else find_data_dir(name)
    if not (directory / name).is_dir():
        raise FileNotFoundError(
            f"data_dir: expected a prepared {name!r} in {directory / name}, found none. With a network, prepare it "
            f"by {_build(name, directory)}, or name its directory by --data.dir or $TFDS_DATA_DIR."
        )
    with _readable(name, directory):
        sources = tfds.data_source(name, data_dir=str(directory), download=False, **options)
    if "train" not in sources:
        raise ValueError(f"name: expected a data set with the split 'train', got {', '.join(sources)} in {name!r}")
    _check_features(name, dict(sources["train"].dataset_info.features))
    return sources, directory


def find_data_dir(name: str) -> Path:
    """The first of $TFDS_DATA_DIR and ~/tensorflow_datasets with the data set; if neither has it, the first."""
    home = Path.home() / "tensorflow_datasets"
    named = os.environ.get("TFDS_DATA_DIR")
    candidates = [*([Path(named)] if named else []), home]
    return next((path for path in candidates if (path / name).is_dir()), candidates[0])


def _build(name: str, directory: Path) -> str:
    return f"`tfds build {name} --data_dir {directory} --file_format array_record` (needs TensorFlow)"


@contextmanager
def _readable(name: str, directory: Path) -> Iterator[None]:
    """Converts any error of TFDS, protobuf or array_record to a ValueError that tells the remedy."""
    try:
        yield
    except ImportError:  # not a problem of the data set
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]  # later lines of TFDS may list all data sets
        raise ValueError(
            f"data_dir: expected {name!r} prepared as array_record, could not read {directory / name} ({reason}). "
            f"With a network, remove it and prepare it again by {_build(name, directory)}."
        ) from error


def _check_features(name: str, features: dict[str, Any]) -> None:
    image = features.get("image")
    if image is None or image.np_dtype != np.uint8 or len(image.shape) != 3:
        raise ValueError(
            f"name: expected a data set of images, with the feature 'image' of uint8 [H, W, C]; got the features "
            f"{features} of {name!r}"
        )


def _class_names(name: str, features: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes of the feature "label"; None if it is an integer without names."""
    label = features.get("label")
    if label is None or label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
        raise ValueError(
            f"name: expected a data set with labels, with the feature 'label' of one integer; got the features "
            f"{features} of {name!r}"
        )
    names = getattr(label, "names", None)
    return None if names is None else tuple(names)


def _by_split(
    sources: dict[str, Any], read: Callable[[Any], Images | np.ndarray], validation: int | None
) -> dict[str, Images | np.ndarray]:
    """What `read` reads of the data sources, by the splits that `load_tfds` describes."""
    parts = {"train": read(sources["train"])}
    if "test" in sources or "validation" in sources:
        parts["test"] = read(sources["test" if "test" in sources else "validation"])
    else:
        parts["train"], parts["test"] = _cut(parts["train"], max(1, len(parts["train"]) // 10))
    number = len(parts["train"])
    if validation is None:
        validation = _VALIDATION if number >= _LARGE else max(1, number // 10)
    if not 0 < validation < number:
        raise ValueError(f"validation: expected between 1 and {number - 1} images, got {validation}")
    parts["train"], parts["validation"] = _cut(parts["train"], validation)
    return parts


def _images(sources: dict[str, Any], name: str, directory: Path, validation: int | None) -> dict[str, Images]:
    return _by_split(sources, lambda source: _stored(source, name, directory), validation)


def _stored(source: Any, name: str, directory: Path) -> Images:
    def read(numbers):
        with _readable(name, directory):
            images = [example["image"] for example in source.__getitems__([int(n) for n in numbers])]
        shapes = sorted({image.shape for image in images})
        if len(shapes) > 1:
            raise ValueError(f"name: expected images of one shape, got {shapes[0]} and {shapes[1]} in {name!r}")
        return np.stack(images)

    return held_if_small(StoredImages(read, np.arange(len(source))))


def _labels(source: Any, name: str, directory: Path) -> np.ndarray:
    labels = []
    with _readable(name, directory):
        for start in range(0, len(source), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(source)))
            labels += [example["label"] for example in source.__getitems__(list(numbers))]
    return np.asarray(labels)


def _cut(values: Images | np.ndarray, last: int) -> tuple[Images | np.ndarray, Images | np.ndarray]:
    """Divides images or labels into all but the last `last`, and these."""
    rows = np.arange(len(values))
    return take(values, rows[:-last]), take(values, rows[-last:])
