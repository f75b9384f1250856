"""Reads a user's images: a folder of image files, an array in a .npy or .npz file, or IDX files like those of MNIST."""

import warnings
from pathlib import Path

import numpy as np

from resflow_jax.data.arrays import LABELS, by_split, read_named_arrays
from resflow_jax.data.idx import idx_images, read_idx_images
from resflow_jax.data.image_files import SUFFIXES, decode, find_files, is_visible, shape_of, visible_folders
from resflow_jax.data.images import Images, ImageSplits, StoredImages, held_if_small, reduce_bits
from resflow_jax.data.split_names import by_split_name, look_like_splits, splits_among
from resflow_jax.data.splits import SPLITS, complete

_DARK = 32  # pixels that are all below are perhaps not meant as parts of 255


def load_path(path: str | Path, *, bits: int = 8) -> ImageSplits:
    """Reads the images under a path. They have one shape and 8 bits a pixel, of which the highest `bits` are kept.

    The path is one of

      - a folder of image files, at any depth, or a folder with the subfolders train, test and optionally validation.
        Files are read as `resflow_jax.data.image_files.decode` says; files whose names are not those of images are left
        out with a warning, hidden ones without;
      - a .npy file of uint8 images [N, H, W, C] or [N, H, W]; a .npz file with one such array, or with the arrays
        train, test and optionally validation. Arrays of labels, as `load_labelled_path` takes, are ignored;
      - an IDX file of images, or a folder with the files of MNIST (train-images-idx3-ubyte, t10k-images-idx3-ubyte),
        compressed by gzip or not.

    Without a test split, a tenth of the images, drawn with a fixed seed, becomes the test split. Without a validation
    split, a twentieth of the remaining images becomes it. A folder of more than 1 GB of pixels is read as needed.

    Args:
      path: a folder or file.
      bits: number of bits of a pixel that are kept, 1..8.

    Returns:
      `ImageSplits` of uint8 images [N, H, W, C] with 2^bits levels.

    Raises:
      FileNotFoundError: if nothing is at the path, or there is no image inside.
      ValueError: if a file cannot be read, has more than 8 bits a pixel can hold, or images differ in shape; the
        message names the file. Also if a folder has subfolders named like splits, but not those above, or an array is
        perhaps one image, or has its channels before its rows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a folder or a file of images, found nothing at {path}")
    parts = _read_folder(path) if path.is_dir() else _read_file(path)
    return split(parts, bits=bits)


def image_shape(path: str | Path) -> tuple[int, int, int]:
    """(H, W, C) of the images under a path, as in `load_path`; of a folder, only the first file is read.

    Raises:
      FileNotFoundError, ValueError: as `load_path`.
    """
    path = Path(path)
    is_folder = path.is_dir() and not idx_images(path)
    found = find_files(path)[0] if is_folder else []
    return shape_of(found[0]) if found else load_path(path).shape


def split(parts: dict[str, Images], *, bits: int = 8) -> ImageSplits:
    """Makes all splits from a "train" split and optional "validation" and "test" splits of images of 8 bits."""
    parts = complete(parts, "images")
    return ImageSplits(**{name: _of_bits(images, bits) for name, images in parts.items()}, levels=2**bits)


def _of_bits(images: Images, bits: int) -> Images:
    if isinstance(images, StoredImages):
        return StoredImages(lambda numbers: reduce_bits(images[numbers], bits), np.arange(len(images)))
    return reduce_bits(images, bits)


def _read_folder(path: Path) -> dict[str, Images]:
    if idx := idx_images(path):
        return {name: as_images(read_idx_images(file), file) for name, file in idx.items()}
    files = {name: image_files(folder) for name, folder in split_folders(path).items()}
    if len(files) == 1 and len(splits := splits_among(file.stem for file in files["train"])) > 1:
        warnings.warn(
            f"the names of the files in {path} have the words {', '.join(sorted(splits))}, and are taken together: put "
            "splits into folders",
            stacklevel=3,
        )
    return {name: stored_files(own) for name, own in files.items()}


def split_folders(path: Path) -> dict[str, Path]:
    """The subfolders of a folder by split; without subfolders named like splits, the folder itself as "train".

    Names of splits may be in any case, and short, such as "val".

    Raises:
      ValueError: if there are subfolders named like splits, but no "train", or other subfolders or image files next to
        them; and if folders named like splits lie deeper.
    """
    folders = {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir() and is_visible(folder.name)}
    splits = by_split_name(folders)
    if splits is None and look_like_splits(folders):
        raise ValueError(
            f"path: expected the folder train and, optionally, test and validation, got {', '.join(folders)} in "
            f"{path}; if these are classes, put them into a folder train"
        )
    if splits is None:
        _check_no_splits_inside(path)
        return {"train": path}
    loose = [file for file in sorted(path.iterdir()) if file.is_file() and file.suffix.lower() in SUFFIXES]
    if loose and is_visible(loose[0].name):
        raise ValueError(f"path: expected images only in the folders {', '.join(folders)}, got {loose[0]}")
    return {split: folders[splits[split]] for split in SPLITS if split in splits}


def _check_no_splits_inside(path: Path) -> None:
    """Raises ValueError if a subfolder, at any depth, has folders of two or more splits."""
    for parent, names, _ in visible_folders(path):
        if parent != path and len(splits_among(names)) > 1:
            raise ValueError(
                f"path: expected the folders of splits in {path} itself, got {', '.join(names)} in {parent}"
            )


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, sorted by name; see `resflow_jax.data.image_files.find_files`.

    Warns of other files. Raises FileNotFoundError if there are no image files.
    """
    files, others = find_files(folder)
    if not files:
        raise FileNotFoundError(f"path: expected image files ({', '.join(SUFFIXES)}) in {folder}, found none")
    if others:
        warnings.warn(
            f"{len(others)} of the files in {folder} do not have the names of images and are left out, first "
            f"{others[0]}",
            stacklevel=4,
        )
    return files


