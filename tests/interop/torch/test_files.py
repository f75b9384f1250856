"""Checkpoints of PyTorch are read without torch: their values are right, and damaged files are refused."""

import argparse
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from resflow_jax.interop.torch.files import Stub, read_torch_file
from resflow_jax.interop.torch.writer import write_torch_file
from tests.interop.torch.programs import (
    MAGIC,
    SIX,
    SYSTEM,
    assert_same,
    program,
    tensor,
    write_legacy,
    write_zip,
)
from tests.paths import FIXTURES, SHARED


def shared(name):
    """A file of the PyTorch implementation; of those that are not part of the repository, where it is at hand."""
    path = FIXTURES / f"reference_{name}"
    path = path if path.exists() else SHARED / "reference" / name
    if not path.exists():
        pytest.skip(f"needs {path}, a file of the PyTorch implementation that is not part of the repository")
    return path


# Files of the PyTorch implementation


@pytest.mark.parametrize("file", ["mnist_tiny.pth", "mnist_tiny_legacy.pth", "toy2d.pth"])
def test_tensors_of_real_files(file):
    checkpoint = read_torch_file(shared(file))
    with np.load(FIXTURES / f"reference_{file.removesuffix('.pth').removesuffix('_legacy')}.npz") as expected:
        for kind in ("raw", "ema") if "mnist" in file else ("raw",):
            found = checkpoint["state_dict"] if kind == "raw" else checkpoint["ema"].state["shadow_params"]
            names = [name for name in expected if name.startswith(f"{kind}/")]
            assert names
            for name in names:
                value = found[name.removeprefix(f"{kind}/")]
                assert value.flags.owndata and value.flags.writeable
                assert_same(value, expected[name])
    assert type(checkpoint["state_dict"]) is OrderedDict
    assert type(checkpoint["args"]) is argparse.Namespace and checkpoint["args"].act == "swish"


def test_modules_of_a_real_file_are_stubs():
    checkpoint = read_torch_file(shared("mnist_tiny.pth"))
    average = checkpoint["ema"]
    assert (average.module, average.name, average.args) == ("resflows.utils", "ExponentialMovingAverage", ())
    flow = average.state["module"]
    assert str(flow) == "Stub(module='resflows.resflow', name='ResidualFlow')"
    scales = flow.state["_modules"]["transforms"]
    assert (scales.module, scales.name) == ("torch.nn.modules.container", "ModuleList")
    first = scales.state["_modules"]["0"].state["_modules"]["chain"].state["_modules"]["1"]
    assert first.state["_parameters"]["weight"] is checkpoint["state_dict"]["transforms.0.chain.1.weight"]


def test_legacy_file_equals_zip_file():
    assert_same(read_torch_file(shared("mnist_tiny_legacy.pth")), read_torch_file(shared("mnist_tiny.pth")))


def test_real_file_is_written_again(tmp_path):
    checkpoint = read_torch_file(shared("mnist_tiny.pth"))
    write_torch_file(tmp_path / "again.pth", checkpoint)
    assert_same(read_torch_file(tmp_path / "again.pth"), checkpoint)


# Files that are damaged, or something else


