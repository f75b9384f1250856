"""Files of PyTorch that are made to harm who reads them, as bytes: pickles, zip archives, and options of training.

None is larger than a few MB. `torch_files` yields the name of each case, the name of its file, and its bytes.
"""

import io
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.torch.checkpoints import save_torch_checkpoint
from resflow_jax.interop.torch.files import read_torch_file
from resflow_jax.interop.torch.objects import Stub
from resflow_jax.interop.torch.writer import write_torch_file
from resflow_jax.layers.lipschitz import deferred_norms

Case = tuple[str, bytes]

N = 100_000  # repetitions
HUGE = 2**60
LONG = 100_000  # bytes; the same code interprets both formats, so longer pickles are tried in the present one alone
SIX = np.arange(6, dtype=np.float32)


def text(value: str) -> bytes:
    """The instruction of a pickle that pushes a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """The instruction that pushes an integer of any size."""
    return pickle.dumps(value, 2)[2:-1]


def program(*parts: bytes) -> bytes:
    """A pickle of these instructions."""
    return b"\x80\x02" + b"".join(parts) + b"."


def named(module: str, name: str) -> bytes:
    """The instruction that pushes a class or a function."""
    return f"c{module}\n{name}\n".encode()


def storage(length: int, key: str = "0") -> bytes:
    """The instructions for a storage of floats."""
    return b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu") + number(length) + b"tQ"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], length: int = 6, offset: int = 0, key: str = "0") -> bytes:
    """The instructions for a tensor of a storage."""
    where = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    made = storage(length, key) + number(offset) + where + b"\x89N"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + made + b"tR"


def torch_zip(data: bytes, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file in the present format of PyTorch."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in {"data.pkl": data, **records}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def _pickles() -> Iterator[tuple[str, bytes]]:
    keep, get = b"q\x01", b"h\x01"
    yield "an empty set for every byte", program(b"(", b"\x8f" * 1_000_000, b"t")
    yield "a mark for every byte", program(b"(" * 2_500_000)
    yield "lists in lists in lists", program(b"]" * 300_000, b"a" * 299_999)
    colliding = [b"(" + number(a) + number(b) + b"t" + number(0) for a, b in zip(range(N), range(N), strict=True)]
    yield "tuples as keys", program(b"}(", *colliding, b"u")
    long = b"\x8b" + struct.pack("<I", 500_000) + b"\x7f" * 500_000
    yield "a long number as key again and again", program(b"}", long, keep, b"0", (get + b"Ns") * N)
    many = b"(" + number(1) * N + b"t"
    yield "a long tuple as key again and again", program(b"}", many, keep, b"0", (get + b"Ns") * N)
    yield "one key for ever", program(b"}", (text("a") + b"Ns") * N)
    state = b"}(" + b"".join(text(f"k{n}") + b"N" for n in range(30_000)) + b"u"
    build = named("argparse", "Namespace") + b")R" + state + keep + b"b"
    yield "attributes set again and again", program(build, (get + b"b") * N)
    pushed = b"](" + number(1) * N + b"e"
    yield "sets of a long list", program(pushed, keep, b"0](", (named("builtins", "set") + get + b"\x85R") * 2000, b"e")
    module = text("torch.nn" + ".x" * 200_000)
    yield "a long name looked up again and again", program(module, keep, b"0", (get + get + b"\x930") * N)
    yield "an unknown instruction", program(b"\xff")
    yield "an instance of a class", program(b"(ios\nsystem\n")
    yield "a call of the shell", program(named("os", "system"), b"(", text("true"), b"tR")
    yield "a name of the interpreter", program(named("builtins", "eval"), b"(", text("1"), b"tR")
    yield "a text of 2^60 bytes", program(b"\x8d" + struct.pack("<Q", HUGE) + b"x")
    yield "an integer of 2^31 bytes", program(b"\x8b" + struct.pack("<I", 2**31 - 1) + b"x")
    yield "tensors of one number", program(b"(", *(tensor((2**24 - n,), (0,)) for n in range(40)), b"t")
    yield "a tensor beyond its storage", program(tensor((2, 3), (4, 1)))
    yield "a tensor of 2^80 numbers", program(tensor((2**40, 2**40), (2**40, 1)))
    yield "a storage of 2^60 numbers", program(tensor((6,), (1,), length=HUGE))
    yield "overlapping tensors", program(b"(", *(tensor((2, 3), (n % 2, 1), offset=n % 3) for n in range(20_000)), b"t")


def overlapping_records() -> bytes:
    """Many names in a zip archive for the same megabyte."""
    out, body = io.BytesIO(), bytes(2**20)
    parts = [tensor((1,), (1,), 2**18, key=str(n)) for n in range(3000)]
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", program(b"(", *parts, b"t"))
        archive.writestr("archive/data/0", body)
        first = archive.infolist()[-1]
        for n in range(1, 3000):
            again = zipfile.ZipInfo(f"archive/data/{n}")
            for name in ("header_offset", "CRC", "compress_size", "file_size", "compress_type", "orig_filename"):
                setattr(again, name, getattr(first, name))
            again.orig_filename = again.filename
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    return out.getvalue()


@cache
def torch_content(image: bool) -> dict:
    """What a small file of the authors' scripts holds."""
    small = {"preactivation": "all", "coefficient": 0.9}
    sizes = {"blocks": (1,), "hidden_channels": 4, "kernels": (3, 3), "tail": rf.DenseTail(0)}
    config = rf.ImageFlowConfig((8, 8, 1), **sizes, **small) if image else rf.VectorFlowConfig(2, 2, (4,), **small)
    with deferred_norms():
        flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as directory:
        save_torch_checkpoint(flow, Path(directory) / "m.pth")
        return read_torch_file(Path(directory) / "m.pth")


