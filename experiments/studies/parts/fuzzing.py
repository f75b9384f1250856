"""Fuzzing of one reader: mutations of whole files, each of which has to be read, or refused with the file's name.

    python -m experiments.studies.parts.fuzzing READER SECONDS SEED DIRECTORY

It runs in a process of its own. With atheris (`pip install .[fuzz]`) the mutations are guided by the branches that they
reach; without it they are random. The first input of each fault is written to
DIRECTORY, with result.json: the number of inputs, the faults, and whether the mutations were guided.
"""

import contextlib
import hashlib
import io
import json
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

RESULT = "result.json"
SECONDS = 30  # for one input
INSTRUMENTED = ["resflow_jax.interop.torch", "resflow_jax.io", "resflow_jax.data", "experiments.runs.saved"]
_TOKENS = (b"\0" * 8, b"\xff" * 8, b"9" * 30, b"-1", b"1e999", b"[" * 300, b"null", b"NaN", b'""', b"{}", b"[]")
_EXPECTED = (ValueError, OSError)  # of a file that is refused


class Reader(NamedTuple):
    """What is fuzzed.

    Attributes:
      name: name of the file.
      read: reads a file.
      wrap: from what is mutated to the bytes of a file.
      seeds: makes what is mutated first.
    """

    name: str
    read: Callable[[Path], Any]
    wrap: Callable[[bytes], bytes]
    seeds: Callable[[], list[bytes]]


def _same(data: bytes) -> bytes:
    return data


def readers() -> dict[str, Reader]:
    """The readers by name. Where a file has checksums, its inner part is mutated too."""
    import numpy as np

    import resflow_jax as rf
    from experiments.configs import CONFIGS
    from experiments.runs.saved import saved_config
    from experiments.studies.parts import hostile_files as files
    from experiments.studies.parts import hostile_torch as torch
    from resflow_jax.data.files import load_path
    from resflow_jax.data.vectors import load_vectors
    from resflow_jax.io.config_json import as_document, config_to_json
    from resflow_jax.io.structure import describe

    def pickles() -> list[bytes]:
        archive = torch.zipfile.ZipFile(io.BytesIO(torch.torch_bytes(torch.torch_content(False))))
        return [archive.read("archive/data.pkl"), torch.program(torch.tensor((2, 3), (3, 1)))]

    def arrays(save: Callable[..., None]) -> bytes:
        file = io.BytesIO()
        save(file, np.arange(60.0).reshape(30, 2))
        return file.getvalue()

    def in_zip(data: bytes) -> bytes:
        return torch.torch_zip(data, {f"data/{n}": bytes(24) for n in range(3)})

    def text(make: Callable[[str], bytes]) -> Callable[[bytes], bytes]:
        return lambda data: make(data.decode("utf-8", "replace"))

    def load_torch(path: Path) -> rf.ResidualFlow:
        return rf.load_torch_checkpoint(path, norms="stored")  # no power iteration, which would take all the time

    image = rf.ImageFlowConfig((8, 8, 1), (1,), 4)
    configs = [config_to_json(config).encode() for config in (files.vector_flow().config, image)]
    layers = [rf.ActNorm((3,)), rf.Permutation((2, 0, 1)), rf.Logit(0.1)]
    structure = json.dumps(describe(rf.Flow(rf.Chain(layers), rf.StandardNormal((3,)))), allow_nan=False)
    idx = bytes([0, 0, 8, 3, 0, 0, 0, 30, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(120)
    run = json.dumps(as_document(CONFIGS["digits"])).encode()
    return {
        "torch": Reader(
            "m.pth", rf.load_torch_checkpoint, _same, lambda: [torch.torch_bytes(torch.torch_content(False))]
        ),
        "pickle": Reader("m.pth", rf.load_torch_checkpoint, in_zip, pickles),
        "safetensors": Reader("a.safetensors", rf.load, _same, lambda: [files.saved(configs[0].decode())]),
        "config": Reader("a.safetensors", rf.load, text(lambda t: files.saved(config=t)), lambda: configs),
        "structure": Reader(
            "a.safetensors", rf.load, text(lambda t: files.saved(structure=t)), lambda: [structure.encode()]
        ),
        "npy": Reader("x.npy", load_vectors, _same, lambda: [arrays(np.save)]),
        "npz": Reader("x.npz", load_vectors, _same, lambda: [arrays(np.savez), arrays(np.savez_compressed)]),
        "csv": Reader("x.csv", load_vectors, _same, lambda: [b"a,b\n" + b"1.5,2\n-3,4e1\n" * 15]),
        "idx": Reader("images.idx", load_path, _same, lambda: [idx, files.gzip.compress(idx)]),
        "run": Reader("config.json", lambda path: saved_config(path.parent), _same, lambda: [run]),
    }


class Target:
    """Reads inputs, and keeps the first of each kind of fault."""

    def __init__(self, reader: Reader, directory: Path, scratch: Path, guided: bool):
        self.reader, self.directory, self.path = reader, directory, scratch / reader.name
        self.guided, self.inputs, self.written = guided, 0, time.monotonic()
        self.faults: dict[str, str] = {}

    def __call__(self, data: bytes) -> None:
        self.inputs += 1
        fault = self._fault(data)
        if fault is not None and fault not in self.faults:
            path = self.directory / hashlib.sha256(data).hexdigest()[:16]
            path.write_bytes(data)
            self.faults[fault] = str(path)
            self.write()
        if time.monotonic() > self.written + 1:
            self.write()

    def write(self) -> None:
        """Writes what is known, now and then, because libFuzzer ends the process without a word to Python."""
        result = {"inputs": self.inputs, "faults": self.faults, "guided": self.guided}
        (self.directory / RESULT).write_text(json.dumps(result))
        self.written = time.monotonic()

    def _fault(self, data: bytes) -> str | None:
        """What is wrong with the answer to an input; None if nothing is."""
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(None):
                warnings.simplefilter("ignore")
                self.path.write_bytes(self.reader.wrap(data))
                self.reader.read(self.path)
        except _EXPECTED as error:
            where = _place(error)
            if str(self.path) not in str(error):
                return f"{type(error).__name__} without the name of the file: {str(error)[:100]!r} {where}"
            if len(str(error)) > 5000 or not str(error).replace("\n", "").isprintable():
                return f"an error that is long or has control characters {where}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:100]!r} {_place(error)}"
        return None


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(last.filename).name}:{last.lineno})"


