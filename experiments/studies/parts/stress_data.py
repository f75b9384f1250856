"""Data that are read are the data that were given: random files in random forms, whole and with one fault each.

A whole file must be read exactly, without a warning. A file with a fault must be refused, and the error must name the
file and, of a table, the line and the column; what only may be a fault is read with a warning that names the file.
"""

import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.studies.parts.campaign import Row
from resflow_jax.data.files import load_path
from resflow_jax.data.splits import SPLITS
from resflow_jax.data.units import shifted, units_of
from resflow_jax.data.vectors import load_vectors

Random = np.random.Generator

_NO_NUMBERS = ("", "NA", "?", "nan", "-inf", "TRUE", "no", "1_000", "١٢", "0x1F", "1 000", "3 %", "x", "1.2.3", "12h")
_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252")
_INTEGERS = ("<i2", ">i4", "<u4", ">i8", "<u8")
_FLOATS = ("<f2", ">f4", "<f4", ">f8", "<f8")


def data_campaign(directory: Path, *, seconds: float = 20.0, seed: int = 0) -> list[Row]:
    """Reads random files in a directory, for some seconds in all.

    Returns:
      A row for each kind of file.
    """
    kinds: dict[str, Callable[[Path, Random], str | None]] = {
        "tables of numbers as text": _table,
        "tables with one wrong cell": _wrong_cell,
        "tables with a line too long or short": _ragged_line,
        "arrays of vectors": _array,
        "arrays with one wrong number": _wrong_number,
        "columns far from zero": _far_column,
        "folders of images": _images,
        "folders with one wrong image": _wrong_image,
        "folders with names that look like splits": _odd_names,
    }
    rows = []
    directory.mkdir(parents=True, exist_ok=True)
    for number, (name, check) in enumerate(kinds.items()):
        rng, until, files = np.random.default_rng((seed, number)), time.monotonic() + seconds / len(kinds), 0
        fault = None
        while fault is None and (not files or time.monotonic() < until):
            files += 1
            fault = check(directory / f"{number}_{files}", rng)
        answer = f"{files} files, all right" if fault is None else f"file {files}: {fault}"
        rows.append(Row(name, files, answer, fault is None))
    return rows


