"""Pickles in files of PyTorch: their values are read, and nothing in them is executed."""

import argparse
import os
import pickle
import struct
import sys
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from resflow_jax.interop.torch.files import Stub, read_torch_file
from tests.interop.torch.programs import (
    MAGIC,
    SIX,
    SYSTEM,
    assert_same,
    call,
    literal,
    named,
    program,
    storage,
    tensor,
    write_legacy,
    write_zip,
)

WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


# Values in files


@WRITERS
def test_parts_of_a_storage(tmp_path, write):
    """Offsets, transposed and repeated rows; each array owns its elements, the same part is one array."""
    parts = [
        tensor(),
        tensor(1, (2, 2), (1, 2)),
        tensor(2, (4, 3), (0, 1)),
        tensor(5, (), ()),
        tensor(6, (0, 2), (2, 1)),
    ]
    values = read_torch_file(write(tmp_path / "model.pth", program(b"(", *parts, tensor(), b"t")))
    row = np.arange(6, dtype=np.float32)
    expected = [row.reshape(2, 3), [[1, 3], [2, 4]], np.tile(row[2:5], (4, 1)), np.float32(5), np.zeros((0, 2))]
    for value, wanted in zip(values, expected, strict=False):
        np.testing.assert_array_equal(value, wanted)
        assert value.flags.owndata and value.dtype == np.float32
    assert values[-1] is values[0]


def read_value(tmp_path, *parts, records=()):
    return read_torch_file(write_zip(tmp_path / "model.pth", program(*parts), records))


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_plain_data(tmp_path, core):
    float64 = call("numpy", "dtype", ("f8", False, True)) + literal((3, "<", None, None, None, -1, -1, 0)) + b"b"
    number = named(f"{core}.multiarray", "scalar") + b"(" + float64
    number += call("_codecs", "encode", (struct.pack("<d", 2.5).decode("latin1"), "latin1")) + b"tR"
    assert_same(read_value(tmp_path, number), np.float64(2.5))
    assert_same(read_value(tmp_path, call("__builtin__", "set", ([1, "a"],))), {1, "a"})
    assert_same(read_value(tmp_path, call("builtins", "frozenset", ([1],))), frozenset([1]))
    assert_same(read_value(tmp_path, call("__builtin__", "bytes", ())), b"")
    assert_same(read_value(tmp_path, call("torch", "Size", ((2, 3),))), (2, 3))
    assert_same(read_value(tmp_path, named("torch", "bfloat16")), np.dtype(ml_dtypes.bfloat16))
    pairs = call("collections", "OrderedDict", ([["b", 1], ["a", 2]],))
    assert_same(read_value(tmp_path, pairs), OrderedDict(b=1, a=2))
    state_dict = read_value(tmp_path, pairs, literal({"_metadata": {"": 1}}), b"b")
    assert state_dict._metadata == {"": 1}
    namespace = named("argparse", "Namespace") + b")\x81" + literal({"lr": 0.1}) + b"b"
    assert_same(read_value(tmp_path, namespace), argparse.Namespace(lr=0.1))
    reconstructed = named("copy_reg", "_reconstructor") + b"(" + named("argparse", "Namespace")
    reconstructed += named("__builtin__", "object") + b"NtR" + literal({"lr": 0.1}) + b"b"
    assert_same(read_value(tmp_path, reconstructed), argparse.Namespace(lr=0.1))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path, protocol):
    shared_list = [1, 2.5, None, True, "\u00e9", 2**40, -(2**3000)]
    value = {
        "a": (shared_list, {"b", 1}),
        2: OrderedDict(x=b"ab\xff"),
        "c": [shared_list, frozenset("a")],
        "d": (1,) * 9,
    }
    data = pickle.dumps(value, protocol)
    for write in (write_zip, write_legacy):
        args = [()] if write is write_legacy else []
        read = read_torch_file(write(tmp_path / "model.pth", data, *args))
        assert_same(read, value)
        assert read["a"][0] is read["c"][0]