def random_inputs(seeds: list[bytes], seed: int) -> Iterator[bytes]:
    """Files with some bytes changed, cut, repeated, or replaced by those of another file."""
    import numpy as np

    rng = np.random.default_rng(seed)
    yield from seeds
    while True:
        data = seeds[rng.integers(len(seeds))]
        for _ in range(rng.integers(1, 6)):
            start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
            few, other = int(rng.integers(1, 9)), seeds[rng.integers(len(seeds))]
            parts = (
                rng.bytes(few),
                b"",
                data[start:end][:200],
                _TOKENS[rng.integers(len(_TOKENS))],
                other[start:][:200],
            )
            rest = int(rng.choice([start, start + few, end]))
            data = data[:start] + parts[rng.integers(len(parts))] + data[rest:]
        yield data


def run_random(target: Target, seconds: float, seed: int) -> None:
    """Random mutations for some seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError("not done in time")

    signal.signal(signal.SIGALRM, stop)
    until = time.monotonic() + seconds
    for data in random_inputs(target.reader.seeds(), seed):
        signal.alarm(SECONDS)
        target(data)
        signal.alarm(0)
        if time.monotonic() > until:
            return


def run_guided(target: Target, seconds: float, seed: int, scratch: Path) -> None:
    """Mutations guided by atheris for some seconds. It ends the process; an endless input ends it before."""
    import atheris

    corpus = scratch / "corpus"
    corpus.mkdir()
    for n, data in enumerate(target.reader.seeds()):
        (corpus / str(n)).write_bytes(data)
    flags = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", f"-timeout={SECONDS}", "-rss_limit_mb=6000"]
    flags += [f"-artifact_prefix={target.directory}/", "-max_len=20000", "-print_final_stats=0", "-verbosity=0"]
    atheris.Setup(["fuzz", *flags, str(corpus)], target)
    atheris.Fuzz()


def main() -> None:
    """Fuzzes one reader."""
    name, seconds, seed, directory = sys.argv[1:]
    guided = find_spec("atheris") is not None
    if guided:
        import atheris

        with atheris.instrument_imports(include=INSTRUMENTED):
            found = readers()
    else:
        found = readers()
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        target = Target(found[name], Path(directory), Path(scratch), guided)
        if guided:
            run_guided(target, float(seconds), int(seed), Path(scratch))
        else:
            run_random(target, float(seconds), int(seed))
            target.write()


if __name__ == "__main__":
    main()
