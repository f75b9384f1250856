"""The metrics that a run writes while it trains: metrics.jsonl, and the same as TensorBoard events."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.runs.metrics_file import MetricsFile, kept_lines, without_nan
from experiments.runs.workdir import could_not_write

_SHOWN = ("train", "test")  # splits whose lines have numbers to be drawn


class Metrics:
    """Writes metrics.jsonl, and under tensorboard/ its numbers, histograms of its lists, and pictures.

    Both are written immediately, not in a thread, so that a full disk raises an error in the call that met it. As a
    context manager it closes the event file.

    Raises:
      OSError: from every method, if a file cannot be written.
    """

    def __init__(self, workdir: Path, *, keep_until: int):
        """Keeps the metrics up to the step `keep_until`, for a run that resumes from there."""
        from tensorboardX.event_file_writer import EventsWriter

        self._file = MetricsFile(workdir / "metrics.jsonl", keep_until=keep_until)
        self._directory = workdir / "tensorboard"
        self._directory.mkdir(exist_ok=True)
        self._events = EventsWriter(str(self._directory / "events"), f".{time.time_ns()}")
        self._begin_at(keep_until + 1)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._file.lines

    def write(self, *, step: int, split: str, **line: Any) -> None:
        """Appends a line to metrics.jsonl and writes its finite values as events."""
        from tensorboardX import summary

        self._file.write(step=step, split=split, **line)
        for name, value in _flat(split, line) if split in _SHOWN else ():
            finite = np.asarray(value, float)
            finite = finite[np.isfinite(finite)]
            if np.ndim(value) == 0 and finite.size:
                self._add(step, summary=summary.scalar(name, finite[0]))
            elif finite.size:
                self._add(step, summary=summary.histogram(name, finite, "auto"))

    def rewind(self, step: int) -> None:
        """Drops the metrics after a step, for a run that goes back there."""
        self._file.rewind(step)
        self._begin_at(step + 1)

    def _begin_at(self, step: int) -> None:
        """Lets TensorBoard drop this step and later ones that earlier events have."""
        from tensorboardX.proto import event_pb2

        self._add(step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Adds a PNG file to the events."""
        from tensorboardX.proto.summary_pb2 import Summary

        with Image.open(path) as image:
            width, height = image.size
        content = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        self._add(step, summary=Summary(value=[Summary.Value(tag=name, image=content)]))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto import event_pb2

        try:
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
            self._events.flush()
        except OSError as error:
            raise could_not_write(error, self._directory) from error


class NullMetrics:
    """`Metrics` of the processes other than the first: keeps the same lines and writes nothing."""

    def __init__(self, workdir: Path, *, keep_until: int):
        self.lines = kept_lines(workdir / "metrics.jsonl", keep_until)

    def write(self, **line: Any) -> None:
        """Keeps a line."""
        self.lines.append(without_nan(line))

    def rewind(self, step: int) -> None:
        """Drops the lines after a step."""
        self.lines = [line for line in self.lines if line["step"] <= step]

    def picture(self, step: int, name: str, path: Path) -> None:
        """Does nothing: the first process draws the pictures."""

    def __enter__(self) -> "NullMetrics":
        return self

    def __exit__(self, *exception) -> None:
        pass


def _flat(name: str, value: Any):
    """Yields (name, number or list) for each leaf of nested dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}/{key}", item)
    else:
        yield name, value