def test_stubs_take_anything(tmp_path):
    """A file may call a class, make it, or give it a state, items or attributes with names of Python's."""
    kind = named("resflows.x", "Y")
    assert_same(read_value(tmp_path, kind), Stub("resflows.x", "Y", None))
    assert_same(read_value(tmp_path, kind, literal((1, "a")), b"R"), Stub("resflows.x", "Y", (1, "a")))
    state = {"__class__": 1, "__dict__": 2, "args": 3, "__setstate__": 4}
    made = read_value(tmp_path, kind, b")\x81", literal(state), b"b")
    assert_same(made, Stub("resflows.x", "Y", (), state))
    assert type(made) is Stub
    pairs = b"(" + literal("k") + literal(1) + b"u" + literal("l") + literal(2) + b"s"
    assert read_value(tmp_path, kind, b")\x81", pairs).items == [("k", 1), ("l", 2)]
    assert read_value(tmp_path, kind, b")\x81(", literal(1), b"e", literal(2), b"a").items == [1, 2]


def test_the_package_before_it_was_renamed(tmp_path):
    """The authors' classes were in `lib` when their models were released."""
    ema = named("lib.utils", "ExponentialMovingAverage") + b")\x81" + literal({"decay": 0.999}) + b"b"
    assert_same(read_value(tmp_path, ema), Stub("lib.utils", "ExponentialMovingAverage", (), {"decay": 0.999}))
    with pytest.raises(ValueError, match=r"refused to build 'library\.x'"):
        read_value(tmp_path, named("library", "x"))


def test_objects_that_grow_without_end(tmp_path):
    """Files of a few kB that expand: many large tensors of one repeated number, and many copies of one long text."""
    expanded = [tensor(0, (2**24 - n,), (0,)) for n in range(3)]
    text = literal("x" * 2**16) + b"q\x07" + b"0"  # into the memo
    copies = [named("_codecs", "encode") + b"(h\x07" + literal("latin1") + b"tR" for _ in range(2**12)]
    for parts in (expanded, [text, *copies]):
        with pytest.raises(ValueError, match="expected objects about as large as the file"):
            read_value(tmp_path, b"(", *parts, b"t", records=[("data/0", SIX)])


def test_nothing_is_imported(tmp_path, monkeypatch):
    """Nothing is imported, not even an installed package of that name."""
    package = tmp_path / "resflows"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    read_value(tmp_path, named("resflows", "Y") + b")\x81")
    assert "resflows" not in sys.modules and not (tmp_path / "imported").exists()


# Forbidden actions

ATTACKS = {
    "os.system": lambda command, _: call("os", "system", (command,)),
    "posix.system": lambda command, _: call("posix", "system", (command,)),
    "subprocess.Popen": lambda command, _: call(
        "subprocess", "Popen", (command, -1, None, None, None, None, None, True)
    ),
    "builtins.eval": lambda _, code: call("__builtin__", "eval", (code,)),
    "builtins.exec": lambda _, code: call("builtins", "exec", (code,)),
    "builtins.getattr": lambda *_: (
        named("__builtin__", "getattr") + b"(" + named("resflows", "x") + literal("y") + b"tR"
    ),
    "builtins.open": lambda *_: call("builtins", "open", ("x", "w")),
    "resflows.x.__class__.__init__.__globals__": lambda *_: named("resflows.x", "__class__.__init__.__globals__"),
    "resflows.__builtins__": lambda *_: named("resflows", "__builtins__"),
    "resflows.utils.os.system": lambda *_: named("resflows.utils", "os.system"),
    "resflows_evil.x": lambda *_: named("resflows_evil", "x"),
    "resflow_jax.load": lambda *_: named("resflow_jax", "load"),
    "torch.load": lambda *_: named("torch", "load"),
    "torch.nnx.x": lambda *_: named("torch.nnx", "x"),
    "torch.storage._load_from_bytes": lambda *_: call("torch.storage", "_load_from_bytes", (b"x",)),
    "numpy.load": lambda *_: call("numpy", "load", ("x",)),
    "functools.partial": lambda *_: named("functools", "partial"),
    "copyreg.__newobj__": lambda *_: named("copy_reg", "__newobj__"),
}


