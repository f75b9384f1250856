"""Reads a user's images: a folder of image files, an array in a .npy or .npz file, or IDX files like those of MNIST."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resflow_jax.data.arrays import LABELS, by_split, read_named_arrays
from resflow_jax.data.idx import idx_images, read_idx_images
from resflow_jax.data.images import Images, ImageSplits, StoredImages, held_if_small, reduce_bits
from resflow_jax.data.splits import SPLITS, complete

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_SPLIT_LIKE = {*SPLITS, "val", "valid", "dev", "training", "testing"}
_GREY = ("1", "L", "LA")  # modes of files with one channel


def load_path(path: str | Path, *, bits: int = 8) -> ImageSplits:
    """Reads the images under a path. They have one shape and 8 bits a pixel, of which the highest `bits` are kept.

    The path is one of

      - a folder of image files, at any depth, or a folder with the subfolders train, test and optionally validation;
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
      ValueError: if a file cannot be read, or images differ in shape; the message names the file. Also if a folder has
        subfolders named like splits, but not those above.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a folder or a file of images, found nothing at {path}")
    parts = _read_folder(path) if path.is_dir() else _read_file(path)
    return split(parts, bits=bits)


def image_shape(path: str | Path) -> tuple[int, int, int]:
    """(H, W, C) of the images under a path, as of `load_path`; of a folder only the first file is looked at.

    Raises:
      FileNotFoundError, ValueError: as `load_path`.
    """
    path = Path(path)
    is_folder = path.is_dir() and not idx_images(path)
    first = min(_find_images(path), default=None) if is_folder else None
    return load_path(path).shape if first is None else _shape(first)


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
    return {name: stored_files(image_files(folder)) for name, folder in split_folders(path).items()}


def split_folders(path: Path) -> dict[str, Path]:
    """The subfolders of a folder by split; without subfolders named like splits, the folder itself as "train".

    Raises:
      ValueError: if there are subfolders named like splits, but not "train", or others beside them.
    """
    folders = {folder.name for folder in path.iterdir() if folder.is_dir()}
    if not folders & _SPLIT_LIKE:
        return {"train": path}
    if "train" not in folders or not folders <= set(SPLITS):
        raise ValueError(
            f"path: expected the folder train and, optionally, test and validation, got "
            f"{', '.join(sorted(folders))} in {path}"
        )
    return {name: path / name for name in SPLITS if name in folders}


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, sorted by name. Raises FileNotFoundError if there are none."""
    files = sorted(_find_images(folder))
    if not files:
        raise FileNotFoundError(f"path: expected image files ({', '.join(SUFFIXES)}) in {folder}, found none")
    return files


def stored_files(files: list[Path]) -> Images:
    """The images in some files, in this order. They are read at once if they are small.

    Raises:
      ValueError: if a file cannot be read, or has another shape than the first; the message names it.
    """
    first = _shape(files[0])
    for file in files[1:]:
        if _shape(file) != first:
            raise ValueError(
                f"path: expected images of one shape, got {first} in {files[0]} and {_shape(file)} in {file}"
            )
    images = StoredImages(lambda numbers: np.stack([_decode(files[n]) for n in numbers]), np.arange(len(files)))
    return held_if_small(images)


def _find_images(folder: Path) -> Iterator[Path]:
    """The image files of a folder, in any depth."""
    return (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _shape(file: Path) -> tuple[int, int, int]:
    """(H, W, C) of an image file, without decoding it. Grey images have one channel, all others three."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"path: expected images of 8 bits a pixel, got mode {image.mode} in {file}")
            return image.height, image.width, 1 if image.mode in _GREY else 3
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"path: expected an image file, could not read {file}: {error}") from error


def _decode(file: Path) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, C]. Transparency is ignored."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"path: expected an image file, could not read {file}: {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() not in (".npy", ".npz"):
        return {"train": as_images(read_idx_images(path), path)}
    arrays = read_named_arrays(path)
    images = by_split({name: array for name, array in arrays.items() if name not in LABELS} or arrays, path)
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
    return array[..., None] if array.ndim == 3 else array
