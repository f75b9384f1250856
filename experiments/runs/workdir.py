"""The work directory of a run: config.json and data.json, the check that a run may use it, atomic writes of files."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from resflow_jax.io.config_json import as_document, as_json, completed, parsed, upgraded
from resflow_jax.io.whole_files import whole_file

# Settings that may differ when a run is resumed. Up to rounding they change neither the model nor a step; only the
# number of steps changes the learning-rate schedule from there on, and a device's share of a batch that the estimator's
# `subsample` does not divide changes which examples go on after the exact terms. `data.path` may differ too where
# data.json shows that the data are the same.
MAY_CHANGE = (
    "steps",
    "workdir",
    "parallel",
    "mesh.data",
    "mesh.model",
    "mesh.parameters",
    "distributed.auto",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "distributed.timeout",
    "log_every",
    "save_every",
    "safety.skips",
    "safety.rollbacks",
    "data.dir",
    "data.threads",
    "data.workers",
    "evaluation.draws",
    "evaluation.patience",
)
_DATA = "data.json"
# The types of the config.json that commands write. One of another type is of another program, and is not replaced.
_TYPES = (
    "BiasConfig",
    "ClassifyConfig",
    "ConditionalConfig",
    "DensityConfig",
    "ImportedClassifyConfig",
    "SteepConfig",
    "ToyConfig",
    "VariationalConfig",
    "VectorsConfig",
)


def make_workdir(workdir: Path) -> None:
    """Makes the directory unless it is there.

    Raises:
      NotADirectoryError: if the path is a file.
      OSError: if the directory cannot be made.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir: expected a directory, got the file {workdir}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"workdir: could not make {workdir}: {error.strerror}") from error


def claim_workdir(workdir: Path, config: Any, data: dict[str, Any] | None = None) -> None:
    """Makes the directory and writes config.json and data.json, or checks that this run may resume there.

    If nothing has been trained there yet, another config replaces the old one.

    Args:
      workdir: the directory.
      config: the config.
      data: what `experiments.runs.fingerprint.fingerprint` says of the run's data; None if they are not known. A run
        of before data.json goes on with what is in their place.

    Raises:
      FileExistsError: if the directory holds metrics or checkpoints that no config.json accounts for, or a config.json
        of another program.
      ValueError: if the directory holds a run of another config or on other data; the message lists the differences.
      NotADirectoryError: if the path is a file.
      OSError: if the directory cannot be made or written to.
    """
    make_workdir(workdir)
    path, has_results = workdir / "config.json", _has_results(workdir)
    if path.exists():
        try:
            old = completed(upgraded(parsed(path.read_text())), config)
        except ValueError as error:
            raise ValueError(f"workdir: expected the config of a run in {path}, could not read it: {error}") from error
        if not isinstance(old, dict) or old.get("type") not in (*_TYPES, type(config).__name__):
            raise FileExistsError(
                f"workdir: expected a new directory or that of a run, got {workdir} with another config.json"
            )
        are_compared = data is not None and (workdir / _DATA).exists()
        may_change = (*MAY_CHANGE, "data.path") if are_compared else MAY_CHANGE
        differences = [d for d in config_differences(old, as_json(config)) if d.split(":")[0] not in may_change]
        if differences and has_results:
            raise ValueError(
                f"workdir: {workdir} holds a run of another config; name another --workdir, or use its settings:\n  "
                + "\n  ".join(differences)
            )
        if are_compared and has_results:
            check_data(workdir, config.data, data)
    elif (workdir / "metrics.jsonl").exists() or (workdir / "checkpoints").exists():
        raise FileExistsError(f"workdir: expected a new directory or that of a run, got {workdir} without config.json")
    if data:
        write_atomically(workdir / _DATA, json.dumps(data, indent=2) + "\n")
    elif not has_results:
        (workdir / _DATA).unlink(missing_ok=True)
    write_atomically(path, json.dumps(as_document(config), indent=2) + "\n")


def check_data(workdir: Path, settings: Any, data: dict[str, Any]) -> None:
    """Holds the data of a run against data.json in its work directory; a run of before that file has none.

    Args:
      workdir: the directory.
      settings: the data settings of the run's config, for messages.
      data: what `experiments.runs.fingerprint.fingerprint` says of the run's data.

    Raises:
      ValueError: if the data are others than those that the run began with; the message lists the differences.
    """
    path = workdir / _DATA
    if not path.exists():
        return
    try:
        differences = list(config_differences(parsed(path.read_text()), data))
    except ValueError as error:
        raise ValueError(
            f"data: expected what a run's data are known by in {path}, could not read it: {error}"
        ) from error
    if differences:
        raise ValueError(
            f"data: expected those that the run in {workdir} began with, got others in "
            f"{getattr(settings, 'path', None) or settings}; test examples of these may be training examples of those. "
            f"Put them back, or begin a new run. Without {path} the run takes them as they are:\n  "
            + "\n  ".join(differences)
        )


def check_still_there(workdir: Path) -> None:
    """Raises FileNotFoundError if the work directory of the run that goes on, or what is in it, has been removed."""
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(
            errno.ENOENT, "workdir: removed, or moved, while the run went on; nothing more is written", str(workdir)
        )


def _has_results(workdir: Path) -> bool:
    """Whether a run has written results that would be lost."""
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    has_lines = metrics.exists() and metrics.stat().st_size > 0
    return has_lines or (checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()))


def config_differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Lines "name: old there, new now", one for each setting that differs, for two configs as JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from config_differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield f"{name}: {old!r} there, {new!r} now"


@contextmanager
def result_file(path: Path) -> Iterator[Path]:
    """`whole_file`, whose errors name the file and say that earlier ones are intact."""
    try:
        with whole_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise could_not_write(error, path) from error


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that a crash leaves the old or the new one."""
    with result_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_arrays(path: Path, /, **arrays: Any) -> None:
    """Writes a .npz file, or replaces it as a whole."""
    with result_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def could_not_write(error: OSError, path: Path) -> OSError:
    """The error with the name of the file that could not be written, which the error of a full disk lacks."""
    rest = "earlier files are intact" if path.parent.exists() else "its directory was removed while the run went on"
    return OSError(error.errno, f"{error.strerror or error}; could not write it, {rest}", str(path))
