"""Soak: a long run must neither grow, nor compile, nor slow down."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.studies.parts.campaign import Campaign, Deadline, Row

_GROWTH = 1.0  # MB of memory in 1000 steps that are no longer noise
_OF_VALIDATION = 5.0  # MB that a validation with its pictures and checkpoint may leave
_SLOWER = 0.05  # share of the time of a step


def run(config: Any, directory: Path, deadline: Deadline) -> list[Row]:
    """Trains `digits_uniform` in a process of its own and looks at its memory, compilations and time per step."""
    path = directory / "soak.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    call = f"measure({config.soak_steps}, Path({str(path)!r}), is_tiny={config.small})"
    program = f"from pathlib import Path; from {__name__} import measure; {call}"
    command = [sys.executable, "-c", program]
    try:
        status = subprocess.run(command, check=False, timeout=deadline.left or 1).returncode
    except subprocess.TimeoutExpired:
        status = None
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(lines) < 10:
        return [Row(f"{config.soak_steps} steps of digits_uniform", 0, f"ended early, exit status {status}", False)]
    return rows_of(lines)


def rows_of(lines: list[dict[str, float]]) -> list[Row]:
    """The rows for the measurements of a long run: lines with its step, cpu seconds, resident MB and compilations."""
    steps, cpu, memory, compiled = (np.array([line[name] for line in lines]) for name in _NAMES)
    first = len(lines) // 5  # the warm-up
    grown, taken = np.diff(memory)[first:], np.diff(steps)[first:]
    # Most measurements have no validation between them: the median is the growth by steps alone.
    by_steps, by_all = 1000 * np.median(grown / taken), memory[-1] - memory[first]
    by_validation = by_all / (_VALIDATIONS * (len(lines) - 1 - first) / _MARKS)
    seconds = np.diff(cpu) / np.diff(steps)
    start, end = (1e3 * np.median(part) for part in (seconds[first : 2 * first], seconds[-first:]))
    done, number = f"{int(steps[-1])} steps", int(steps[-1])
    return [
        Row(
            f"{done}: memory",
            number,
            f"{memory[first]:.0f} MB after a fifth, {memory[-1]:.0f} MB at the end: {by_steps:+.2f} MB in 1000 steps "
            f"without a validation, {by_validation:+.1f} MB for each validation with pictures and checkpoint",
            bool(by_steps < _GROWTH and by_validation < _OF_VALIDATION),
        ),
        Row(
            f"{done}: compilations after a fifth",
            number,
            f"{int(compiled[-1] - compiled[first])} ({int(compiled[first])} before)",
            bool(compiled[-1] == compiled[first]),
        ),
        Row(
            f"{done}: time per step",
            number,
            f"{start:.1f} ms of CPU in the second fifth, {end:.1f} ms in the last ({end / start - 1:+.1%})",
            bool(end < start * (1 + _SLOWER)),
        ),
    ]


_NAMES = ("step", "cpu", "memory", "compilations")
_MARKS, _VALIDATIONS = 100, 20  # measurements and validations of the long run


def measure(steps: int, path: Path, *, is_tiny: bool) -> None:
    """Trains, in this process, and writes a line for each measurement."""
    from dataclasses import replace

    from experiments.configs import CONFIGS
    from experiments.configs.tiny import tiny
    from experiments.runs import train
    from experiments.runs.launch import run_config
    from experiments.runs.metrics import Metrics

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if name.endswith("backend_compile_duration") else None
    )
    config = CONFIGS["digits_uniform"]
    config = tiny(config) if is_tiny else config
    every = max(1, steps // _MARKS)
    config = replace(
        config,
        workdir=path.parent / "run",
        steps=steps,
        log_every=every,
        evaluation=replace(config.evaluation, every=max(1, steps // _VALIDATIONS), draws=1),
    )

    class Watched(Metrics):
        """Metrics that measure at each line of training."""

        def write(self, *, step: int, split: str, **line: Any) -> None:
            super().write(step=step, split=split, **line)
            if split == "train":
                with path.open("a") as file:
                    file.write(json.dumps(dict(zip(_NAMES, _state(step, compilations), strict=True))) + "\n")

    train.Metrics = Watched
    run_config(config)


def _state(step: int, compilations: list[str]) -> tuple[float, ...]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = resource.getrusage(resource.RUSAGE_SELF)
    return step, used.ru_utime + used.ru_stime, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(compilations)


CAMPAIGN = Campaign("memory, compilations and speed of a long run", run)
