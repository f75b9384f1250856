"""Checkpoints of PyTorch made by hand, instruction by instruction, as no honest program would write them."""

import argparse
import pickle
import struct
import zipfile

import numpy as np

from resflow_jax.interop.torch.files import Stub

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
SIX = np.arange(6, dtype=np.float32).tobytes()


def literal(value):
    """Instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def program(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def call(module, name, args):
    return named(module, name) + literal(args) + b"R"


def storage(numel=6, kind="FloatStorage", key="0", module="torch", more=b""):
    return (
        b"(" + literal("storage") + named(module, kind) + literal(key) + literal("cpu") + literal(numel) + more + b"tQ"
    )


def tensor(offset=0, size=(2, 3), stride=(3, 1), stored=None, more=b""):
    """Instructions that push a tensor. The elements of its storage are 0, 1, ... unless another one is given."""
    arguments = literal(offset) + literal(size) + literal(stride) + literal(False) + literal(None) + more
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + (stored or storage()) + arguments + b"tR"


def write_zip(path, data, records=(("data/0", SIX),), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [("data.pkl", data), ("version", b"3\n"), *records]:
            archive.writestr(f"model/{name}", content)
    return path


def write_legacy(path, data, storages=(("0", 6, SIX),), head=(MAGIC, 1001, SYSTEM), keys=None):
    keys = [key for key, _, _ in storages] if keys is None else keys
    parts = [pickle.dumps(entry, 2) for entry in head] + [data, pickle.dumps(keys, 2)]
    parts += [struct.pack("<q", numel) + content for _, numel, content in storages]
    path.write_bytes(b"".join(parts))
    return path


def assert_same(a, b):
    """The same types, structure, dtypes, shapes and bits."""
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Stub | argparse.Namespace):
        assert_same(vars(a), vars(b))
    else:
        assert a == b
