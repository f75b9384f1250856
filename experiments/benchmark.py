"""Times training, evaluation, sampling and compilation, and compares with normflows.

    python -m experiments.benchmark [--cases 28x28 32x32] [--rounds N] [--workdir DIR] [--profile DIR]
    python -m experiments.benchmark --cases cifar10 --competitors "resflow_jax plain" authors --authors CHECKOUT

Each competitor runs in its own process, which is idle while another is measured. Rounds alternate between competitors,
on the same images with the same weights and the papers' estimator: in training two exact terms and Poisson(2) further
terms, in evaluation 20 and Poisson(2). Prints medians and ratios, and writes benchmark.json. normflows needs the extra
`bench`; without it only the others are measured. The authors' PyTorch code is measured if `--authors` gives a checkout
of https://github.com/rtqichen/residual-flows; its weights are its own. All use a GPU if there is one.

The roofline is the time that the matrix products of a step would take at the measured speed of plain products, divided
by the time of the step. `--profile` writes a trace of three training steps of each case for TensorBoard or Perfetto
instead.
"""

import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.command import Command, Output
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.competitors import CASES, COMPETITORS, PEERS
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.primitives.platforms import number_of_cores
from resflow_jax.training.parallel import STRATEGIES, Strategy

TOLERANCES = ("1e-2", "1e-3", "1e-4", "1e-5", "1e-6")


@dataclass(frozen=True)
class BenchmarkConfig:
    """The settings of the benchmark.

    Attributes:
      cases: names in `experiments.studies.parts.competitors.CASES`.
      competitors: any of "resflow_jax" (with a device a core and the flags of the experiments), "resflow_jax plain" (a
        plain script: one device, no flags), "resflow_jax bfloat16", "authors" and "normflows"; the last is the
        reference.
      rounds: number of alternating rounds; every table entry is a median over them.
      steps: training steps per round.
      compilation: also compile the CIFAR-10 step of the papers, cold and from the cache, and report its memory.
      workdir: directory that benchmark.json is written to.
      profile: directory for traces; if it is given, only traces are written.
      parallel: how this library's training step is divided among cores, as in `experiments.density`.
      authors: directory with a checkout of the authors' PyTorch code; without it they are left out.
    """

    cases: tuple[str, ...] = ("28x28", "32x32")
    competitors: tuple[str, ...] = COMPETITORS
    rounds: int = 5
    steps: int = 3
    compilation: bool = True
    workdir: Path = Path("runs/benchmark")
    profile: Path | None = None
    parallel: Strategy = "jit"
    authors: Path | None = None

    def __post_init__(self):
        check_choice("parallel", self.parallel, STRATEGIES)
        for case in self.cases:
            check_choice("cases", case, tuple(CASES))
        for competitor in self.competitors:
            check_choice("competitors", competitor, COMPETITORS)
        check_count("rounds", self.rounds, 1)
        check_count("steps", self.steps, 1)


