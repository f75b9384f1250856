"""Reads the IDX files of MNIST: images and labels as unsigned bytes, compressed by gzip or not."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from resflow_jax.data.limits import unpacked_limit

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
    """The array of a file: bytes 0, 0, 8 and the number of axes, then the axes (big-endian), then the values.

    The header is read first, so that a compressed file is not unpacked beyond what it says, nor a small one beyond the
    limit of `data.limits`.
    """
    nbytes = path.stat().st_size
    try:
        with path.open("rb") as raw:
            is_compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if is_compressed else raw
            head = file.read(4)
            sizes = file.read(4 * head[3]) if head in [bytes([0, 0, 8, n]) for n in axes] else b""
            if not sizes or len(sizes) < 4 * head[3]:
                raise ValueError(f"path: expected {expected}, got {path}")
            shape = np.frombuffer(sizes, ">u4").tolist()
            number = math.prod(shape)
            if not number:
                raise ValueError(f"path: expected some {values} in {path}, got axes of {shape}")
            if number > (limit := unpacked_limit(nbytes)):
                raise ValueError(f"path: expected at most {limit} {values} in {path} of {nbytes} bytes, got {number}")
            data = file.read(number + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"path: could not decompress {path}: {error}") from error
    if len(data) != number:
        got = "more" if len(data) > number else len(data)
        raise ValueError(f"path: expected {number} {values} in {path}, got {got}")
    return np.frombuffer(data, np.uint8).reshape(shape)
