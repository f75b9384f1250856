"""Reads files of torch.save without torch, and without executing anything in them.

torch.load runs a pickle, which may call any function that the file names. `read_torch_file` interprets the pickle
instead (`interop.torch.pickle`), builds only objects of a fixed list (`interop.torch.objects`) and checks that every
tensor lies in its storage (`interop.torch.storages`). There are two formats, both with little-endian numbers:

  - Since torch 1.6 a file is a zip archive of uncompressed records: PREFIX/data.pkl, the pickle, which refers to
    storages by keys; PREFIX/data/KEY, the bytes of each storage; and perhaps PREFIX/byteorder, the word "little".
  - Before, a file has five pickles, then the storages. The pickles are a magic number, the version 1001, a dict about
    the system, the object, and the list of keys. Each storage has its number of elements as an int64, then these.
"""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from resflow_jax.functional.checks import error_text
from resflow_jax.interop.torch.objects import Stub, persistent
from resflow_jax.interop.torch.pickle import interpret
from resflow_jax.interop.torch.storages import Refused, Storage, brief

__all__ = ["Stub", "read_torch_file"]

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


def read_torch_file(path: str | Path) -> Any:
    """Reads what torch.save wrote: dicts, lists, strings, numbers, ..., with tensors and parameters as NumPy arrays.

    Every array owns its elements. If the file has the same part of the same storage twice, as in a state_dict and in
    its module, both are the same array. An object of a class of `resflows` or `torch.nn` is a `Stub`.

    Args:
      path: path of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      IsADirectoryError: if it is a folder.
      ValueError: if torch.save did not write the file, if it names a class or function that is not allowed, or if it is
        damaged. The message names the file. No part of it is returned.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a checkpoint of PyTorch, found nothing")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a checkpoint of PyTorch, got a folder")
    with path.open("rb") as file:
        try:
            return _read(file, path.stat().st_size)
        except Refused as error:
            raise ValueError(f"{path}: {error_text(error)}") from error
        except Exception as error:  # damaged lengths and offsets also give MemoryError and OSError
            what = f"{type(error).__name__}: {error_text(error)}"
            raise ValueError(f"{path}: expected a whole checkpoint of PyTorch, could not read it ({what})") from error


def _read(file: BinaryIO, nbytes: int) -> Any:
    head = file.read(4)
    file.seek(0)
    if head == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            return _read_zip(archive, nbytes)
    if head[:1] == b"\x80":  # a pickle says its protocol first
        return _read_legacy(BytesIO(file.read()), nbytes)  # in memory, a length beyond the end allocates nothing
    got = f"a file that starts with {head!r}" if head else "an empty file"
    raise Refused(f"expected a checkpoint of PyTorch, a zip archive or a pickle, got {got}")


def _read_zip(archive: zipfile.ZipFile, nbytes: int) -> Any:
    records = {info.filename: info for info in archive.infolist()}
    if len(records) != len(archive.infolist()):
        raise Refused("expected every record of the zip archive once, got one twice")
    prefixes = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(prefixes) != 1:
        raise Refused(f"expected a zip archive of torch.save with one record data.pkl, got {len(prefixes)} of them")
    (prefix,) = prefixes
    if f"{prefix}/constants.pkl" in records:
        raise Refused("expected a file of torch.save, got a TorchScript archive: save the state_dict of the module")
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise Refused("expected uncompressed records as torch.save writes them, got compressed ones")
    if f"{prefix}/byteorder" in records:
        _check_order(archive.read(f"{prefix}/byteorder"), b"little")
    storages: dict[str, Storage] = {}
    value = interpret(BytesIO(archive.read(f"{prefix}/data.pkl")), _limit(nbytes), persistent(storages, nbytes))
    for key, storage in storages.items():
        record = records.get(f"{prefix}/data/{key}")
        if record is None:
            raise Refused(f"expected a record data/{key}, which data.pkl refers to, found none")
        if record.file_size != storage.nbytes:
            raise Refused(f"expected {storage.nbytes} bytes in the record data/{key}, got {record.file_size}")
        storage.fill(archive.read(record))
    return value


def _read_legacy(file: BinaryIO, nbytes: int) -> Any:
    limit = _limit(nbytes)
    if interpret(file, limit) != _MAGIC:
        raise Refused("expected a file of torch.save, got a pickle of something else")
    version = interpret(file, limit)
    if version != _VERSION:
        raise Refused(f"expected version {_VERSION} of the format before torch 1.6, got {brief(version)}")
    _check_order(interpret(file, limit)["little_endian"], True)
    storages: dict[str, Storage] = {}
    value = interpret(file, limit, persistent(storages, nbytes))
    keys = interpret(file, limit)
    if sorted(keys) != sorted(storages):
        raise Refused(f"expected the {len(storages)} storages that the object refers to, got a list of others")
    for key in keys:
        storage = storages[key]
        length = int.from_bytes(file.read(8), "little", signed=True)
        if length != storage.length:
            raise Refused(f"expected {storage.length} elements in storage {key}, got {length}")
        storage.fill(file.read(storage.nbytes))
    return value


def _limit(nbytes: int) -> int:
    """Bytes of objects that a file of `nbytes` may become, since several tensors may share a storage."""
    return 16 * nbytes + 2**27


def _check_order(order: Any, little: Any) -> None:
    if order != little:
        raise Refused(f"expected numbers in little-endian order, got {brief(order)}")