def torch_bytes(content: dict) -> bytes:
    """The bytes of a file."""
    with tempfile.TemporaryDirectory() as directory:
        write_torch_file(Path(directory) / "m.pth", content)
        return (Path(directory) / "m.pth").read_bytes()


def nested(levels: int = 13) -> list:
    """A list of lists of lists, each ten times the same: 10^levels numbers, in a file of a few hundred bytes."""
    value: list = [1] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


OPTIONS = [
    *(("padding", 10**9), ("idim", 10**12), ("idim", 2**8000), ("imagesize", 4096)),
    *(("imagesize", 10**12), ("kernels", "999999-1-3"), ("kernels", "3-" * N + "3"), ("kernels", "9" * 5000)),
    *(("nblocks", "999999"), ("nblocks", "1-" * N + "1"), ("vnorms", "2" * N), ("act", "x" * 1_000_000)),
    *(("coeff", float("nan")), ("n_samples", 10**30), ("task", "hybrid")),
]
VECTOR_OPTIONS = [("nblocks", 10**9), ("dims", "9-" * N + "9"), ("dims", "999999999")]
NESTED = ("wd", "lr", "optimizer", "task", "data", "act", "idim", "kernels", "actnorm", "n_dist", "nblocks", "coeff")


def _options() -> Iterator[tuple[str, bytes]]:
    def written(image: bool, name: str, value: object) -> bytes:
        content = torch_content(image)
        args = type(content["args"])(**vars(content["args"]) | {name: value})
        return torch_bytes({**content, "args": args})

    for image, options in ((True, OPTIONS), (False, VECTOR_OPTIONS)):
        for name, value in options:
            yield f"{name}={value!r:.20} of {'images' if image else 'vectors'}", written(image, name, value)
    for name in NESTED:
        if name in ("wd", "lr", "optimizer"):
            continue  # these matter to `import_torch` alone
        yield f"{name}, nested", written(True, name, nested())
        yield f"{name}, an array", written(True, name, np.zeros(3, np.float32))
    content = torch_content(False)
    tensors = dict(content["state_dict"])
    yield "many tensors", torch_bytes({**content, "state_dict": tensors | {f"\x1b[2J{n}": SIX for n in range(999)}})
    yield "average of another kind", torch_bytes({**content, "ema": Stub("resflows.utils", "E", (), {"x": nested()})})


def torch_files() -> Iterator[tuple[str, Case]]:
    """Files of PyTorch."""
    for name, data in _pickles():
        yield name, ("m.pth", torch_zip(data, {"data/0": SIX.tobytes()}))
        if len(data) > LONG:
            continue
        head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        yield (
            f"{name}, format before 1.6",
            ("m.pth", head + data + pickle.dumps(["0"], 2) + struct.pack("<q", 6) + SIX.tobytes()),
        )
    for name, data in _options():
        yield name, ("m.pth", data)
    yield "records that overlap", ("m.pth", overlapping_records())
    yield "compressed zeros", ("m.pth", torch_zip(bytes(100_000_000), {}, zipfile.ZIP_DEFLATED))