@pytest.mark.parametrize(
    "content",
    [b"", b"P", b"some text", b"\x89PNG\r\n\x1a\n1234", b"\x80", pickle.dumps({"a": 1}), b"PK\x03\x04", bytes(1000)],
)
def test_other_files(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pth: expected"):
        read_torch_file(str(tmp_path / "model.pth"))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.pth: expected a checkpoint"):
        read_torch_file(tmp_path / "model.pth")
    with pytest.raises(IsADirectoryError, match="got a folder"):
        read_torch_file(tmp_path)


ZIPS = {
    "missing record": ({"records": []}, "expected a record data/0"),
    "short record": ({"records": [("data/0", SIX[:-1])]}, "expected 24 bytes in the record data/0, got 23"),
    "long record": ({"records": [("data/0", SIX + b"1")]}, "expected 24 bytes in the record data/0, got 25"),
    "big-endian": ({"records": [("byteorder", b"big"), ("data/0", SIX)]}, "little-endian order, got b'big'"),
    "TorchScript": ({"records": [("constants.pkl", b""), ("data/0", SIX)]}, "TorchScript"),
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "uncompressed"),
    "two pickles": ({"records": [("more/data.pkl", b"")]}, "got 2"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_bad_zip_files(tmp_path, name):
    options, message = ZIPS[name]
    with pytest.raises(ValueError, match=rf"model\.pth: .*{message}"):
        read_torch_file(write_zip(tmp_path / "model.pth", program(tensor()), **options))


def test_zip_file_of_something_else(tmp_path):
    np.savez(tmp_path / "model.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"one record data\.pkl, got 0"):
        read_torch_file(tmp_path / "model.npz")


LEGACY = {
    "magic number": ({"head": (1, 1001, SYSTEM)}, "a pickle of something else"),
    "version": ({"head": (MAGIC, 1002, SYSTEM)}, "expected version 1001 .* got 1002"),
    "big-endian": ({"head": (MAGIC, 1001, SYSTEM | {"little_endian": False})}, "little-endian"),
    "no system": ({"head": (MAGIC, 1001, {})}, "could not read it"),
    "missing key": ({"keys": []}, "the 1 storages that"),
    "other key": ({"keys": ["1"]}, "the 1 storages that"),
    "keys": ({"keys": 1}, "could not read it"),
    "number of elements": ({"storages": [("0", 5, SIX)]}, "expected 6 elements in storage 0, got 5"),
    "short storage": ({"storages": [("0", 6, SIX[:-1])]}, "expected 24 bytes of a storage, got 23"),
}


@pytest.mark.parametrize("name", LEGACY)
def test_bad_legacy_files(tmp_path, name):
    options, message = LEGACY[name]
    with pytest.raises(ValueError, match=rf"model\.pth: .*{message}"):
        read_torch_file(write_legacy(tmp_path / "model.pth", program(tensor()), **options))


VALUE = {"a": np.arange(3.0), "n": [1, "text", Stub("resflows", "x", (), {"b": np.ones((2, 2), np.int8)})]}


@pytest.fixture(params=["zip", "legacy"])
def small_file(tmp_path, request):
    """The same value in both formats."""
    path = tmp_path / "small.pth"
    write_torch_file(path, VALUE)
    if request.param == "legacy":
        with zipfile.ZipFile(path) as archive:
            data, *arrays = (archive.read(f"archive/{name}") for name in ("data.pkl", "data/0", "data/1"))
        write_legacy(path, data, [("0", 3, arrays[0]), ("1", 4, arrays[1])])
    assert_same(read_torch_file(path), VALUE)
    return path


def test_truncated_files(small_file):
    content = small_file.read_bytes()
    for length in (*range(0, len(content), 2), len(content) - 1):
        small_file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"small\.pth: expected"):
            read_torch_file(small_file)


@pytest.mark.parametrize("file", ["mnist_tiny.pth", "mnist_tiny_legacy.pth"])
def test_truncated_real_files(tmp_path, file):
    content = shared(file).read_bytes()
    for length in [*np.linspace(5, len(content), 10, endpoint=False, dtype=int), len(content) - 1]:
        (tmp_path / file).write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{file}: expected"):
            read_torch_file(tmp_path / file)


def test_damaged_bytes(small_file):
    """Any byte changed: a ValueError, or, of a zip file with its checksums, the same value."""
    content = small_file.read_bytes()
    for n in range(len(content)):
        change = (0x01, 0x80, 0xFF)[n % 3]
        small_file.write_bytes(content[:n] + bytes([content[n] ^ change]) + content[n + 1 :])
        try:
            value = read_torch_file(small_file)
        except ValueError as error:
            assert "small.pth: " in str(error)
        else:
            if content.startswith(b"PK"):
                assert_same(value, VALUE)
