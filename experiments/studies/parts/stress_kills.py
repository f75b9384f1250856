"""Kills: a run that is killed again and again must end as the one that was left alone."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.runs.saved import saved_config
from experiments.runs.setup import set_up
from experiments.runs.tasks.of_config import task_of
from experiments.studies.parts.campaign import (
    Campaign,
    Deadline,
    Row,
    checkpoints_of,
    files_of,
    finish,
    last_error,
    output_of,
    start,
)
from resflow_jax.training.checkpoints import Checkpoints

_POLL = 0.002  # seconds between looks at the files of a run


def run(config: Any, directory: Path, deadline: Deadline) -> list[Row]:
    """Kills runs at random moments and at chosen ones, resumes them, and compares their ends with that of another."""
    rng, reference = random.Random(config.seed), directory / "reference"
    finish(directory / "warm_up")  # fills the cache of programs
    began = time.monotonic()
    status, line = finish(reference)
    seconds = time.monotonic() - began
    if status:
        return [Row("a run that is left alone", 1, f"exit status {status}: {line}", False)]
    expected, kills, ends, redone = _end_of(reference), Counter(), [], []

    def goes_on() -> bool:
        return kills.total() < config.kills and deadline.left > 2 * seconds

    while goes_on():
        workdir = directory / f"killed_{len(ends)}"
        shutil.rmtree(workdir, ignore_errors=True)
        while True:
            newest = max(checkpoints_of(workdir), default=0)
            process = start(workdir)
            moment, is_reached = _moment(rng, seconds, workdir)
            killed = _kill(process, is_reached if goes_on() else lambda: False, deadline)
            text = output_of(workdir).read_text(errors="replace")
            if f"resuming {workdir} at step" in text:
                step = int(text.split(f"resuming {workdir} at step ")[1].split()[0])
                redone.append(newest - step)
            if not killed:
                break
            kills[moment] += 1
        if process.returncode:
            ends.append(f"exit status {process.returncode}: {last_error(workdir)}")
        else:
            ends.append(_difference(expected, _end_of(workdir)))
    bad = [end for end in ends if end]
    places = ", ".join(f"{number} {moment}" for moment, number in sorted(kills.items()))
    good = f"all {len(ends)} runs end with the metrics, weights and pictures of the run that was left alone"
    lost = [number for number in redone if number > 0]
    return [
        Row(f"SIGKILL ({places})", kills.total(), "; ".join(bad[:3]) or good, not bad and kills.total() > 0),
        Row(
            "resumed runs go on at the newest checkpoint",
            len(redone),
            f"{len(lost)} started before it" if lost else "each of them",
            not lost,
        ),
    ]


def _moment(rng: random.Random, seconds: float, workdir: Path) -> tuple[str, Callable[[], bool]]:
    """A moment to kill at: its name, and a function that tells whether it has come."""
    began, delay = time.monotonic(), rng.random() * 0.1
    seen = set(_watched(workdir))
    name = rng.choice(("at any time", "at any time", "while saving", "while drawing", "while reporting"))
    until = rng.random() * seconds

    def any_time() -> bool:
        return time.monotonic() - began > until

    def appears(test: Callable[[Path], bool]) -> Callable[[], bool]:
        first: list[float] = []

        def is_there() -> bool:
            if not first and any(test(path) for path in set(_watched(workdir)) - seen):
                first.append(time.monotonic())
            return bool(first) and time.monotonic() - first[0] > delay

        return is_there

    return name, {
        "at any time": any_time,
        "while saving": appears(lambda path: "orbax-checkpoint-tmp" in path.name),
        "while drawing": appears(lambda path: path.parent.name == "training"),
        "while reporting": appears(lambda path: path.name in ("certificate.json", "samples.png", "curves.png")),
    }[name]


def _watched(workdir: Path) -> list[Path]:
    found = []
    for directory in (workdir, workdir / "checkpoints", workdir / "training"):
        if directory.is_dir():
            found += [directory / entry.name for entry in os.scandir(directory)]
    return found


def _kill(process: subprocess.Popen, is_reached: Callable[[], bool], deadline: Deadline) -> bool:
    """Kills a process when its moment has come; False if it ended before."""
    while process.poll() is None:
        if is_reached():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return process.returncode == -signal.SIGKILL
        if deadline.is_over:
            process.kill()
            process.wait()
            raise TimeoutError("the time of the study is over in the middle of a run; give it more --seconds")
        time.sleep(_POLL)
    return False


def _end_of(workdir: Path) -> dict[str, Any]:
    """The metrics, pictures and weights of a finished run."""
    config = saved_config(workdir)
    like, found = set_up(task_of(config))[1], dict(files_of(workdir))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for weights in ("latest", "best"):
            state = checkpoints.restore_intact(like, weights=weights)
            found[f"{weights} state"] = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return found


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The names of what differs; empty if nothing does."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return f"other {', '.join(names)}" if names else ""


CAMPAIGN = Campaign("SIGKILL at random moments, and resuming", run)
