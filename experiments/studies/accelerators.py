"""What XLA's TPU compiler makes of a step: operations, memory traffic, a roofline.

    python -m experiments.studies.accelerators [--configs cifar10 ...] [--what train evaluate sample] [--chips 1 8]
        [--kind v5e v5p] [--parameters replicated full] [--batch-size B] [--minutes M] [--again] [--workdir DIR]

The machine needs no TPU, only the package libtpu that matches JAX. All figures are what a compiler says. None of them
is a measurement.

It reads the optimised program of one chip. Operations are those of matrix products and convolutions. Bytes are those
that instructions move to and from HBM, and apart from them VMEM; see `experiments.studies.parts.hlo_costs`. Both are
given with every loop body counted once, and with the turns of loops. Turns that depend on data have a mean:

    series of the log-det   the mean number of its terms; 2.6 for `Roulette()` with Lip(g) <= 0.94,
                            whose exact terms have a loop of their own
    power iteration         1: a training step advances it once
    solve of the inverse    8.7 on digits_uniform, else 12.1: evaluations of g in a block for the slowest
                            example, measured on trained flows (`experiments.studies.inverse`)
    any other               1; the results list the files that such loops come from

The roofline is the larger of two times: products at the published peak in bfloat16, and HBM traffic at the published
bandwidth. A float32 product takes one pass of the bfloat16 unit by default, and six with precision "highest", which
solves and power iterations use. It leaves out VMEM, element-wise work, latencies, the network, and products that are
too narrow for the unit of 128x128 (v5e, v5p), so a step takes longer. The compiler's own estimate of the cycles of each
instruction has all of these but the network and what overlaps; it is given in milliseconds at the chip's clock.

Parameters "full" exist for training on several chips alone. Each program is compiled in a process of its own. Under
DIR it writes accelerators.json, and for every program programs/NAME.json and programs/NAME.hlo.gz. A program that is
there with the same settings is not compiled again; after a change of code ask for that by --again. A step of
digits_uniform takes a minute on one CPU core, one of cifar10 three minutes on two.
"""

import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from experiments.configs import CONFIGS
from experiments.configs.base import DensityConfig
from experiments.runs.command import Command, Output
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.accelerator_steps import (
    TOPOLOGIES,
    Kind,
    Parameters,
    StepCase,
    What,
    environment,
    libtpu,
    settings_of,
)
from experiments.studies.parts.collectives import collectives, collectives_in_loops
from experiments.studies.parts.hlo import Computation, Instruction, Program, known_turns, parse
from experiments.studies.parts.hlo_costs import cost
from resflow_jax import Estimator, Exact, Truncated
from resflow_jax.functional.checks import check_count
from resflow_jax.functional.estimators import subsampling
from resflow_jax.io.config_json import as_json

NOTE = "What XLA's compiler says of its programs, and published peaks: nothing here is a measurement."
LIPSCHITZ = 0.94  # of the flows, for the law of lengths
SOLVES = {"digits_uniform": 104 / 12, "": 121 / 10}  # evaluations of g a block; "" for other configs


class Peak(NamedTuple):
    """Published peaks of a chip: operations per second in bfloat16, bytes per second of HBM, and product units."""

    flops: float
    hbm: float
    units: int

    @property
    def clock(self) -> float:
        """Cycles per second, each with one multiplication and one addition in every cell of the units of 128x128."""
        return self.flops / (2 * 128**2 * self.units)


# https://docs.cloud.google.com/tpu/docs/v5e and v5p
PEAKS = {"v5e": Peak(197e12, 819e9, 4), "v5p": Peak(459e12, 2765e9, 8)}


