"""What a run writes about itself while it trains: metrics.jsonl, and the same as TensorBoard events."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.run import MetricsFile


class Metrics:
    """metrics.jsonl, and under tensorboard/ its numbers, the distributions of its lists, and pictures.

    A context manager, which closes the events.
    """

    def __init__(self, workdir: Path, *, keep_until: int):
        """Keeps what is there up to a step, for a run that goes on from there."""
        from tensorboardX import SummaryWriter

        self._file = MetricsFile(workdir / "metrics.jsonl", keep_until=keep_until)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=keep_until + 1)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._file.lines

    def write(self, *, step: int, split: str, **line: Any) -> None:
        """Appends a line to metrics.jsonl and writes it as events."""
        self._file.write(step=step, split=split, **line)
        for name, value in _flat(split, line):
            if np.ndim(value) == 0 and np.isfinite(value):
                self._events.add_scalar(name, value, step)
            elif np.ndim(value):
                self._events.add_histogram(name, np.asarray(value), step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Adds a PNG file to the events."""
        with Image.open(path) as image:
            self._events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self._events.close()


def _flat(name: str, value: Any):
    """(name, number or list) of a dict of dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}/{key}", item)
    else:
        yield name, value
