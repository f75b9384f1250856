"""Files that are made to harm who reads them: sizes that no memory has, nesting without end, work without end.

Each case is a name, the name of its file and its bytes. `CASES` has them by format; they are made when they are asked
for, and no file is larger than a few MB.
"""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from flax import nnx
from safetensors.numpy import save as safetensors_bytes

import resflow_jax as rf
from experiments.configs import CONFIGS
from experiments.studies.parts.hostile_torch import HUGE, Case, N, torch_files
from resflow_jax.io.config_json import as_document, config_to_json
from resflow_jax.io.structure import classes
from resflow_jax.io.variables import flattened, split_variables
from resflow_jax.layers.lipschitz import deferred_norms


@cache
def vector_flow() -> rf.ResidualFlow:
    """A small flow."""
    with deferred_norms():
        return rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=2, hidden=(4,)), rngs=nnx.Rngs(0))


def saved(config: str | None = None, structure: str | None = None, arrays: dict | None = None, **others: str) -> bytes:
    """A file of `rf.save` with another config or structure."""
    if arrays is None:
        flat = flattened(split_variables(vector_flow()))
        arrays = {".".join(name): np.asarray(array) for name, array in flat}
    metadata = {"format": "resflow_jax", "format_version": "2", **others}
    metadata |= {"config": config} if config is not None else {}
    metadata |= {"structure": structure} if structure is not None else {}
    return safetensors_bytes(arrays, metadata)


def _configs() -> Iterator[tuple[str, dict | str]]:
    """Documents of configs of flows."""
    config = json.loads(config_to_json(vector_flow().config))
    image = json.loads(config_to_json(rf.ImageFlowConfig((8, 8, 1), (1,), 4)))
    yield "nested lists", "[" * N
    yield "nested objects", '{"a":' * N
    yield "levels of lists", json.dumps(config | {"hidden": 1}).replace("1", "[" * 900 + "]" * 900, 1)
    yield "a number of a million digits", json.dumps(config).replace("3", "9" * 1_000_000, 1)
    for name, value in (("dim", 10**30), ("dim", 2**62), ("blocks", 10**30), ("condition_dim", 10**18)):
        yield f"{name}={value}", config | {name: value}
    yield "a thousand layers", config | {"hidden": [8] * 1000}
    yield "layers of 2^40", config | {"dim": 2**40, "hidden": [2**40, 2**40]}
    yield "a long name", config | {"activation": "x" * 1_000_000}
    yield "fields with control characters", config | {f"\x1b[2J{n}": 0 for n in range(N)}
    yield "a version without end", config | {"format_version": 10**300}
    yield "a version that is a float", config | {"format_version": 1.0}
    for kind in (None, [], {}, "x", 1e308, -1, True):
        for name in ("dim", "blocks", "hidden", "between", "data", "norms", "coefficient", "activation", "densenet"):
            if not (name == "activation" and kind == "x"):
                yield f"{name}: {kind!r}", config | {name: kind, "dim": kind if name == "dim" else 999}
    for version in (0, 1, 2):
        for name in (
            "data",
            "densenet",
            "scales",
            "between",
            "shape",
            "blocks",
            "padding",
            "data_mean",
            "norms",
            "tail",
        ):
            for kind in (None, [1], 3, "x", {"type": "Padding"}, {"type": []}):
                yield f"{name}: {kind!r} of version {version}", image | {"format_version": version, name: kind}
    yield "kernels of 10^6 pixels", image | {"kernels": [999_999, 3]}
    yield "kernels without end", image | {"kernels": [3] * N}
    yield "images of 2^30 pixels a side", image | {"shape": [2**30, 2**30, 3]}
    yield "dense layers without end", image | {"densenet": {"type": "DenseNetBlocks", "depth": 10**6}}
    yield "tail without end", image | {"tail": {"type": "DenseTail", "layers": 10**6}}


