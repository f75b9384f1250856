"""Reads a user's images with their classes: a folder for each class, arrays in a .npz file, or the files of MNIST."""

import warnings
from pathlib import Path

import numpy as np

from resflow_jax.data.arrays import read_named_arrays
from resflow_jax.data.files import as_images, image_files, split, split_folders, stored_files
from resflow_jax.data.idx import idx_images, idx_labels, read_idx_images, read_idx_labels
from resflow_jax.data.image_files import is_visible
from resflow_jax.data.images import Images
from resflow_jax.data.labels import LabelledImages, Labels, number_names
from resflow_jax.data.splits import SPLITS, complete

_MOST_CLASSES = 2**16  # larger labels are something else than numbers of classes

# what is read: images by split, their labels by split, and the names of the classes
_Parts = tuple[dict[str, Images], dict[str, np.ndarray], tuple[str, ...]]


def load_labelled_path(path: str | Path, *, bits: int = 8) -> LabelledImages:
    """Reads the images under a path with their classes. They have one shape and 8 bits a pixel, as for `load_path`.

    The path is one of

      - a folder with a subfolder of image files for each class, or a folder with the subfolders train and, optionally,
        test and validation, each of which has these subfolders. The classes are those of train, in the order of their
        names, which are the names of the subfolders;
      - a .npz file with uint8 images [N, H, W, C] or [N, H, W] and integers [N] in the arrays images and labels, or in
        the arrays train and train_labels and, optionally, those of test and validation. The classes are 0, 1, ... up to
        the largest label, or as many as the strings in the array names, if there is one. Without names, a class that no
        training image has is a warning;
      - a folder with the files of MNIST (train-images-idx3-ubyte, train-labels-idx1-ubyte and, optionally, those of
        t10k), compressed by gzip or not.

    Splits that are missing are made as by `load_path`, of the same images. A folder of more than 1 GB of pixels is read
    as needed.

    Args:
      path: a folder or file.
      bits: number of bits of a pixel that are kept, 1..8.

    Returns:
      `LabelledImages`, of uint8 images [N, H, W, C] with 2^bits levels.

    Raises:
      FileNotFoundError: if nothing is at the path, a folder of a class has no image, or a file of labels is missing.
      ValueError: if a file cannot be read, images differ in shape, images are outside of the folders of classes, a
        split has another class than train, an array is missing, or labels are not as many integers as images. The
        message names the folder, or the file and the array.

    Example:
      >>> from resflow_jax.data.labelled_files import load_labelled_path
      >>> np.savez("digits.npz", images=np.full((40, 8, 8), 255, np.uint8), labels=np.arange(40) % 10)
      >>> digits = load_labelled_path("digits.npz")
      >>> digits.images.train.shape, digits.labels.train.shape, digits.labels.classes
      ((35, 8, 8, 1), (35,), 10)
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a folder or a file of images with labels, found nothing at {path}")
    if path.is_dir():
        images, labels, names = _read_idx(path) if idx_images(path) else _read_folders(path)
    elif path.suffix.lower() == ".npz":
        images, labels, names = _read_arrays(path)
    else:
        raise ValueError(f"path: expected a folder or a .npz file of images with labels, got {path}")
    if len(names) < 2:
        raise ValueError(f"path: expected images of at least 2 classes, got the class {names[0]} in {path}")
    return LabelledImages(split(images, bits=bits), Labels(**complete(labels, "labels"), names=names))


def _read_folders(path: Path) -> _Parts:
    folders = split_folders(path)
    files = {name: image_files(folder) for name, folder in folders.items()}
    names = {name: _class_names(folder, files[name]) for name, folder in folders.items()}
    classes = sorted(set(names["train"]))
    for name, folder in folders.items():
        if others := sorted(set(names[name]) - set(classes)):
            raise ValueError(
                f"path: expected the classes of {folders['train']} ({', '.join(classes)}) in every split, got "
                f"{', '.join(others)} in {folder}"
            )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = {name: np.asarray([numbers[own] for own in names[name]], np.int32) for name in folders}
    return {name: stored_files(files[name]) for name in folders}, labels, tuple(classes)


def _class_names(folder: Path, files: list[Path]) -> list[str]:
    """For each file in a folder of folders of classes, the name of its class."""
    for file in files:
        if file.parent == folder:
            raise ValueError(f"path: expected a subfolder of images for each class in {folder}, got the image {file}")
    names = [file.relative_to(folder).parts[0] for file in files]
    classes = {child.name for child in folder.iterdir() if child.is_dir() and is_visible(child.name)}
    for empty in sorted(classes - set(names)):
        why = ", a link to a folder that is read already" if (folder / empty).is_symlink() else ""
        place = f"{folder / empty}{why}"
        raise FileNotFoundError(f"path: expected images in the subfolder of each class, found none in {place}")
    return names


def _read_arrays(path: Path) -> _Parts:
    arrays = read_named_arrays(path)
    names = arrays.pop("names", None)
    if "images" in arrays:
        pairs = {"train": ("images", "labels")}
    else:
        pairs = {name: (name, f"{name}_labels") for name in SPLITS if name in arrays}
    expected = {array for pair in pairs.values() for array in pair}
    if "train" not in pairs or not set(arrays) <= expected:
        raise ValueError(
            f"path: expected the arrays images and labels, or train and train_labels and, optionally, those of test "
            f"and validation, got {', '.join(arrays) or 'none'} in {path}"
        )
    for of_images, of_labels in pairs.values():
        if of_labels not in arrays:
            raise ValueError(f"path: expected the array {of_labels} with {of_images}, found none in {path}")
    images = {name: as_images(arrays[array], f"{array} of {path}") for name, (array, _) in pairs.items()}
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ValueError(f"path: expected strings [classes], got {names.dtype} {names.shape} in names of {path}")
    most = _MOST_CLASSES if names is None else len(names)
    labels = {
        name: _as_labels(arrays[array], len(images[name]), most, f"{array} of {path}")
        for name, (_, array) in pairs.items()
    }
    return images, labels, _names(labels, path) if names is None else tuple(names.tolist())


def _read_idx(path: Path) -> _Parts:
    files = {name: (file, idx_labels(path, name)) for name, file in idx_images(path).items()}
    images = {name: as_images(read_idx_images(file), file) for name, (file, _) in files.items()}
    labels = {
        name: _as_labels(read_idx_labels(file), len(images[name]), _MOST_CLASSES, str(file))
        for name, (_, file) in files.items()
    }
    return images, labels, _names(labels, path)


def _as_labels(labels: np.ndarray, number: int, classes: int, place: str) -> np.ndarray:
    """Such labels as int32 [number]; floats are accepted if they are whole. Errors name the place of the array."""
    if labels.dtype.kind not in "iuf" or labels.shape != (number,):
        raise ValueError(
            f"path: expected {number} integer labels, one for each image, got {labels.dtype} {labels.shape} in {place}"
        )
    right = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))
    if not right.all():
        row = right.argmin()
        raise ValueError(f"path: expected labels in 0..{classes - 1}, got {labels[row]} in row {row} of {place}")
    return labels.astype(np.int32)


def _names(labels: dict[str, np.ndarray], path: Path) -> tuple[str, ...]:
    """The numbers up to the largest label as names. Warns of numbers that no training image has."""
    classes = 1 + max(int(numbers.max()) for numbers in labels.values())
    missing = np.setdiff1d(np.arange(classes), labels["train"])
    if len(missing):
        warnings.warn(
            f"{len(missing)} of the {classes} classes 0..{classes - 1} have no training image in {path}, first class "
            f"{missing[0]}; labels count from 0",
            stacklevel=4,
        )
    return number_names(classes)