class Worker:
    """A competitor in its own process."""

    def __init__(
        self,
        case: str,
        competitor: str,
        cache: Path | None = None,
        strategy: Strategy = "jit",
        authors: Path | None = None,
    ):
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}  # workers share a GPU
        if cache is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "experiments.studies.parts.competitors",
            case,
            competitor,
            strategy,
            *(["--authors", str(authors)] if authors else []),
        ]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __call__(self, *measure: str) -> dict[str, Any]:
        """Makes one measurement.

        Raises:
          RuntimeError: if the process ended; its own message is on standard error.
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(" ".join(measure) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args)}: ended with {self._process.wait()} at {measure[0]}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def tiny(config: BenchmarkConfig) -> BenchmarkConfig:
    """One round of a tiny flow."""
    return replace(
        config,
        cases=("tiny",),
        rounds=1,
        steps=1,
        compilation=False,
        workdir=config.workdir.with_name("benchmark_tiny"),
    )


COMMAND = Command(
    "experiments.benchmark",
    __doc__,
    BenchmarkConfig(),
    tiny,
    output=lambda config: (
        Output(config.workdir, ("benchmark.json",))
        if config.profile is None
        else Output(config.profile, tuple(f"{case}/" for case in config.cases))
    ),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Measures, prints and writes; returns the content of benchmark.json."""
    if config.profile is not None:
        for case in config.cases:
            with Worker(case, "resflow_jax", strategy=config.parallel) as worker:
                worker("profile", str(config.profile / case))
            print(f"traces of {case} in {config.profile / case}")
        return {}
    competitors = [name for name in config.competitors if name not in PEERS or _has(name, config.authors)]
    if "normflows" in config.competitors and "normflows" not in competitors:
        print("normflows is left out: it needs the extra bench, pip install -e '.[experiments,bench]'")
    if not competitors:
        raise ValueError(f"competitors: expected at least one that can be measured, got {config.competitors}")
    config.workdir.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "cases": {}}
    print(result["machine"])
    for case in config.cases:
        result["cases"][case] = measure(case, competitors, config.rounds, config.steps, config.parallel, config.authors)
        print_case(case, result["cases"][case])
        write_atomically(config.workdir / "benchmark.json", json.dumps(result, indent=2) + "\n")
    if config.compilation:
        result["compilation"] = compilation()
        print_compilation(result["compilation"])
    write_atomically(config.workdir / "benchmark.json", json.dumps(result, indent=2) + "\n")
    return result


def machine() -> str:
    """The name of the processor and its number of cores, and the accelerator that JAX uses, if any."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    program = "import jax; print(len(jax.devices()), jax.devices()[0].device_kind, jax.__version__)"
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    number, *kind, version = answer.stdout.split()
    accelerators = "" if kind == ["cpu"] else f", {number} {' '.join(kind)}"
    return f"{number_of_cores()} cores of {name}{accelerators}, JAX {version}"


def measure(
    case: str,
    competitors: list[str],
    rounds: int,
    steps: int,
    strategy: Strategy = "jit",
    authors: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Medians over alternating rounds, by competitor."""
    workers = {name: Worker(case, name, strategy=strategy, authors=authors) for name in competitors}
    try:
        found: dict[str, dict[str, list[float]]] = {name: {} for name in competitors}
        tolerances = _tolerances(workers)
        for n in range(rounds + 1):
            for name, worker in workers.items():
                for key, values in _round(worker, name, steps, tolerances.get(name)).items():
                    if n:  # the first round compiles
                        found[name].setdefault(key, []).extend(values)
        return {
            name: {key: float(np.median(values)) for key, values in measured.items()}
            for name, measured in found.items()
        }
    finally:
        for worker in workers.values():
            worker.__exit__()


def _round(worker: Worker, name: str, steps: int, tolerance: str | None) -> dict[str, list[float]]:
    train = [worker("train") for _ in range(steps)]
    evaluate = worker("evaluate")
    values = {
        "train": [one["seconds"] for one in train],
        "evaluate": [evaluate["seconds"]],
        "noise": [evaluate["noise"]],
    }
    if name not in PEERS:
        speed = worker("matmul")["flops_per_second"]
        values["matmul"] = [speed]
        values["roofline"] = [one["flops"] / speed / one["seconds"] for one in train]
        default = worker("evaluate_default")
        values["evaluate_default"], values["noise_default"] = [default["seconds"]], [default["noise"]]
    if name != "resflow_jax bfloat16":
        sample = worker("sample", *([tolerance] if tolerance else []))
        values["sample"], values["error"] = [sample["seconds"]], [sample["error"]]
        evaluate = sample
    values["peak_bytes"] = [evaluate["peak_bytes"]]
    return values


