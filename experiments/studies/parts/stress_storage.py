"""Storage: flipped bits and missing files of checkpoints, damaged metrics, full disks, and two runs in one place."""

import random
import resource
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    start,
)
from resflow_jax.training.checkpoints import Checkpoints

_DISK = 900  # KB of the small disk: enough for some checkpoints, too little for a run
_FILE = 60_000  # bytes of the largest file: as much as events take before the end of a run


def run(config: Any, directory: Path, deadline: Deadline) -> list[Row]:
    """Damages the files of a small run in every way, and looks at what comes of it."""
    reference = directory / "reference"
    status, line = finish(reference)
    if status:
        return [Row("a run that is left alone", 1, f"exit status {status}: {line}", False)]
    rows = _flips(config, reference, directory / "flipped", deadline)
    for campaign in (_metrics, _full_disk, _read_only, _vanished, _two_runs):
        if deadline.is_over:
            rows.append(Row(campaign.__name__.strip("_"), 0, "not tried: the time was over", True))
        else:
            rows += campaign(reference, directory / campaign.__name__.strip("_"))
    return rows


def _flips(config: Any, reference: Path, copy: Path, deadline: Deadline) -> list[Row]:
    """Flips one bit in a file of the newest checkpoint, or removes the file, and restores; as often as time allows."""
    rng, like = random.Random(config.seed), set_up(task_of(saved_config(reference)))[1]
    newest = checkpoints_of(reference)[-1]
    files = [path for path in (reference / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
    files = sorted(path.relative_to(reference) for path in files)

    def restored() -> list[bytes]:
        with Checkpoints(copy / "checkpoints") as checkpoints:
            return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(checkpoints.restore_intact(like))]

    def fresh() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(reference, copy)

    fresh()
    good = restored()
    shutil.rmtree(copy / "checkpoints" / str(newest))
    before = restored()
    outcomes = {"the one before": 0, "the same numbers": 0, "other numbers": 0}
    for number in range(config.flips):
        if deadline.is_over:
            break
        fresh()
        path = copy / rng.choice(files)
        if number % 8 == 7:
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = restored()
        is_told = any(f"checkpoint {newest} is" in str(one.message) for one in told)
        kind = "the same numbers" if found == good else "the one before" if found == before and is_told else ""
        outcomes[kind or "other numbers"] += 1
    tries, found = sum(outcomes.values()), ", ".join(f"{n} times {kind}" for kind, n in outcomes.items() if n)
    end = "" if tries == config.flips else f"; then the time was over, {config.flips - tries} were not tried"
    what = "a flipped bit in the newest checkpoint, or a file of it missing"
    return [Row(what, tries, f"restored: {found or 'none'}{end}", not outcomes["other numbers"])]


def _metrics(reference: Path, copy: Path) -> list[Row]:
    """Deletes, cuts and damages metrics.jsonl of a finished run, and runs the command again."""
    lines = (reference / "metrics.jsonl").read_text().splitlines(keepends=True)
    cases = {
        "metrics.jsonl deleted": (None, 0),
        "metrics.jsonl cut in its last line": ("".join(lines)[:-20], 0),
        "metrics.jsonl without its last ten lines": ("".join(lines[:-10]), 0),
        "metrics.jsonl damaged in a line between": ("".join([*lines[:3], lines[3][:9] + "\n", *lines[4:]]), 1),
    }
    rows = []
    for what, (text, expected) in cases.items():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(reference, copy)
        (copy / "metrics.jsonl").unlink()
        if text is not None:
            (copy / "metrics.jsonl").write_text(text)
        status, line = finish(copy)
        told = "goes on, with a warning" if status == 0 else line.partition(": error: ")[2]
        is_good = status == expected and (status == 0 or "line 4" in line)
        rows.append(Row(what, 1, told.replace(str(copy.parent), "..."), is_good))
    return rows


def _full_disk(reference: Path, directory: Path) -> list[Row]:
    """Runs where the disk is full, and again where it is not."""
    what, workdir = "a disk that becomes full", directory / "disk"
    with _small_disk(workdir) as grow:
        if grow is None:
            limit = (_FILE, _FILE)
            status, line = finish(workdir, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
            what = "a file that may not become large enough"
        else:
            status, line = finish(workdir)
            grow()
        kept, told = checkpoints_of(workdir), line.partition(": error: ")[2]
        again, _ = finish(workdir)
        same = files_of(workdir) == files_of(reference)
    is_clear = status == 1 and ("No space left" in told or "too large" in told)
    end = "then ends as the reference" if again == 0 and same else f"then exit status {again}, the same files: {same}"
    told = told.replace(str(directory.parent), "...")[:160]
    return [Row(what, 1, f'"{told}", checkpoints {kept}; {end}', is_clear and again == 0 and same)]


@contextmanager
def _small_disk(directory: Path) -> Iterator[Any]:
    """A small disk in memory at a directory; yields a function that makes it large, or None where this is forbidden."""
    directory.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}k", "tmpfs", str(directory)]
    try:
        is_mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    grow = ["mount", "-o", "remount,size=64m", str(directory)]
    try:
        yield (lambda: subprocess.run(grow, check=True)) if is_mounted else None
    finally:
        if is_mounted:
            subprocess.run(["umount", str(directory)], check=False)


def _two_runs(reference: Path, directory: Path) -> list[Row]:
    """Starts a run where another runs, and once more when that has been killed."""
    workdir = directory / "run"
    first = start(workdir)
    while not (workdir / ".lock").exists() and first.poll() is None:
        time.sleep(0.01)
    other = directory / "link"  # the output of the second goes beside it
    other.symlink_to(workdir, target_is_directory=True)
    status, line = finish(other)
    is_refused = status == 1 and f"in use by process {first.pid}" in line
    first.wait()
    same = first.returncode == 0 and files_of(workdir) == files_of(reference)
    found = "the second is refused, the first ends as if alone" if is_refused and same else f"{status}: {line}"
    rows = [Row("two runs in one directory", 1, found, is_refused and same)]

    shutil.rmtree(workdir)
    killed = start(workdir)
    while not (workdir / "metrics.jsonl").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    status, line = finish(workdir)
    same = status == 0 and files_of(workdir) == files_of(reference)
    found = "goes on" if same else f"exit status {status}: {last_error(workdir)}"
    return [*rows, Row("a run where another was killed", 1, found, same)]


def _read_only(reference: Path, directory: Path) -> list[Row]:
    """Goes on with a run in a directory that may only be read, and again where it may be written."""
    workdir, what = directory / "run", "a read-only directory"
    with _small_disk(workdir) as grow:
        if grow is None:
            return [Row(what, 0, "not tried: mounting is forbidden here", True)]
        grow()
        shutil.copytree(reference, workdir, dirs_exist_ok=True)
        before = files_of(workdir)
        _remount(workdir, "ro")
        status, line = finish(workdir)
        _remount(workdir, "rw")
        same = files_of(workdir) == before
        again, _ = finish(workdir)
    told = line.partition(": error: ")[2].replace(str(directory.parent), "...")
    is_clear = status == 1 and "Read-only" in told
    return [Row(what, 1, f'"{told}", nothing changed: {same}', is_clear and same and again == 0)]


def _remount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)


def _vanished(reference: Path, directory: Path) -> list[Row]:
    """Removes what a run has written while it goes on."""
    rows = []
    for what, name in (("all checkpoints", "checkpoints"), ("metrics.jsonl", "metrics.jsonl"), ("the directory", "")):
        workdir = directory / f"without_{name or 'all'}"
        process = start(workdir)
        while not checkpoints_of(workdir) and process.poll() is None:
            time.sleep(0.01)
        _remove(workdir / name)
        process.wait()
        line, same = last_error(workdir), files_of(workdir) == files_of(reference)
        goes_on = process.returncode == 0 and same
        is_refused = process.returncode == 1 and "while the run went on" in line
        found = "the run ends as if they were there" if goes_on else line.partition(": error: ")[2] or line
        rows.append(
            Row(f"{what} removed during a run", 1, found.replace(str(directory.parent), "..."), goes_on or is_refused)
        )
    return rows


def _remove(path: Path) -> None:
    """Removes a file, or a directory to which something may be written meanwhile."""
    while path.exists():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


CAMPAIGN = Campaign("damaged checkpoints and metrics, full disks, two runs in one directory", run)
