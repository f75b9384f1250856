"""SHA-256 checksums of a directory's files and of named arrays, which tell whether storage has changed them."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from resflow_jax.io.whole_files import whole_file

CHECKSUMS = "checksums.json"


def write_checksums(directory: Path, *, without: Collection[str] = ()) -> None:
    """Writes checksums.json, with the SHA-256 of every file below a directory, atomically.

    Args:
      directory: the directory.
      without: names of files that may change later.
    """
    found = {name: _of_file(directory / name) for name in _files(directory) if name not in without}
    with whole_file(directory / CHECKSUMS) as temporary:
        temporary.write_text(json.dumps({"sha256": found}, indent=1) + "\n")


def damage(directory: Path, below: str = "") -> str | None:
    """What is wrong with the files of a directory; None if they are those that `write_checksums` saw.

    It reads every file once. Files that have been added are not looked at. A directory without checksums.json, as
    earlier versions made them, has no damage that could be told.

    Args:
      directory: the directory.
      below: only files whose names start so are looked at.
    """
    path = directory / CHECKSUMS
    try:
        expected = json.loads(path.read_bytes())["sha256"]
        names = [name for name in expected if name.startswith(below)]
        for name in names:
            if not (directory / name).is_file():
                return f"its file {name} is missing"
            if _of_file(directory / name) != expected[name]:
                return f"its file {name} has changed since it was written (SHA-256)"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"a file of it could not be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its file {CHECKSUMS} cannot be read"
    return None


def has_checksums(directory: Path) -> bool:
    """Whether `damage` could tell whether a file has changed."""
    return (directory / CHECKSUMS).is_file()


def digest_of_arrays(arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> str:
    """The SHA-256 of named arrays with their dtypes and shapes, and of named texts, in hexadecimal digits."""
    found = hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(json.dumps([name, array.dtype.name, np.shape(arrays[name])]).encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _files(directory: Path) -> list[str]:
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in paths if not name.startswith(CHECKSUMS))  # it, and what a crash left of writing it


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