def _structures() -> Iterator[tuple[str, object]]:
    """Structures of flows."""

    def layer(kind: str, **arguments: object) -> dict:
        return {"type": kind, "arguments": arguments}

    def flow(*layers: object) -> dict:
        return layer("Flow", bijector=layer("Chain", bijectors=list(layers)), base=layer("StandardNormal", shape=[3]))

    one = layer("ActNorm", shape=[3])
    yield "nested lists", "[" * N
    yield "nested objects", '{"type":' * N
    yield "layers without end", flow(*[one] * 50_000)
    yield "an ActNorm of 2^62 numbers", flow(layer("ActNorm", shape=[2**62]))
    yield "an ActNorm of 2^80 numbers", flow(layer("ActNorm", shape=[2**40, 2**40]))
    yield "an ActNorm of 10^30 numbers", flow(layer("ActNorm", shape=[10**30]))
    yield "axes without end", flow(layer("ActNorm", shape=[1] * N))
    yield "a stack without end", flow(layer("ResidualStack", step=one, depth=2**62))
    yield (
        "a stack of stacks",
        flow(layer("ResidualStack", step=layer("ResidualStack", step=one, depth=10**9), depth=10**9)),
    )
    yield "a permutation of floats", flow(layer("Permutation", order=[0.5] * N))
    yield "a permutation of 10^30", flow(layer("Permutation", order=[10**30, 0, 1]))
    yield "an array of lists", flow({"array": [[[1]], [2, [3]]], "dtype": "float32"})
    yield "an array of an unknown dtype", flow({"array": [1], "dtype": "V1000000000"})
    yield "a dtype that is a list", flow({"array": [1], "dtype": [["a", "O"]]})
    yield "a matrix of 2^62", flow(layer("InvertibleLinear", features=2**62))
    yield "a squeeze of 2^62", flow(layer("Squeeze", shape=[2**62, 2**62, 2**62]))
    for cls in sorted(classes()):
        yield f"{cls} without arguments", flow({"type": cls, "arguments": {}})
        yield f"{cls} of itself", flow({"type": cls, "arguments": {"": 1, "self": 2, "rngs": 3}})


def headers() -> Iterator[tuple[str, bytes]]:
    """Files whose header is false."""

    def with_header(header: bytes, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    yield "a header of 2^60 bytes", struct.pack("<Q", HUGE) + b"{}"
    yield "a header of 90 MB", struct.pack("<Q", 90_000_000) + b"{" * 1000
    yield "a header of nested lists", with_header(b'{"a":' + b"[" * N)
    yield (
        "arrays that overlap",
        with_header(json.dumps({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}).encode(), bytes(4)),
    )
    yield "an array of terabytes", with_header(json.dumps({"a": entry(0, 2**42, [2**40])}).encode(), bytes(4))
    yield "an array of 2^80 bytes", with_header(json.dumps({"a": entry(0, 4, [2**62, 2**62])}).encode(), bytes(4))
    yield "an unknown dtype", with_header(json.dumps({"a": entry(0, 4, [1], "X99")}).encode(), bytes(4))
    yield "one name twice", with_header(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4, [1])).encode(),) * 2), bytes(4))


