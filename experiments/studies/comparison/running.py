"""Runs jobs as processes, each on a core of its own, until none is left.

A model's runs wait for its search. Candidates of all models come first, in the order of the models.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.studies.comparison.jobs import Job, found, save
from experiments.studies.comparison.worker import ENVIRONMENT, STARTED

POLL = 0.2  # seconds between looks at the processes
BY_A_PERSON = (-signal.SIGINT, -signal.SIGTERM)  # statuses of processes that somebody has ended
Next = Callable[[], Sequence[Job]]  # the jobs that are missing and can be started now


@dataclass
class Running:
    """A process of a job.

    Attributes:
      job: what it does.
      core: where.
      process: the process.
      log: the file with its output.
      began: time of its start.
    """

    job: Job
    core: str
    process: subprocess.Popen
    log: Path
    began: float


def cores(number: int | None) -> list[str]:
    """The cores that jobs run on, `number` of those of this process, by default all; "-" for any.

    Raises:
      ValueError: if this process has fewer cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ["-"] * (number or 1)
    have = sorted(os.sched_getaffinity(0))
    if number is not None and number > len(have):
        raise ValueError(f"parallel_runs: expected at most {len(have)}, the cores of this process, got {number}")
    return [str(core) for core in have[:number]]


def run_all(jobs: Next, workdir: Path, places: Sequence[str], data_dir: str | None = None) -> None:
    """Does all jobs, one on each core at a time. A job whose process fails has "error" in its result.

    Args:
      jobs: called whenever a core is free.
      workdir: where results are written.
      places: from `cores`.
      data_dir: directory of TensorFlow data sets.

    Raises:
      RuntimeError: if a process cannot start, as when a package is missing, or is ended by SIGINT or SIGTERM. Its job
        then has no result, and all other processes are ended.
    """
    running: list[Running] = []
    with _ended_with_this_process(running):
        while True:
            busy = {at.job for at in running}
            free = [core for core in places if core not in [at.core for at in running] or core == "-"]
            waiting = [job for job in jobs() if job not in busy] if len(running) < len(places) else []
            if waiting:
                running.append(_started(waiting[0], workdir, free[0], data_dir))
                continue
            if not running:
                return
            while all(at.process.poll() is None for at in running):
                time.sleep(POLL)
            for at in [at for at in running if at.process.poll() is not None]:
                running.remove(at)
                _finished(at, workdir)


def environment() -> dict[str, str]:
    """The environment of a process on one core, which finds this repository and has no cache of compiled programs."""
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    found = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    found.pop("JAX_COMPILATION_CACHE_DIR", None)
    return found


def _started(job: Job, workdir: Path, core: str, data_dir: str | None) -> Running:
    log = job.path(workdir).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.studies.comparison.worker", str(workdir), core]
    command += [] if data_dir is None else [data_dir]
    with log.open("wb") as file:
        options = {"stdin": subprocess.PIPE, "stdout": file, "stderr": subprocess.STDOUT, "env": environment()}
        process = subprocess.Popen(command, **options)
    with suppress(BrokenPipeError), process.stdin as pipe:  # a process that ends at once reads nothing
        pipe.write((job.as_line() + "\n").encode())
    return Running(job, core, process, log, time.monotonic())


def _finished(at: Running, workdir: Path) -> None:
    """Records a failure, and says what has become of the job."""
    result = found(at.job, workdir)
    if result is None:
        if at.process.returncode in BY_A_PERSON or STARTED not in at.log.read_text(errors="replace").splitlines():
            raise RuntimeError(
                f"{at.job.data} {at.job.model} {at.job.name}: expected a process that does the job, got one that "
                f"could not start or was ended, which is no result: {_last_words(at)} (its output is in {at.log})"
            )
        result = {"error": _last_words(at)}
        save(at.job, workdir, result)
    words = result["error"] or f"validation loss {result['validation_loss']:.4f}, {result['steps']} steps"
    seconds = time.monotonic() - at.began
    print(f"{at.job.data} {at.job.model} {at.job.name}, {at.job.candidate}: {words} ({seconds:.0f} s)", flush=True)


def _last_words(at: Running) -> str:
    """Why a process has failed: the last line of its output, or the signal that has ended it."""
    lines = at.log.read_text(errors="replace").strip().splitlines()
    if at.process.returncode < 0:
        return f"ended by {signal.Signals(-at.process.returncode).name}"
    return lines[-1][:300] if lines else f"ended with status {at.process.returncode}"


@contextmanager
def _ended_with_this_process(running: list[Running]) -> Iterator[None]:
    """Ends the processes when this block ends, also on the signal TERM."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread
        before = None
    try:
        yield
    finally:
        for at in running:
            at.process.terminate()
        for at in running:
            at.process.wait()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
