"""metrics.jsonl: the lines that a run writes while it trains, and how they are read again."""

import json
import math
from pathlib import Path
from typing import Any

from experiments.runs.workdir import could_not_write, write_atomically


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each with "step" and "split"."""

    def __init__(self, path: Path, *, keep_until: int):
        """Keeps the training lines up to the step `keep_until`, for a run that resumes from there; drops the rest."""
        self._path = path
        self.lines = kept_lines(path, keep_until)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, **line: Any) -> None:
        """Appends a line."""
        line = without_nan(line)
        self.lines.append(line)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise could_not_write(error, self._path) from error


def kept_lines(path: Path, keep_until: int) -> list[dict[str, Any]]:
    """The training lines of a metrics.jsonl up to a step; none if there is no file."""
    lines = _whole_lines(path) if path.exists() else []
    return [line for line in lines if line["step"] <= keep_until and line["split"] == "train"]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without an incomplete last line."""
    texts, lines = path.read_text().splitlines(), []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise ValueError(f"workdir: expected JSON in line {number} of {path}: {error}") from error
    return lines


def without_nan(value: Any) -> Any:
    """The values of a line, with None for those that are not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
