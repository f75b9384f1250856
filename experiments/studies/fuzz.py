"""Fuzzes the readers of files: PyTorch, safetensors, NumPy, IDX, CSV, config.json.

    python -m experiments.studies.fuzz [--seconds N] [--readers torch pickle ...] [--workdir DIR]

Mutations of whole files are read, in a process for each reader. Every one has to be read, or to be refused by an error
that names the file; anything else is a fault, and so is an input that takes 30 seconds or 6 GB. With atheris
(`pip install .[fuzz]`) mutations are guided by the branches that they reach; without it they are random, and the table
says so. Prints a table, writes the first input of each fault and fuzz.json, and ends with status 1 if there is a fault.
The time is divided among the readers; 10 minutes reach most of the branches on a single core.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.runs.command import Command, Output
from experiments.runs.names import printable
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.fuzzing import RESULT
from resflow_jax.functional.checks import check_choice, check_count, check_positive

ReaderName = Literal["torch", "pickle", "safetensors", "config", "structure", "npy", "npz", "csv", "idx", "run"]
READERS = get_args(ReaderName)


@dataclass(frozen=True)
class FuzzConfig:
    """One call of `python -m experiments.studies.fuzz`.

    Attributes:
      seconds: time in all, without the start of the processes.
      readers: what is fuzzed: "torch" for the bytes of a .pth file and "pickle" for the pickle in it; "safetensors" for
        the bytes of a saved flow, "config" and "structure" for the JSON in it; "npy", "npz", "csv" and "idx" for data;
        "run" for the config.json of a run.
      seed: random seed.
      workdir: directory that everything is written to.
    """

    seconds: float = 600.0
    readers: tuple[ReaderName, ...] = READERS
    seed: int = 0
    workdir: Path = Path("runs/fuzz")

    def __post_init__(self):
        check_positive("seconds", self.seconds)
        check_count("seed", self.seed, 0)
        if not self.readers:
            raise ValueError("readers: expected at least one, got none")
        for reader in self.readers:
            check_choice("readers", reader, READERS)


def tiny(config: FuzzConfig) -> FuzzConfig:
    """A second of two readers."""
    return replace(config, seconds=2.0, readers=("pickle", "npy"), workdir=Path("runs/fuzz_tiny"))


COMMAND = Command(
    "experiments.studies.fuzz",
    __doc__,
    FuzzConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("fuzz.json",)),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: FuzzConfig) -> dict[str, Any]:
    """Fuzzes, prints, and returns the content of fuzz.json.

    Raises:
      SystemExit: with status 1, if there is a fault.
    """
    config.workdir.mkdir(parents=True, exist_ok=True)
    results = {}
    for reader in config.readers:
        results[reader] = fuzz(reader, config)
        found = results[reader]
        kind = "guided" if found["guided"] else "random (atheris is not installed)"
        print(f"{reader:<12} {found['inputs']:>8} inputs, {kind}: {len(found['faults'])} faults", flush=True)
        for fault, path in found["faults"].items():
            print(f"    {printable(fault)}\n    {path}", flush=True)
    write_atomically(config.workdir / "fuzz.json", json.dumps(results, indent=2) + "\n")
    if any(found["faults"] for found in results.values()):
        sys.exit(1)
    return results


def fuzz(reader: ReaderName, config: FuzzConfig) -> dict[str, Any]:
    """The result for one reader. A process that is ended, as by an endless input, is a fault too."""
    directory, seconds = config.workdir / reader, config.seconds / len(config.readers)
    command = [sys.executable, "-m", "experiments.studies.parts.fuzzing", reader, f"{seconds}", f"{config.seed}"]
    (directory / RESULT).unlink(missing_ok=True)
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, errors="replace")
    found = {"inputs": 0, "faults": {}, "guided": True}
    if (directory / RESULT).exists():
        found = json.loads((directory / RESULT).read_text())
    if done.returncode or not found["inputs"]:
        found["faults"][f"ended with status {done.returncode}: {done.stderr[-500:]}"] = str(directory)
    return found


if __name__ == "__main__":
    main()