def safetensors_files() -> Iterator[tuple[str, Case]]:
    """Files of `rf.save`."""
    for name, document in _configs():
        said = document if isinstance(document, str) else json.dumps(document)
        yield f"config: {name}", ("flow.safetensors", saved(config=said))
    for name, document in _structures():
        said = document if isinstance(document, str) else json.dumps(document)
        yield f"structure: {name}", ("flow.safetensors", saved(structure=said))
    for name, data in headers():
        yield name, ("flow.safetensors", data)
    right = config_to_json(vector_flow().config)
    yield "a version of 10^6 digits", ("flow.safetensors", saved(right, format_version="9" * 1_000_000))
    yield "a version of the future", ("flow.safetensors", saved(right, format_version="3", version="\x1b[2J" * N))
    names = {f"\x1b[2J.{n}" + "." * 1000: np.zeros(1, np.float32) for n in range(500)}
    yield "names with control characters", ("flow.safetensors", saved(right, arrays=names))
    outer = {
        "params.scales.0.bijectors.0.bias": np.zeros((40_000, 1), np.float32),
        "params.scales.0.bijectors.0.log_scale": np.zeros((1, 40_000), np.float32),
    }
    yield "an outer product", ("flow.safetensors", saved(right, arrays=outer))


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A .npy file with any header."""
    text_ = header.encode()
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text_))
    return b"\x93NUMPY" + version + length + text_ + data


def array_files() -> Iterator[tuple[str, Case]]:
    """Files of arrays."""
    shape = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}\n".format
    heads = {
        "a terabyte": shape("'<f8'", (2**37,)),
        "2^80 numbers": shape("'<f8'", (2**40, 2**40)),
        "a negative size": shape("'<f8'", (-5, 3)),
        "sizes whose product wraps": shape("'<f8'", (2**32, 2**32)),
        "items of 1 GB": shape("'V1000000000'", (2000,)),
        "objects": shape("'|O'", (3,)),
        "a nested dtype": shape("[" * 4000, (3,)),
        "nested sizes": shape("'<f8'", "(" * 4000),
        "a size of 10^1000": shape("'<f8'", f"({10**1000},)"),
        "code": shape("__import__('os').system('true')", (3,)),
    }
    for name, head in heads.items():
        yield f".npy, {name}", ("x.npy", npy(head, bytes(100)))
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("train.npy", npy(head, bytes(100)))
        yield f".npz, {name}", ("x.npz", out.getvalue())
    yield ".npy, a header of 4 GB", ("x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", npy(shape("'<f8'", (50_000_000,)), bytes(400_000_000)))
    yield ".npz, 400 MB of zeros", ("x.npz", out.getvalue())
    lie = bytearray(out.getvalue())
    at = lie.rindex(b"PK\x01\x02")
    lie[at + 24 : at + 28] = struct.pack("<I", 4_000_000_000)
    yield ".npz, 4 GB in the directory", ("x.npz", bytes(lie))


def image_files() -> Iterator[tuple[str, Case]]:
    """IDX files."""

    def idx(*sizes: int, data: bytes = b"") -> bytes:
        return bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + data

    most = 2**32 - 1
    for name, data in {
        "2^96 pixels": idx(most, most, most, data=bytes(100)),
        "no image of 2^64 pixels": idx(0, most, most, data=bytes(100)),
        "4 GB": idx(1000, 2000, 2000, data=bytes(100)),
        "another number": idx(10, 5, 5, data=bytes(249)),
        "more than it says": idx(10, 5, 5, data=bytes(20_000_000)),
    }.items():
        yield f"IDX, {name}", ("images.idx", data)
        yield f"IDX compressed, {name}", ("images.idx.gz", gzip.compress(data))


def work_directories() -> Iterator[tuple[str, Case]]:
    """The config.json of a run, which `saved_config` reads."""
    run = as_document(CONFIGS["digits"])
    yield "no JSON", ("config.json", b"\xff\xfe{")
    yield "a null", ("config.json", b"null")
    for name, document in _configs():
        if isinstance(document, str):
            yield name, ("config.json", document.encode())
    for name, value in {
        "steps": 10**30,
        "batch_size": 2**8000,
        "seed": -1,
        "data": {"type": "DataConfig", "name": ["x"]},
        "optimizer": {"type": "OptimizerConfig", "milestones": ["a"]},
        "estimator": {"type": "Roulette", "length": {"type": "Poisson", "rate": "x" * 1_000_000}},
        "evaluation": None,
        "workdir": 3,
        "\x1b[2J": 3,
        "parallel": [[]],
        "mesh": {"type": "os.system"},
        "distributed": {"type": "DistributedConfig", "coordinator": 3, "num_processes": "x", "process_id": []},
    }.items():
        yield f"{name!r}: {value!r:.30}", ("config.json", json.dumps(run | {name: value}).encode())


CASES: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "torch": torch_files,
    "safetensors": safetensors_files,
    "arrays": array_files,
    "images": image_files,
    "config.json": work_directories,
}
