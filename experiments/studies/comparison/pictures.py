"""The picture of the comparison: a row of samples for each model, below a row of the data."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.runs.pictures import Row, save_figure, save_rows

BINS = 64


def save_image_rows(path: Path, rows: Mapping[str, np.ndarray], number: int = 16) -> None:
    """Draws a row of images [N, H, W, C] for each name."""
    number = min(number, *(len(images) for images in rows.values()))
    save_rows(path, [Row(name, images[:number]) for name, images in rows.items()])


def save_densities(
    path: Path,
    columns: Mapping[str, Mapping[str, np.ndarray]],
    elements: Sequence[tuple[int, int]] = ((0, 1),),
    names_of: Sequence[str] | None = None,
) -> None:
    """Draws histograms of two elements of vectors [N, D]; a row for each name, columns for data sets and for pairs.

    Args:
      path: path of the PNG file.
      columns: {data set: {name: vectors}}; its first entry sets the limits of a column.
      elements: the pairs of elements of each data set that are drawn.
      names_of: names of the elements, for titles in the place of those of the data sets.
    """
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    panels = [(data, pair) for data in columns for pair in elements]
    size = 1.6 * len(panels) + 1.2, 1.6 * len(names) + 0.3
    figure, axes = plt.subplots(len(names), len(panels), figsize=size, squeeze=False, layout="constrained")
    for column, (data, (first, second)) in enumerate(panels):
        reference = next(iter(columns[data].values()))[:, [first, second]]
        low, high = np.percentile(reference, [0.5, 99.5], axis=0)
        low, high = low - 0.15 * (high - low), high + 0.15 * (high - low)
        for row, name in enumerate(names):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            if name in columns[data]:
                points = np.nan_to_num(columns[data][name][:, [first, second]], nan=1e30, posinf=1e30, neginf=-1e30)
                box = list(zip(low, high, strict=True))
                counts, _, _ = np.histogram2d(*points.T.astype(np.float64), bins=BINS, range=box)
                axis.imshow(np.sqrt(counts).T, origin="lower", aspect="auto", cmap="viridis")
            if row == 0:
                title = data if names_of is None else f"{names_of[second]} against {names_of[first]}"
                axis.set_title(title, fontsize=8)
            if column == 0:
                axis.set_ylabel(name, fontsize=8)
    save_figure(figure, path)
