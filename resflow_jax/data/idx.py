"""Reads the IDX files of MNIST: images and labels as unsigned bytes, compressed by gzip or not."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


def idx_images(folder: Path) -> dict[str, Path]:
    """The files of images in a folder, by split, if they have the names of MNIST's. Without a train split, none."""
    files = {split: _either(folder / name) for split, name in _IMAGES.items()}
    return {split: file for split, file in files.items() if file.exists()} if files["train"].exists() else {}


def idx_labels(folder: Path, split: str) -> Path:
    """The file with the labels of a split.

    Raises:
      FileNotFoundError: if there is none; the message names it.
    """
    file = _either(folder / _LABELS[split])
    if not file.exists():
        raise FileNotFoundError(
            f"path: expected the labels of {_IMAGES[split]} in {folder / _LABELS[split]} (or .gz), found none"
        )
    return file


def _either(file: Path) -> Path:
    """This file, or the compressed one if it does not exist."""
    return file if file.exists() else file.with_name(f"{file.name}.gz")


def read_idx_images(path: Path) -> np.ndarray:
    """uint8 images [N, H, W] or [N, H, W, C].

    Raises:
      ValueError: if the file has something else or is damaged; the message names it.
    """
    return _read(path, (3, 4), "pixels", "a folder, .npy, .npz, or an IDX file of uint8 images")


def read_idx_labels(path: Path) -> np.ndarray:
    """uint8 labels [N]. Raises ValueError as `read_idx_images`."""
    return _read(path, (1,), "labels", "an IDX file of uint8 labels")


def _read(path: Path, axes: tuple[int, ...], values: str, expected: str) -> np.ndarray:
    """The array of a file: bytes 0, 0, 8 and the number of axes, then the axes (big-endian), then the values."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"path: could not decompress {path}: {error}") from error
    if data[:4] not in [bytes([0, 0, 8, n]) for n in axes] or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"path: expected {expected}, got {path}")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    array = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if array.size != math.prod(shape.tolist()):
        raise ValueError(f"path: expected {math.prod(shape.tolist())} {values} in {path}, got {array.size}")
    return array.reshape(shape)
