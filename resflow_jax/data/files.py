"""Reads a user's images: a folder of image files, an array in a .npy or .npz file, or IDX files like those of MNIST."""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resflow_jax.data.arrays import read_arrays
from resflow_jax.data.images import Images, ImageSplits, StoredImages, held_if_small, reduce_bits
from resflow_jax.data.splits import SPLITS, complete

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_IDX_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_SPLIT_LIKE = {*SPLITS, "val", "valid", "dev", "training", "testing"}
_GREY = ("1", "L", "LA")  # modes of files with one channel


def load_path(path: str | Path, *, bits: int = 8) -> ImageSplits:
    """Reads the images under a path. They have one shape and 8 bits a pixel, of which the highest `bits` are kept.

    The path is one of

      - a folder of image files, at any depth, or a folder with the subfolders train, test and optionally validation;
      - a .npy file of uint8 images [N, H, W, C] or [N, H, W]; a .npz file with one such array, or with the arrays
        train, test and optionally validation;
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
    is_folder = path.is_dir() and not any((path / f"{_IDX_IMAGES['train']}{end}").exists() for end in ("", ".gz"))
    first = min(_image_files(path), default=None) if is_folder else None
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
    idx = {name: path / file for name, file in _IDX_IMAGES.items()}
    idx = {name: file if file.exists() else file.with_name(file.name + ".gz") for name, file in idx.items()}
    if idx["train"].exists():
        return {name: _read_idx(file) for name, file in idx.items() if file.exists()}
    folders = {folder.name for folder in path.iterdir() if folder.is_dir()}
    if not folders & _SPLIT_LIKE:
        return {"train": stored_files(path)}
    if "train" not in folders or not folders <= set(SPLITS):
        raise ValueError(
            f"path: expected the folder train and, optionally, test and validation, got "
            f"{', '.join(sorted(folders))} in {path}"
        )
    return {name: stored_files(path / name) for name in SPLITS if name in folders}


def stored_files(folder: Path) -> Images:
    """The image files in a folder, at any depth, sorted by name. They are read at once if they are small."""
    files = sorted(_image_files(folder))
    if not files:
        raise FileNotFoundError(f"path: expected image files ({', '.join(SUFFIXES)}) in {folder}, found none")
    first = _shape(files[0])
    for file in files[1:]:
        if _shape(file) != first:
            raise ValueError(
                f"path: expected images of one shape, got {first} in {files[0]} and {_shape(file)} in {file}"
            )
    images = StoredImages(lambda numbers: np.stack([_decode(files[n]) for n in numbers]), np.arange(len(files)))
    return held_if_small(images)


def _image_files(folder: Path) -> Iterator[Path]:
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
        return {"train": _read_idx(path)}
    return {name: _as_images(array, path) for name, array in read_arrays(path).items()}


def _read_idx(path: Path) -> np.ndarray:
    """uint8 images [N, H, W, 1] of an IDX file: bytes 0, 0, 8 and the number of axes, then the axes (big-endian)."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"path: could not decompress {path}: {error}") from error
    if data[:4] not in (b"\0\0\x08\x03", b"\0\0\x08\x04") or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"path: expected a folder, .npy, .npz, or an IDX file of uint8 images, got {path}")
    axes = np.frombuffer(data, ">u4", data[3], 4)
    pixels = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if pixels.size != math.prod(axes.tolist()):
        raise ValueError(f"path: expected {math.prod(axes.tolist())} pixels in {path}, got {pixels.size}")
    return _as_images(pixels.reshape(axes), path)


def _as_images(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(
            f"path: expected uint8 images [N, H, W, C] or [N, H, W], got {array.dtype} {array.shape} in {path}"
        )
    return array[..., None] if array.ndim == 3 else array
