"""The table of the comparison: seven measurements of 53917 diamonds, which the wheel of plotnine ships.

    carat, depth (%), table (%), price (dollars), and the sides x, y, z (mm)

The file rounds its values, and a density of rounded values has no bound. Each column gets uniform noise of the width of
its resolution, drawn once with a fixed seed. `table` is given to 0.1, but 98 % of its values are whole, so that its
noise has width 1. Rows with a side of 0 or above 20 mm hold no measurement; there are 20 and 3 of them. The rows are
divided by a fixed permutation, 80, 10 and 10 %, and the columns standardised by the training split. Densities are
those of the standardised columns.
"""

import csv
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from resflow_jax.data.vectors import VectorSplits

# The resolution of each column, in its own unit.
RESOLUTIONS = {"carat": 0.01, "depth": 0.1, "table": 1.0, "price": 1.0, "x": 0.01, "y": 0.01, "z": 0.01}
LARGEST_SIDE = 20.0  # mm


@lru_cache
def load_diamonds() -> VectorSplits:
    """The dequantised and standardised columns [N, 7] in float32, in three splits.

    Raises:
      ImportError: if plotnine is not installed. Only its file is read; it is not imported.
    """
    return divided(dequantized(read(_path())))


def _path() -> Path:
    found = find_spec("plotnine")
    if found is None:
        raise ImportError("diamonds: expected plotnine, which ships the table: pip install resflow_jax[bench]")
    return Path(found.origin).parent / "data" / "diamonds.csv"


def read(path: Path) -> np.ndarray:
    """The rows of the file that are measurements, [N, 7] in float64."""
    with path.open(newline="") as file:
        table = np.array([[float(row[name]) for name in RESOLUTIONS] for row in csv.DictReader(file)])
    sides = table[:, -3:]
    return table[((sides > 0) & (sides <= LARGEST_SIDE)).all(axis=1)]


def dequantized(table: np.ndarray) -> np.ndarray:
    """The table with uniform noise of the width of each column's resolution, around the rounded value."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, table.shape)
    return table + noise * np.array(list(RESOLUTIONS.values()))


def divided(table: np.ndarray) -> VectorSplits:
    """Training, validation and test rows, 80, 10 and 10 %, standardised by the first."""
    rows = np.random.default_rng(1).permutation(table)
    tenth = len(rows) // 10
    test, validation, train = rows[:tenth], rows[tenth : 2 * tenth], rows[2 * tenth :]
    mean, std = train.mean(axis=0), train.std(axis=0)
    return VectorSplits(*(((part - mean) / std).astype(np.float32) for part in (train, validation, test)))
