"""Reads single image files as uint8 pixels; what would be dropped or changed on the way is an error.

Orientation of cameras (EXIF) is applied. Refused are files of more than 8 bits a pixel, which Pillow may cut to 8
without a word; more than one frame or page; pixels that are not opaque; and colours of other kinds than grey and RGB.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Pillow chooses the decoder by a file's content; that of PostScript would start another program.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_GREY = ("1", "L", "LA", "La")  # modes of files with one channel
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # tag of EXIF, and its values that exchange rows and columns
_OF_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx")


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files in a folder, at any depth and sorted, and the other files.

    An image file is one whose name ends in one of `SUFFIXES`. Hidden files, those in hidden folders, and those that
    systems leave behind are neither.

    Raises:
      OSError: if a folder cannot be listed; the message names it.
    """
    files = sorted(parent / name for parent, _, names in visible_folders(folder) for name in names)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    return images, [file for file in files if file.suffix.lower() not in SUFFIXES]


def visible_folders(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and all below: each with the names of its own folders and of its files that are visible.

    Links to folders are followed last, except to one that the link lies in. A folder is visited once, however many
    links lead to it.

    Raises:
      OSError: as `find_files`.
    """

    def fail(error: OSError) -> None:
        raise error

    starts, seen = [folder], set()
    for start in starts:  # links that are found on the way are appended
        for name, folders, files in os.walk(start, onerror=fail):
            parent, here = Path(name), Path(name).resolve()
            if here in seen:
                folders.clear()
                continue
            seen.add(here)
            folders[:] = sorted(filter(is_visible, folders))
            links = [parent / n for n in folders if (parent / n).is_symlink()]
            starts += [link for link in links if not here.is_relative_to(link.resolve())]
            yield parent, list(folders), list(filter(is_visible, files))


def is_visible(name: str) -> bool:
    """Whether the name of a file or folder is neither a hidden one nor one of an operating system."""
    return not name.startswith(".") and name.lower() not in _OF_SYSTEMS


def shape_of(file: Path) -> tuple[int, int, int]:
    """(H, W, C) of an image file, usually without decoding it. Grey images have one channel, all others three.

    Raises:
      ValueError: as `decode`, except for pixels that are not opaque; the message names the file.
    """
    with _opened(file) as image:
        if image.getexif().get(_ORIENTATION) in _TRANSPOSED:
            return _pixels(image, file).shape
        return image.height, image.width, 1 if image.mode in _GREY else 3


def decode(file: Path) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, C], the way up that it is shown.

    Raises:
      ValueError: if the file cannot be read, or has anything that uint8 pixels of one opaque image do not; the message
        names the file.
    """
    with _opened(file) as image:
        return _pixels(image, file)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An image file that Pillow can read, of one frame and 8 bits, not yet decoded."""
    from PIL import Image

    try:
        with Image.open(file, formats=_FORMATS) as image:
            if (mode := _deep_mode(image)) is not None:
                raise ValueError(f"path: expected images of 8 bits a pixel, got mode {mode} in {file}")
            if image.mode not in _GREY + _COLOUR:
                raise ValueError(f"path: expected grey or RGB images, got mode {image.mode} in {file}")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format == "MPO":  # a photograph of a camera, with previews
                warnings.warn(f"{file} has {frames} pictures, of which the first is taken", stacklevel=4)
            elif frames > 1:
                raise ValueError(f"path: expected one image a file, got {frames} frames in {file}")
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"path: expected an image file, could not read {file}: {error}") from error


def _deep_mode(image: Any) -> str | None:
    """The mode of the pixels in a file if they have more than 8 bits, as Pillow names it; else None."""
    if image.mode.startswith(("I", "F")):
        return image.mode
    for tile in getattr(image, "tile", ()):
        for mode in tile[3] if isinstance(tile[3], tuple | list) else [tile[3]]:
            if isinstance(mode, str) and any(f";{bits}" in mode for bits in ("12", "16", "32")):
                return mode
    return None


def _pixels(image: Any, file: Path) -> np.ndarray:
    from PIL import ImageOps

    mode, image = "L" if image.mode in _GREY else "RGB", ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        if with_alpha.getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"path: expected opaque images, got transparent pixels in {file}; put it on a background")
        image = with_alpha if mode == "RGB" else image
    pixels = np.asarray(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels
