"""metrics.jsonl: the lines that a run writes while it trains, and how they are read again.

A run that resumes reads the file. If it was deleted, or its last lines are missing, the run goes on with a warning. A
last line that a crash has cut is dropped with a warning. Any other line that is damaged is an error, which names the
file and the line. Lines after the step that the run resumes at are dropped, since their steps are taken again.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from experiments.runs.workdir import could_not_write, write_atomically

TRAINING = ("train", "skipped", "rollback")  # the splits of the lines that a resumed run keeps


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each with "step" and "split"."""

    def __init__(self, path: Path, *, keep_until: int):
        """Keeps the training lines up to the step `keep_until`, for a run that resumes from there; drops the rest."""
        self._path = path
        self.lines = kept_lines(path, keep_until)
        self._write_all()

    def rewind(self, step: int) -> None:
        """Drops the lines after a step, for a run that goes back there."""
        self.lines[:] = [line for line in self.lines if line["step"] <= step]
        self._write_all()

    def _write_all(self) -> None:
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, **line: Any) -> None:
        """Appends a line; where the file has vanished, writes all lines again, with a warning."""
        line = without_nan(line)
        self.lines.append(line)
        if not self._path.exists():
            warnings.warn(f"{self._path} vanished while the run went on; it is written again", stacklevel=3)
            self._write_all()
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise could_not_write(error, self._path) from error


def kept_lines(path: Path, keep_until: int) -> list[dict[str, Any]]:
    """The lines of training of a metrics.jsonl up to a step; none if there is no file.

    A warning says which lines are missing.

    Raises:
      ValueError: if a line before the last is damaged.
    """
    lines = [line for line in whole_lines(path) if line["split"] in TRAINING] if path.exists() else []
    lines = [line for line in lines if line["step"] <= keep_until]
    last = max((line["step"] for line in lines), default=0)
    if keep_until and not path.exists():
        warnings.warn(
            f"{path} is missing: the run goes on at step {keep_until} without its earlier lines", stacklevel=3
        )
    elif last < keep_until:
        warnings.warn(
            f"{path} ends at step {last}: the run goes on at step {keep_until} without the lines between", stacklevel=3
        )
    return lines


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without an incomplete last line."""
    texts, lines = path.read_bytes().split(b"\n"), []
    while texts and not texts[-1].strip():
        texts.pop()
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(_line(text))
        except ValueError as error:
            if number < len(texts):
                raise ValueError(
                    f"workdir: expected a line of metrics in line {number} of {path}: {error}; correct it, or "
                    "delete the file to go on without its lines"
                ) from error
            warnings.warn(f"{path}: line {number}, the last one, is incomplete and was dropped", stacklevel=4)
    return lines


def _line(text: bytes) -> dict[str, Any]:
    """A line; ValueError unless it is a JSON object with a step and a split."""
    line = json.loads(text)
    if not isinstance(line, dict) or type(line.get("step")) is not int or not isinstance(line.get("split"), str):
        raise ValueError(f'expected an object with "step" and "split", got {text[:60].decode(errors="replace")!r}')
    return line


def without_nan(value: Any) -> Any:
    """The same JSON with null in the place of numbers that are not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
