"""Writes files that torch.load reads, without torch: the zip format of `interop.torch.files`, a pickle of protocol 2.

The records are not compressed. Their data start at multiples of 64 bytes, as torch.save aligns them for mmap. Objects
of classes that are not installed are written from their `Stub`s: torch.load imports the classes, calls their __new__
with the arguments, and gives them their state.
"""

import argparse
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from resflow_jax.interop.torch.objects import Stub, look_up
from resflow_jax.interop.torch.storages import DTYPES, STORAGES
from resflow_jax.io.whole_files import whole_file

__all__ = ["Stub", "write_torch_file"]

_STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items()}
_ALIGNMENT = 64
_LOCAL_HEADER = 30  # bytes of a zip record's header before its name
_EXPECTED = "a dict, OrderedDict, list, tuple, set, str, int, float, bool, None, numeric numpy array, Namespace or Stub"


def write_torch_file(path: str | Path, obj: Any) -> None:
    """Writes an object that `torch.load(path)` then returns, with a tensor for every NumPy array.

    The object may be a dict, OrderedDict (with its `_metadata`), list, tuple, set, str, int, float, bool, None, NumPy
    array, argparse.Namespace, `Stub`, or any nesting of these. The same object in two places is the same in torch.
    Arrays are copied, so that arrays that only overlap become separate tensors. The file appears as a whole or not at
    all.

    Raises:
      TypeError: if there is anything else in `obj`; the message says where.
      ValueError: if a stub has a class that `read_torch_file` would refuse.
    """
    pickler = _Pickler()
    data = pickler.pickle(obj)
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _add(archive, "data.pkl", data)
        _add(archive, "byteorder", sys.byteorder.encode())
        for key, array in enumerate(pickler.arrays):
            _add(archive, f"data/{key}", np.ascontiguousarray(array, DTYPES[array.dtype.name]).tobytes())
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Writes a record. An extra field of zeros in its header aligns its data."""
    record = zipfile.ZipInfo(f"archive/{name}")
    start = archive.start_dir + _LOCAL_HEADER + len(record.filename) + 4  # the field starts with its name and length
    padding = -start % _ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    archive.writestr(record, data)


class _Pickler:
    """Writes the instructions of a pickle; `arrays` are the storages that they refer to."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.out = bytearray(pickle.PROTO + b"\x02")
        self.memo: dict[int, int] = {}
        self.kept: list[Any] = []  # what is in the memo lives on, so that an id is one object

    def pickle(self, obj: Any) -> bytes:
        self._save(obj, "obj")
        return bytes(self.out + pickle.STOP)

    def _save(self, obj: Any, where: str) -> None:
        """Writes instructions that leave the object on top of the stack."""
        kind = type(obj)
        if obj is None or kind in (bool, int, float):
            self.out += pickle.dumps(obj, 2)[2:-1]  # without PROTO and STOP
        elif kind is str:
            text = obj.encode("utf-8", "surrogatepass")
            self.out += pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        elif id(obj) in self.memo:
            self.out += pickle.LONG_BINGET + struct.pack("<I", self.memo[id(obj)])
        elif kind is dict:
            self.out += pickle.EMPTY_DICT
            self._remember(obj)
            self._items(obj, where)
        elif kind is OrderedDict:
            self._call("collections", "OrderedDict", ())
            self._remember(obj)
            self._items(obj, where)
            self._state(vars(obj) or None, where)
        elif kind is list:
            self.out += pickle.EMPTY_LIST
            self._remember(obj)
            self._elements(obj, where)
            self.out += pickle.APPENDS
        elif kind is tuple:
            self._elements(obj, where)
            self.out += pickle.TUPLE
            self._remember(obj)
        elif kind is set:
            self._call("__builtin__", "set", (list(obj),), where)
            self._remember(obj)
        elif kind is np.ndarray and obj.dtype.name in _STORAGE_OF:
            self._tensor(obj)
            self._remember(obj)
        elif kind is argparse.Namespace:
            self._call("argparse", "Namespace", ())
            self._remember(obj)
            self._state(vars(obj), where)
        elif kind is Stub and obj.items is None:
            self._stub(obj, where)
        else:
            raise TypeError(f"{where}: expected {_EXPECTED}; got {_described(obj)}")

    def _remember(self, obj: Any) -> None:
        self.out += pickle.LONG_BINPUT + struct.pack("<I", len(self.kept))
        self.memo[id(obj)] = len(self.kept)
        self.kept.append(obj)

    def _elements(self, elements: list | tuple, where: str) -> None:
        self.out += pickle.MARK
        for n, element in enumerate(elements):
            self._save(element, f"{where}[{n}]")

    def _items(self, items: dict, where: str) -> None:
        self.out += pickle.MARK
        for key, value in items.items():
            self._save(key, f"{where}, a key")
            self._save(value, f"{where}[{key!r}]")
        self.out += pickle.SETITEMS

    def _state(self, state: Any, where: str) -> None:
        if state is not None:
            self._save(state, f"{where}.state")
            self.out += pickle.BUILD

    def _global(self, module: str, name: str) -> None:
        self.out += pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def _call(self, module: str, name: str, args: tuple, where: str = "") -> None:
        self._global(module, name)
        self._save(args, where)
        self.out += pickle.REDUCE

    def _stub(self, stub: Stub, where: str) -> None:
        look_up(stub.module, stub.name)
        self._global(stub.module, stub.name)
        if stub.args is not None:
            self._save(stub.args, f"{where}.args")
            self.out += pickle.NEWOBJ
        self._remember(stub)
        self._state(stub.state, where)

    def _tensor(self, array: np.ndarray) -> None:
        """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)."""
        self._global("torch._utils", "_rebuild_tensor_v2")
        self.out += pickle.MARK + pickle.MARK
        self._save("storage", "")
        self._global("torch", _STORAGE_OF[array.dtype.name])
        for entry in (str(len(self.arrays)), "cpu", array.size):
            self._save(entry, "")
        self.out += pickle.TUPLE + pickle.BINPERSID
        strides = [math.prod(array.shape[n + 1 :]) for n in range(array.ndim)]
        for entry in (0, array.shape, tuple(strides), False, OrderedDict()):
            self._save(entry, "")
        self.out += pickle.TUPLE + pickle.REDUCE
        self.arrays.append(array)


def _described(obj: Any) -> str:
    if type(obj) is np.ndarray:
        return f"an array of {obj.dtype}"
    if type(obj) is Stub:
        return f"{obj} with items"
    return f"{type(obj).__module__}.{type(obj).__qualname__}"