@dataclass(frozen=True)
class AcceleratorsConfig:
    """The settings of the study.

    Attributes:
      configs: names of runs on images, as of `experiments.density`.
      what: the training step, log p of a batch with the estimator of evaluation, or the inverse of a batch of latents.
      kind: kinds of TPU.
      chips: numbers of chips: 1, 4, 8, 16, 64 or 256.
      parameters: layouts of the training state.
      batch_size: images a chip; by default the batch size of each config.
      minutes: time limit of a compilation.
      again: whether to compile programs that are there.
      workdir: directory that everything is written to.
      small: whether to use the flow of `--tiny`.
    """

    configs: tuple[str, ...] = ("cifar10",)
    what: tuple[What, ...] = ("train",)
    kind: tuple[Kind, ...] = ("v5e",)
    chips: tuple[int, ...] = (1,)
    parameters: tuple[Parameters, ...] = ("replicated",)
    batch_size: int | None = None
    minutes: float = 20.0
    again: bool = False
    workdir: Path = Path("runs/accelerators")
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        for name in ("configs", "what", "kind", "chips", "parameters"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected one or more, got none")
        on_images = [name for name, config in CONFIGS.items() if isinstance(config, DensityConfig)]
        for name in self.configs:
            if name not in on_images:
                raise ValueError(f"configs: expected some of {', '.join(on_images)}, got {name!r}")
        for number in self.chips:
            if number not in TOPOLOGIES["v5e"]:
                raise ValueError(f"chips: expected some of {', '.join(map(str, TOPOLOGIES['v5e']))}, got {number}")
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size, 1)
        if not self.minutes > 0:
            raise ValueError(f"minutes: expected a positive number, got {self.minutes}")
        if not self.cases:
            raise ValueError("parameters: expected replicated too, or training on several chips, got full alone")

    @property
    def cases(self) -> list[StepCase]:
        """All programs that the settings ask for; layouts that make no difference are left out."""
        return [
            StepCase(name, what, kind, chips, layout, self.batch_size or CONFIGS[name].batch_size, self.small)
            for name in self.configs
            for what in self.what
            for kind in self.kind
            for chips in self.chips
            for layout in self.parameters
            if layout == "replicated" or (what == "train" and chips > 1)
        ]


def tiny(config: AcceleratorsConfig) -> AcceleratorsConfig:
    """The training step of a tiny flow of digits."""
    return replace(
        config, configs=("digits_uniform",), batch_size=4, workdir=Path("runs/accelerators_tiny"), small=True
    )


COMMAND = Command(
    "experiments.studies.accelerators",
    __doc__,
    AcceleratorsConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("accelerators.json", "programs/*.json", "programs/*.hlo.gz")),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: AcceleratorsConfig) -> dict[str, Any]:
    """Compiles, reads and prints; returns the content of accelerators.json."""
    cases = config.cases
    if config.small and libtpu() is None:
        cases = [replace(case, kind="cpu") for case in cases]
        print("no package libtpu: compiled for the CPU, without a roofline")
    for kind in {case.kind for case in cases}:
        environment(kind)  # raises now if libtpu is missing
    directory = config.workdir / "programs"
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        failure = compiled(case, directory, config.minutes, config.again)
        rows.append({"case": asdict(case), "failed": failure} if failure else row_of(case, directory))
        result = as_json({"note": NOTE, "peaks": {name: peak._asdict() for name, peak in PEAKS.items()}, "rows": rows})
        write_atomically(config.workdir / "accelerators.json", json.dumps(result, indent=2) + "\n")
    print_rows(rows)
    return result


def compiled(case: StepCase, directory: Path, minutes: float, again: bool) -> str | None:
    """Compiles a program in a process of its own, unless it is there. Returns None, or why it could not."""
    path, there = directory / case.name, directory / f"{case.name}.json"
    if there.exists() and json.loads(there.read_text())["settings"] == settings_of(case) and not again:
        return None
    print(f"compiling {case.name}", file=sys.stderr, flush=True)
    module = "experiments.studies.parts.accelerator_steps"
    command = [sys.executable, "-m", module, json.dumps(asdict(case)), str(path)]
    try:
        ended = subprocess.run(
            command, env=environment(case.kind), timeout=60 * minutes, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not compiled within {minutes:g} minutes"
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1][:500]
    return None


def row_of(case: StepCase, directory: Path) -> dict[str, Any]:
    """The figures of a program that is compiled."""
    said = json.loads((directory / f"{case.name}.json").read_text())
    del said["settings"]
    with gzip.open(directory / f"{case.name}.hlo.gz", "rt") as file:
        program = parse(file.read())
    means, loops, others = means_of(case), Counter(), set()

    def turns(computation: Computation, loop: Instruction) -> float:
        known = known_turns(program, computation, loop)
        if known is not None:
            return known
        kind = kind_of_loop(program.source(loop))
        loops[kind] += 1
        if kind == "other":
            others.add(program.source(loop))
        return means[kind]

    once, total = cost(program), cost(program, turns)
    found = collectives(program)
    return said | {
        "once": asdict(once),
        "with_turns": asdict(total),
        "means": {kind: {"turns": means[kind], "loops": number} for kind, number in loops.items()},
        "other_loops": sorted(others),
        "collectives": {
            "kinds": dict(Counter(one.kind for one in found)),
            "bytes": sum(one.nbytes for one in found),
            "in_loops": len(collectives_in_loops(program)),
        },
        "host_callbacks": host_callbacks(program),
        "roofline": roofline(case.kind, total.flops, total.passes, total.hbm),
        "estimated_seconds": total.cycles / PEAKS[case.kind].clock if case.kind in PEAKS else None,
    }


