"""Whether hostile files are refused: with their name, within seconds, and within a small multiple of their size.

The cases are those of `hostile_files`. They are read in a process of its own, whose address space is limited, so that a
reader that asks for more memory than any machine has fails there alone.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 20  # of a processor for one file, so that it does not matter what else the machine does
TIMES = 16  # memory, as a multiple of the file's size ...
BYTES = 2**28  # ... and beyond that
_SPACE = 2**32  # address space of the process, beyond what the libraries take


class Row(NamedTuple):
    """One file.

    Attributes:
      case: what it has.
      answer: the error, or what was read.
      ok: whether it was refused as it should be.
    """

    case: str
    answer: str
    ok: bool


def files_campaign(directory: Path, formats: tuple[str, ...] = ()) -> list[Row]:
    """Reads every hostile file of some formats, by default all, in a process of its own.

    Args:
      directory: where the files are written.
      formats: names in `hostile_files.CASES`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.studies.parts.stress_files", str(directory), *formats]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [Row(*json.loads(line)) for line in done.stdout.splitlines()]
    if done.returncode:
        rows.append(
            Row("the process that reads the files", f"ended with {done.returncode}: {done.stderr[-300:]}", False)
        )
    return rows


def readers() -> dict[str, Callable[[Path], Any]]:
    """What reads the files of each format."""
    import resflow_jax as rf
    from experiments.runs.saved import saved_config
    from resflow_jax.data.files import load_path
    from resflow_jax.data.vectors import load_vectors

    return {
        "torch": rf.load_torch_checkpoint,
        "safetensors": rf.load,
        "arrays": load_vectors,
        "images": load_path,
        "config.json": lambda path: saved_config(path.parent),
    }


def rows_of(directory: Path, formats: tuple[str, ...]) -> Iterator[Row]:
    """Reads the files in this process."""
    from experiments.studies.parts.hostile_files import CASES

    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _SPACE, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _stop)
    for format_ in formats or CASES:
        for name, (file, content) in CASES[format_]():
            path = directory / file
            path.write_bytes(content)
            yield read(f"{format_}: {name}", readers()[format_], path)


def read(case: str, reader: Callable[[Path], Any], path: Path) -> Row:
    """Reads one file; it has to be a ValueError that names the file, in time and in little memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what the process has
    before, start = _status("VmHWM"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        answer, right = f"read: {type(reader(path)).__name__}", False
    except (ValueError, OSError) as error:
        answer = f"{type(error).__name__}: {str(error).replace(str(path.parent), '')[:150]}"
        right = str(path) in str(error) and len(str(error)) < 2000 and str(error).replace("\n", "").isprintable()
    except BaseException as error:
        answer, right = f"{type(error).__name__}: {str(error)[:150]}", False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, peak = time.process_time() - start, max(0, _status("VmHWM") - before)
    right = right and seconds < SECONDS and peak < TIMES * path.stat().st_size + BYTES
    return Row(case, f"{answer} ({seconds:.1f} s, {peak / 1e6:.0f} MB)", right)


def _status(name: str) -> int:
    """Bytes of this process: VmSize of its address space, VmHWM at its largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _stop(*_: object) -> None:
    raise TimeoutError("not done in time")


def main() -> None:
    """Prints a line of JSON for each file."""
    directory, *formats = sys.argv[1:]
    for row in rows_of(Path(directory), tuple(formats)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