def _read(load: Callable[[Path], object], path: Path) -> tuple[object, str, list[str]]:
    """What is read, the error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, error = load(path), ""
        except (ValueError, FileNotFoundError) as raised:
            found, error = None, str(raised)
    return found, error, [str(warning.message) for warning in caught]


def _rows_of(splits: object) -> np.ndarray:
    """The rows of all splits, sorted."""
    rows = np.concatenate([getattr(splits, split) for split in SPLITS])
    return rows[np.lexsort(rows.reshape(len(rows), -1).T[::-1])]


def _same(path: Path, load: Callable[[Path], object], expected: np.ndarray) -> str | None:
    found, error, warned = _read(load, path)
    if error or warned:
        return f"{error or warned} for {path}"
    order = np.lexsort(expected.reshape(len(expected), -1).T[::-1])
    return None if np.array_equal(_rows_of(found), expected[order]) else f"other numbers than those in {path}"


def _refused(path: Path, load: Callable[[Path], object], message: str) -> str | None:
    _, error, _ = _read(load, path)
    named = re.search(message, error) and str(path) in error
    return None if named else f"expected an error {message!r} on {path}, got {error!r}"


def _numbers(rng: Random) -> np.ndarray:
    rows, columns = rng.integers(5, 60), rng.integers(1, 6)
    return rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-8, 9, columns) + rng.integers(-1000, 1000, columns)


def _cells(rng: Random, numbers: np.ndarray) -> tuple[list[list[str]], str, bool]:
    """The cells of a table in a random form, its separator, and whether the first line has names."""
    separator = str(rng.choice([",", ";", "\t", "|", " "])) if numbers.shape[1] > 1 else ","
    cells = [[repr(value) for value in row] for row in numbers.tolist()]
    if separator != "," and rng.random() < 0.4:
        cells = [[cell.replace(".", ",") for cell in row] for row in cells]
    if separator != " " and rng.random() < 0.3:
        cells = [[f'"{cell}"' if rng.random() < 0.5 else cell for cell in row] for row in cells]
    has_names = bool(rng.random() < 0.5)
    return ([[f"größe{n}" for n in range(numbers.shape[1])]] if has_names else []) + cells, separator, has_names


def _write(path: Path, rng: Random, cells: list[list[str]], separator: str) -> None:
    end = str(rng.choice(["\n", "\r\n"]))
    text = end.join(separator.join(row) for row in cells) + end * int(rng.integers(0, 3))
    path.write_bytes(text.encode(str(rng.choice(_ENCODINGS)) if text.isascii() or "ö" in text else "utf-8"))


def _table(path: Path, rng: Random) -> str | None:
    path, numbers = path.with_suffix(".csv"), _numbers(rng)
    cells, separator, _ = _cells(rng, numbers)
    _write(path, rng, cells, separator)
    return _same(path, load_vectors, numbers)


def _wrong_cell(path: Path, rng: Random) -> str | None:
    path = path.with_suffix(".csv")
    cells, separator, has_names = _cells(rng, _numbers(rng))
    row, column = int(rng.integers(has_names, len(cells))), int(rng.integers(len(cells[0])))
    wrong = _NO_NUMBERS if separator != " " else [cell for cell in _NO_NUMBERS if len(cell.split()) == 1]
    if len(cells[0]) == 1 and row == 0:
        wrong = [cell for cell in wrong if cell != "x"]  # would be the name of the column
    cells[row][column] = str(rng.choice(wrong))
    path.write_text("\n".join(separator.join(row) for row in cells) + "\n", encoding="utf-8")
    if len(cells[0]) == 1 and cells[row] == [""] and row == len(cells) - 1:
        return None  # an empty line at the end
    return _refused(path, load_vectors, f"in line {row + 1}, column {column + 1} of")


def _ragged_line(path: Path, rng: Random) -> str | None:
    path = path.with_suffix(".csv")
    cells, separator, has_names = _cells(rng, np.column_stack([_numbers(rng)] * 2))
    row = int(rng.integers(max(1, has_names), len(cells)))
    cells[row] = cells[row][:-1] if rng.random() < 0.5 else [*cells[row], "1.5"]
    path.write_text("\n".join(separator.join(row) for row in cells), encoding="utf-8")
    return _refused(path, load_vectors, f"in line {row + 1} of .*, got {len(cells[row])}")


def _array(path: Path, rng: Random) -> str | None:
    path, dtype = path.with_suffix(".npy"), str(rng.choice(_INTEGERS + _FLOATS))
    shape = (int(rng.integers(5, 60)), int(rng.integers(2, 6)))
    numbers = (rng.integers(0, 30000, shape) if "f" not in dtype else rng.normal(size=shape) * 100).astype(dtype)
    np.save(path, np.asarray(numbers, order=str(rng.choice(["C", "F"]))))
    return _same(path, load_vectors, numbers.astype(np.float64))


def _wrong_number(path: Path, rng: Random) -> str | None:
    path, numbers = path.with_suffix(".npy"), rng.normal(size=(int(rng.integers(5, 60)), 3))
    row, column = int(rng.integers(len(numbers))), int(rng.integers(3))
    if rng.random() < 0.5:
        numbers[row, column] = rng.choice([np.nan, np.inf, -np.inf])
    else:
        numbers = rng.integers(-1000, 1000, numbers.shape)
        numbers[row, column] = 2**53 + 1 + rng.integers(2**40)
    np.save(path, numbers)
    return _refused(path, load_vectors, rf"at \[{row}, {column}\] of")


def _far_column(path: Path, rng: Random) -> str | None:
    """Differences are those of float64, to a ten-thousandth of the std."""
    scale, distance = 10.0 ** rng.integers(-20, 20), 10.0 ** rng.integers(0, 9)
    numbers = (rng.normal(size=(50, 1)) + distance) * scale
    path = path.with_suffix(".csv")
    path.write_text("\n".join(map(repr, numbers.ravel().tolist())))
    train = load_vectors(path).train
    if not np.isin(train, numbers).all():
        return f"other numbers than those in {path}"
    try:
        units = units_of(train, str(path))
    except ValueError as error:
        return f"{error} for {path}"
    found = (shifted(train, units.shift).astype(np.float64) - units.mean[0]) / units.std[0]
    error = float(np.abs(found - (train - train.mean()) / train.std()).max())
    return None if error < 1e-4 else f"differences are off by {error} of the std in {path}"


def _images(path: Path, rng: Random) -> str | None:
    """Image files of one shape, some of them turned, in PNG, TIFF and BMP, in one folder or by split."""
    from PIL import Image

    number, channels = int(rng.integers(5, 12)), int(rng.choice([1, 3]))
    images = rng.integers(0, 256, (number, 4, 6, channels), np.uint8)
    images[:, 0, 0] = 255
    splits = [str(name) for name in rng.permutation(["train", "Train", "TRAINING"])[:1]] + ["Test"]
    is_split = rng.random() < 0.5
    for n, image in enumerate(images):
        folder = path / splits[n % 2] if is_split else path / f"{n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        exif, file = Image.Exif(), Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        suffix = str(rng.choice(["png", "tif", "bmp"]))
        if suffix == "png" and rng.random() < 0.5:
            exif[0x0112], file = 6, file.transpose(Image.Transpose.ROTATE_90)
        file.save(folder / f"{n}.{suffix}", **({"exif": exif} if suffix == "png" else {}))
    return _same(path, load_path, images)


def _wrong_image(path: Path, rng: Random) -> str | None:
    from PIL import Image

    path.mkdir()
    image = rng.integers(1, 256, (4, 6, 3), np.uint8)
    for n in range(4):
        Image.fromarray(image).save(path / f"{n}.png")
    kind = str(rng.choice(["deep", "clear", "frames", "cmyk", "size", "grey", "cut", "text"]))
    file = path / ("wrong.jpg" if kind == "cmyk" else "wrong.png")
    if kind == "frames":
        Image.fromarray(image).save(file, save_all=True, append_images=[Image.fromarray(255 - image)])
    elif kind == "cut":
        Image.fromarray(image).save(file)
        file.write_bytes(file.read_bytes()[: int(rng.integers(1, 60))])
    elif kind == "text":
        file.write_text("no image")
    else:
        {
            "deep": lambda: Image.fromarray(image[..., 0].astype(np.uint16) * 257),
            "clear": lambda: Image.fromarray(np.concatenate([image, image[..., :1] // 2], axis=-1)),
            "cmyk": lambda: Image.fromarray(image).convert("CMYK"),
            "size": lambda: Image.fromarray(image[:, : int(rng.integers(1, 6))]),
            "grey": lambda: Image.fromarray(image[..., 0]),
        }[kind]().save(file)
    return _refused(path, load_path, re.escape(str(file)))


def _odd_names(path: Path, rng: Random) -> str | None:
    from PIL import Image

    pairs = (("train2017", "val2017"), ("a_train", "a_test"), ("train", "dev"), ("Train", "train"), ("test", "val"))
    pairs += (("cats/train", "cats/test"), ("train", "cats"))
    for name in pairs[int(rng.integers(len(pairs)))]:
        (path / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (4, 6), np.uint8)).save(path / name / "0.png")
    return _refused(path, load_path, "path: expected the folder")