_KINDS = {
    "functional/term_sums.py": "series",
    "functional/neumann.py": "series",
    "functional/power_iteration.py": "power iteration",
    "functional/iteration.py": "solve",
}


def kind_of_loop(source: str) -> str:
    """Which of the loops of unknown length a source file has."""
    return next((kind for end, kind in _KINDS.items() if source.endswith(end)), "other")


def means_of(case: StepCase) -> dict[str, float]:
    """The mean number of turns by kind of loop, as the head of this file says."""
    settings = case.settings
    terms = mean_terms(settings.evaluation.estimator if case.what == "evaluate" else settings.estimator)
    return {
        "series": terms,
        "power iteration": 1.0,
        "solve": SOLVES.get(case.config, SOLVES[""]),
        "other": 1.0,
    }


def mean_terms(estimator: Estimator) -> float:
    """The mean length of a series: exact terms, and the mean of the longest of the drawn lengths."""
    if isinstance(estimator, Exact):
        return 1.0
    if isinstance(estimator, Truncated):
        return float(estimator.terms)
    law = estimator.length
    law = law.within(LIPSCHITZ) if hasattr(law, "within") else law
    survival = (float(law.survival(k)) for k in range(1, 400))
    exact = estimator.exact_terms if subsampling(estimator) == 1 else 0  # on TPUs these have a loop of their own
    return exact + math.fsum(1 - (1 - p) ** estimator.samples for p in survival)


def host_callbacks(program: Program) -> int:
    """How many instructions call the host."""
    return sum(
        "callback" in (one.attribute("custom_call_target") or "").lower()
        or (one.opcode in ("send", "recv") and one.attribute("is_host_transfer") == "true")
        for computation in program.computations.values()
        for one in computation.instructions.values()
    )


def roofline(kind: str, flops: float, passes: float, hbm: float) -> dict[str, float] | None:
    """Seconds of products and of HBM traffic at the peaks of a chip, and operations per second at the larger."""
    if kind not in PEAKS:
        return None
    peak = PEAKS[kind]
    products, memory = passes / peak.flops, hbm / peak.hbm
    seconds = max(products, memory)
    rate = flops / seconds if seconds else 0.0
    return {"products": products, "memory": memory, "flops_per_second": rate, "share_of_peak": rate / peak.flops}


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints two tables in Markdown: what the compiler says, and the roofline."""
    print(f"\n{NOTE}\n")
    columns = ("GFLOP", "with turns", "HBM MB", "with turns", "VMEM MB with turns", "temporary MB", "arguments MB")
    _print_line("step", *columns, "code MB", "lowered s", "compiled s")
    _print_line(*["---"] * (len(columns) + 4))
    for row in rows:
        if "failed" in row:
            _print_line(_title(row), row["failed"])
            continue
        once, total, memory, seconds = (row[name] for name in ("once", "with_turns", "memory", "seconds"))
        sizes = (memory[name] for name in ("temp", "argument", "generated_code"))
        figures = once["flops"] / 1e9, total["flops"] / 1e9, once["hbm"] / 1e6, total["hbm"] / 1e6, total["vmem"] / 1e6
        figures += *(size / 1e6 for size in sizes), seconds["lower"], seconds["compile"]
        _print_line(_title(row), *(f"{figure:.4g}" for figure in figures))
    columns = "products ms", "HBM ms", "compiler's estimate ms", "TFLOP/s a chip", "of the peak", "passes a product"
    print()
    _print_line("step", *columns, "collectives", "MB", "in loops", "host callbacks")
    _print_line(*["---"] * (len(columns) + 5))
    for row in rows:
        if "failed" in row:
            continue
        bound, sent, total = row["roofline"], row["collectives"], row["with_turns"]
        figures = [""] * 5
        if bound:
            seconds = bound["products"], bound["memory"], row["estimated_seconds"]
            times = (f"{1e3 * one:.4g}" for one in seconds)
            figures = *times, f"{bound['flops_per_second'] / 1e12:.4g}", f"{bound['share_of_peak']:.1%}"
        passes = f"{total['passes'] / total['flops']:.2f}" if total["flops"] else ""
        kinds = ", ".join(f"{number} {kind}" for kind, number in sent["kinds"].items()) or "none"
        _print_line(
            _title(row), *figures, passes, kinds, f"{sent['bytes'] / 1e6:.4g}", sent["in_loops"], row["host_callbacks"]
        )


def _title(row: dict[str, Any]) -> str:
    case = row["case"]
    chips = f"{case['chips']} {case['kind']}" + (f", {case['parameters']}" if case["chips"] > 1 else "")
    return f"{case['config']}{' (tiny)' if case['tiny'] else ''} {case['what']}, {case['batch_size']} images, {chips}"


def _print_line(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
