"""What is written for PyTorch is read back as it was, in the format that torch.load reads, as a whole or not at all."""

import argparse
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from resflow_jax.interop.torch import writer as torch_writer
from resflow_jax.interop.torch.files import Stub, read_torch_file
from resflow_jax.interop.torch.writer import write_torch_file
from tests.interop.torch.programs import assert_same

DTYPES = [np.dtype(code) for code in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?", "c8", "c16")]
DTYPES += [np.dtype(ml_dtypes.bfloat16)]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4), (3, 0, 2), (1, 1)])
def test_round_trip_of_arrays(tmp_path, dtype, shape):
    array = np.asarray(RNG.normal(size=shape) * 4).astype(dtype)
    write_torch_file(tmp_path / "model.pth", array)
    assert_same(read_torch_file(tmp_path / "model.pth"), array)


def test_round_trip_of_other_layouts(tmp_path):
    array = RNG.normal(size=(3, 4)).astype(np.float32)
    layouts = [
        array.T,
        array[::2, ::-1],
        array.astype(">f4"),
        np.broadcast_to(array[0], (2, 4)),
        np.asfortranarray(array),
    ]
    write_torch_file(tmp_path / "model.pth", layouts)
    for read, layout in zip(read_torch_file(tmp_path / "model.pth"), layouts, strict=True):
        assert_same(read, np.array(layout, np.float32, order="C"))


def test_round_trip_of_objects(tmp_path):
    state_dict = OrderedDict(w=np.ones(2))
    state_dict._metadata = OrderedDict({"": {"version": 1}})
    value = {
        "numbers": [0, -1, 255, 65536, 2**31, -(2**31), 2**64, -(2**3000), 1.5, float("inf"), True, False, None],
        "text": ["", "\u00e9\U0001f600", "\ud800", "x" * 300],
        "tuples": ((), (1,), (1, (2, 3), [4])),
        ("a", 1): {"x", 2},
        3: argparse.Namespace(lr=0.1, blocks="16-16"),
        "average": Stub("resflows.utils", "ExponentialMovingAverage", (), {"decay": 0.999, "w": np.zeros(3)}),
        "device": Stub("torch", "device", ("cuda", 0)),
        "class": Stub("torch.nn.modules.linear", "Linear", None),
        "state_dict": state_dict,
    }
    write_torch_file(tmp_path / "model.pth", value)
    read = read_torch_file(tmp_path / "model.pth")
    assert_same(read, value)
    assert read["state_dict"]._metadata == state_dict._metadata


def test_shared_objects_stay_shared(tmp_path):
    array, inner = np.ones(3), [1]
    stub = Stub("resflows", "x", (), {"w": array})
    stub.state["self"] = stub
    write_torch_file(tmp_path / "model.pth", [array, array, inner, inner, stub, stub, np.ones(3)])
    first, second, one, two, made, again, other = read_torch_file(tmp_path / "model.pth")
    assert first is second is made.state["w"] and other is not first
    assert one is two and made is again is made.state["self"]
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert [name for name in archive.namelist() if "/data/" in name] == ["archive/data/0", "archive/data/1"]


class Unpickler(pickle.Unpickler):
    """A check by pickle's own machine: the calls of torch are noted as tuples."""

    def find_class(self, module, name):
        if module == "torch._utils":
            return lambda *args: (name, *args)
        return name if module == "torch" else super().find_class(module, name)

    def persistent_load(self, pid):
        return pid


def test_written_file_is_as_torch_reads_it(tmp_path):
    write_torch_file(tmp_path / "model.pth", {"w": np.ones((2, 3), np.float32)})
    with zipfile.ZipFile(tmp_path / "model.pth") as archive, archive.open("archive/data.pkl") as data:
        stored = ("storage", "FloatStorage", "0", "cpu", 6)
        expected = {"w": ("_rebuild_tensor_v2", stored, 0, (2, 3), (3, 1), False, OrderedDict())}
        assert Unpickler(data).load() == expected
        assert archive.read("archive/version") == b"3\n" and archive.read("archive/byteorder") == b"little"
    content = (tmp_path / "model.pth").read_bytes()
    assert content.index(np.ones((2, 3), np.float32).tobytes()) % 64 == 0


def make(kind, **attributes):
    return type(kind, (), attributes)()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, make("Thing")]}, r"obj\['a'\]\[1\]: expected a dict, .* got .*Thing"),
        ({make("Thing"): 1}, r"obj, a key: expected"),
        ([np.float64(1.0)], r"obj\[0\]: .* got numpy.float64"),
        ([b"bytes"], r"obj\[0\]: .* got builtins.bytes"),
        (np.array(["a"]), r"obj: .* got an array of <U1"),
        (np.zeros(2, np.uint16), r"obj: .* got an array of uint16"),
        (Stub("resflows", "x", (), {"k": 1j}), r"obj\.state\['k'\]: .* got builtins.complex"),
        (Stub("resflows", "x", (1j,)), r"obj\.args\[0\]: .* got builtins.complex"),
        (Stub("resflows", "x", (), None, [1]), r"obj: .* got Stub\(.*\) with items"),
    ],
)
def test_what_cannot_be_written(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        write_torch_file(tmp_path / "model.pth", value)
    assert not list(tmp_path.iterdir())


def test_stubs_that_would_be_refused_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"refused to build 'os\.system'"):
        write_torch_file(tmp_path / "model.pth", Stub("os", "system", ("true",)))
    assert not list(tmp_path.iterdir())


def test_writing_replaces_a_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    write_torch_file(path, {"old": np.ones(3)})

    def full_disk(archive, name, data, add=torch_writer._add):
        if name == "data/0":
            raise OSError(28, "No space left on device")
        add(archive, name, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(torch_writer, "_add", full_disk)
        write_torch_file(path, {"new": np.zeros(3)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]
    assert_same(read_torch_file(path), {"old": np.ones(3)})
    write_torch_file(str(path), {"new": np.zeros(3)})
    assert_same(read_torch_file(path), {"new": np.zeros(3)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]