def _tolerances(workers: dict[str, Worker]) -> dict[str, str]:
    """The loosest tolerance whose error is at most a hundredth of a peer's, or at most float32 rounding, 1e-6."""
    peers = [worker for name, worker in workers.items() if name in PEERS]
    if not peers:
        return {}
    goal = max(1e-6, peers[-1]("sample")["error"] / 100)
    found = {}
    for name in set(workers) - {*PEERS, "resflow_jax bfloat16"}:
        for found[name] in TOLERANCES:
            if workers[name]("sample", found[name])["error"] <= goal:
                break
    return found


def compilation() -> dict[str, float]:
    """Seconds to trace and compile the papers' CIFAR-10 step, without and with a cache, and its memory in bytes.

    The memory is also given for 2-2-2 blocks.
    """
    with tempfile.TemporaryDirectory() as cache:
        answers = []
        for case in ("cifar10", "cifar10", "cifar10_2"):
            with Worker(case, "resflow_jax", Path(cache)) as worker:
                answers.append(worker("compile"))
    cold, warm, shallow = answers
    return {
        "cold_trace": cold["trace"],
        "cold_compile": cold["compile"],
        "warm_trace": warm["trace"],
        "warm_compile": warm["compile"],
        "temporary_bytes": cold["temporary_bytes"],
        "temporary_bytes_2-2-2": shallow["temporary_bytes"],
    }


ROWS = {
    "train": ("training step", 1.0, "s"),
    "evaluate": ("evaluation, 20 terms and a roulette", 1.0, "s"),
    "noise": ("  noise of log p of an image", 1.0, "nats"),
    "evaluate_default": ("evaluation, Roulette()", 1.0, "s"),
    "noise_default": ("  noise of log p of an image", 1.0, "nats"),
    "sample": ("inverse", 1.0, "s"),
    "error": ("  max |x - f^-1(f(x))|", 1.0, ""),
    "peak_bytes": ("peak memory of the process", 1e-9, "GB"),
    "matmul": ("speed of plain matrix products", 1e-9, "GFLOP/s"),
    "roofline": ("roofline of the training step", 100.0, "%"),
}


def print_case(case: str, result: dict[str, dict[str, float]]) -> None:
    """Prints the table of one case: medians, and the factor by which each is below that of the last competitor."""
    flow, batch = CASES[case].config, CASES[case].batch_size
    print(f"\n{case}: blocks {'-'.join(map(str, flow.blocks))}, {flow.hidden_channels} hidden channels, batch {batch}")
    print(f"{'':40}" + "".join(f"{name:>30}" for name in result))
    last = list(result.values())[-1]
    for key, (label, scale, unit) in ROWS.items():
        cells = []
        for measured in result.values():
            value = measured.get(key)
            text = "" if value is None else f"{scale * value:.3g} {unit}".strip()
            reference = last.get("evaluate" if key == "evaluate_default" else key)
            if (
                value
                and reference
                and measured is not last
                and key in ("train", "evaluate", "evaluate_default", "sample")
            ):
                text += f" ({reference / value:.2f}x)"
            cells.append(f"{text:>30}")
        print(f"{label:40}" + "".join(cells))


def print_compilation(result: dict[str, float]) -> None:
    """Prints the lines on the CIFAR-10 step."""
    print("\nthe CIFAR-10 training step of the papers, 16-16-16 blocks, 512 hidden channels, batch 64, on one device")
    for name in ("cold", "warm"):
        trace, compile_ = result[f"{name}_trace"], result[f"{name}_compile"]
        print(f"{name + ' start':40}{trace:.1f} s to trace, {compile_:.1f} s to compile")
    deep, shallow = result["temporary_bytes"], result["temporary_bytes_2-2-2"]
    print(f"{'temporary memory':40}{deep / 1e6:.0f} MB; with 2-2-2 blocks {shallow / 1e6:.0f} MB")


def _has(peer: str, authors: Path | None) -> bool:
    return authors is not None if peer == "authors" else all(map(importlib.util.find_spec, ("torch", "normflows")))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()