@WRITERS
@pytest.mark.parametrize("name", ATTACKS)
def test_code_is_refused(tmp_path, write, name):
    target = tmp_path / "written"
    attack = ATTACKS[name](f"touch {target}", f"__import__('pathlib').Path({str(target)!r}).touch()")
    path = write(tmp_path / "model.pth", program(b"]", tensor(), b"a", attack, b"a"))
    with pytest.raises(ValueError, match=rf"model\.pth: refused to build '{name}'"):
        read_torch_file(path)
    assert not target.exists()


def test_the_attacks_are_real(tmp_path):
    """pickle.loads executes what is refused here."""
    target = tmp_path / "written"
    pickle.loads(program(ATTACKS["builtins.eval"]("", f"__import__('pathlib').Path({str(target)!r}).touch()")))
    assert target.exists()


@pytest.mark.parametrize("where", range(4))
def test_code_in_other_pickles_of_a_legacy_file(tmp_path, where):
    attack = program(ATTACKS["os.system"](f"touch {tmp_path / 'written'}", ""))
    parts = [pickle.dumps(entry, 2) for entry in (MAGIC, 1001, SYSTEM)] + [program(tensor())]
    (tmp_path / "model.pth").write_bytes(b"".join([*parts[:where], attack, *parts[where:]]))
    with pytest.raises(ValueError, match=r"refused to build 'os\.system'"):
        read_torch_file(tmp_path / "model.pth")
    assert not (tmp_path / "written").exists()