def stored_files(files: list[Path]) -> Images:
    """The images in some files, in this order. They are read at once if they are small.

    Raises:
      ValueError: if a file cannot be read, or has another shape than the first; the message names it.
    """
    first = shape_of(files[0])
    for file in files[1:]:
        if (shape := shape_of(file)) != first:
            raise ValueError(f"path: expected images of one shape, got {first} in {files[0]} and {shape} in {file}")
    images = StoredImages(lambda numbers: np.stack([decode(files[n]) for n in numbers]), np.arange(len(files)))
    images = held_if_small(images)
    _warn_if_dark(images, files[0].parent)
    return images


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() not in (".npy", ".npz"):
        return {"train": as_images(read_idx_images(path), path)}
    arrays = read_named_arrays(path)
    images = by_split({name: array for name, array in arrays.items() if name.lower() not in LABELS} or arrays, path)
    return {name: as_images(array, f"{name} of {path}" if len(images) > 1 else path) for name, array in images.items()}


def as_images(array: np.ndarray, place: str | Path) -> np.ndarray:
    """uint8 images [N, H, W, C] of such an array, or of one [N, H, W]. Errors name the place of the array.

    Raises:
      ValueError: for other arrays, and without images.
    """
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(
            f"path: expected uint8 images [N, H, W, C] or [N, H, W], got {array.dtype} {array.shape} in {place}"
        )
    height, width, channels = array.shape[-3:]
    if array.ndim == 3 and channels in (1, 3, 4) and min(height, width) >= 8:
        raise ValueError(f"path: expected images [N, H, W], got shape {array.shape}, perhaps of one image, in {place}")
    if array.ndim == 4 and height in (1, 3, 4) and min(width, channels) > 4:
        raise ValueError(
            f"path: expected images [N, H, W, C], got shape {array.shape}, perhaps [N, C, H, W], in {place}"
        )
    _warn_if_dark(array, place)
    return array[..., None] if array.ndim == 3 else array


def _warn_if_dark(images: Images, place: str | Path) -> None:
    """Warns of images that were perhaps not meant as parts of 255. Images that are not in memory are not looked at."""
    if isinstance(images, np.ndarray) and 0 < images.max() < _DARK:
        warnings.warn(
            f"pixels in {place} are at most {images.max()}, and are taken as parts of 255: scale them if they have "
            "fewer levels",
            stacklevel=5,
        )