class Reduced:
    """Pickled as a call, by pickle itself."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_calls_as_pickle_writes_them(tmp_path, protocol):
    data = pickle.dumps({"w": Reduced(os.system, (f"touch {tmp_path / 'written'}",))}, protocol)
    with pytest.raises(ValueError, match=r"refused to build|in it"):
        read_torch_file(write_zip(tmp_path / "model.pth", data))
    assert not (tmp_path / "written").exists()


OBJECTS_WITHOUT_ATTRIBUTES = {
    "class": named("collections", "OrderedDict"),
    "stub of a class": named("resflows.x", "Y"),
    "function": named("torch._utils", "_rebuild_tensor_v2"),
    "array": tensor(),
    "storage": storage(),
    "dtype": named("torch", "float32"),
    "OrderedDict": call("collections", "OrderedDict", ()),
    "list": b"]",
    "dict": b"}",
    "set": call("builtins", "set", ()),
    "tuple": literal((1, 2)),
}


@pytest.mark.parametrize("state", [{"items": 1}, (None, {"items": 1}), (1, (), None, False, [])])
@pytest.mark.parametrize("target", OBJECTS_WITHOUT_ATTRIBUTES)
def test_attributes_cannot_be_set(tmp_path, target, state):
    """... on what is shared between files or has methods to lose; and a later file is read as ever."""
    parts = [OBJECTS_WITHOUT_ATTRIBUTES[target], literal(state), b"b"]
    with pytest.raises(ValueError, match="has attributes"):
        read_value(tmp_path, *parts, records=[("data/0", SIX)])
    assert_same(read_value(tmp_path, call("collections", "OrderedDict", ([("a", 1)],))), OrderedDict(a=1))
    assert_same(read_value(tmp_path, OBJECTS_WITHOUT_ATTRIBUTES["stub of a class"]), Stub("resflows.x", "Y", None))


FLOAT = named("torch", "float32")
BAD_OBJECTS = {
    "past the end": (tensor(1), "within the 6 elements"),
    "stride past the end": (tensor(0, (2, 3), (4, 1)), "within the 6 elements"),
    "huge": (tensor(0, (2**62, 2**62), (2**62, 2**62)), "within the 6 elements"),
    "expanded": (tensor(0, (2**20, 2**20), (0, 0)), "no larger than its storage"),
    "negative stride": (tensor(5, (6,), (-1,)), "strides of a tensor that are integers of at least 0, got -1"),
    "negative offset": (tensor(-1), "offset of a tensor that are integers of at least 0, got -1"),
    "negative size": (tensor(0, (-1, 3)), "sizes of a tensor that are integers of at least 0, got -1, 3"),
    "size of floats": (tensor(0, (2.0, 3)), "sizes of a tensor that are integers"),
    "size of booleans": (tensor(0, (True, 3)), "sizes of a tensor that are integers"),
    "list of sizes": (tensor(0, [2, 3]), "got a list"),
    "sizes without strides": (tensor(0, (2, 3), (1,)), "as many strides as sizes"),
    "axes": (tensor(0, (1,) * 100, (0,) * 100), "damaged"),
    "no storage": (tensor(stored=literal(3)), "in a storage of numbers, got one of 3"),
    "conjugate": (tensor(more=literal({"conj": True})), "with flags"),
    "unknown storage": (tensor(stored=storage(kind="Size")), "a storage of numbers"),
    "negative storage": (tensor(stored=storage(-1)), "no longer than"),
    "huge storage": (tensor(stored=storage(2**60)), "no longer than"),
    "storage of two dtypes": (
        b"(" + tensor() + tensor(stored=storage(kind="IntStorage")) + b"t",
        "one dtype and length",
    ),
    "storage with a view": (tensor(stored=storage(more=literal(("1", 0, 1)))), "got a reference"),
    "reference": (literal("storage") + b"Q", "got a reference to 'storage'"),
    "bare storage": (storage(), "not part of a tensor"),
    "call of a number": (literal(1) + literal(()) + b"R", "expected a class or a function"),
    "call of an array": (tensor() + literal(()) + b"R", "expected a class or a function"),
    "made from a list": (named("resflows", "x") + literal([]) + b"\x81", "tuple of arguments"),
    "wrong arguments": (call("torch._utils", "_rebuild_tensor_v2", (1,)), "damaged"),
    "text as bytes": (call("_codecs", "encode", ("a", "rot13")), "latin1"),
    "parameter": (call("torch._utils", "_rebuild_parameter", (1, True, None)), "tensor of a parameter"),
    "number of bytes": (call("numpy.core.multiarray", "scalar", (1, "x")), "expected a number of numpy"),
    "dtype of objects": (call("numpy", "dtype", ("O8", False, True)), "dtype of numbers, got 'O8'"),
    "dtype of fields": (call("numpy", "dtype", ("f4,f4", False, True)), "dtype of numbers"),
    "big-endian dtype": (FLOAT + literal((3, ">", None)) + b"b", "has attributes"),
    "key": (b"}" + literal([]) + literal(1) + b"s", "keys that are strings"),
    "nested key": (b"}" + literal(((1,),)) + literal(1) + b"s", "keys that are strings"),
    "element": (call("builtins", "set", ([[]],)), "keys that are strings"),
    "set of a word": (call("builtins", "set", ("ab",)), "a list of elements"),
    "append to a tuple": (b")" + literal(1) + b"a", "a list to append to"),
    "item of a list": (b"]" + literal(1) + literal(1) + b"s", "a dict to set items of"),
    "half an item": (b"}(" + literal(1) + b"u", "damaged"),
    "two objects": (literal(1) + literal(2), "damaged"),
    "no object": (b"", "damaged"),
    "missing mark": (b"t", "damaged"),
    "left mark": (b"(" + literal(1), "mark"),
    "nothing to pop": (b"\x87", "lacks 3 objects"),
    "memo": (b"h\x07", "damaged"),
    "extension": (b"\x82\x01", "got EXT1 1"),
    "old instance": (b"(ios\nsystem\n", "got INST 'os system'"),
    "not an instruction": (b"\xff", "damaged"),
    "names that are no text": (literal(1) + literal(2) + b"\x93", "names of classes"),
}


@WRITERS
@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_bad_objects(tmp_path, write, name):
    parts, message = BAD_OBJECTS[name]
    with pytest.raises(ValueError, match=rf"model\.pth: .*{message}"):
        read_torch_file(write(tmp_path / "model.pth", program(parts)))
