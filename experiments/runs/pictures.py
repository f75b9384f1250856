"""The pictures of an experiment: grids of images, curves, two-dimensional densities."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from experiments.runs.names import without_math
from experiments.runs.workdir import result_file
from resflow_jax import plot
from resflow_jax.plot import as_shown, image_grid


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as a PNG file, or replaces it as a whole, and closes the figure."""
    with result_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


def save_grid(path: Path, images: np.ndarray, columns: int) -> None:
    """Writes images [N, H, W, C] in [0, 1] as one PNG; small images are enlarged, NaN is drawn grey."""
    grid = np.clip(np.nan_to_num(image_grid(np.asarray(images), columns), nan=0.5), 0, 1)
    grid = np.rint(255 * grid).astype(np.uint8)
    zoom = max(1, 600 // len(grid))
    save_png(path, grid.repeat(zoom, axis=0).repeat(zoom, axis=1))


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes bytes [H, W, C], of one channel or in colour, as a PNG file, or replaces it as a whole."""
    with result_file(path) as temporary:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, "PNG")


def save_scatter(path: Path, data: np.ndarray, samples: np.ndarray, title: str) -> None:
    """Draws data [N, D] and the finite samples of [M, D], each of the first five elements against the next."""
    shown = min(data.shape[1], 5)
    pairs = [(n, n + 1) for n in range(shown - 1)] or [(0, 0)]
    figure, axes = plt.subplots(1, len(pairs), figsize=(3.6 * len(pairs), 3.9), squeeze=False, layout="constrained")
    for axis, (x, y) in zip(axes[0], pairs, strict=True):
        for points, label in ((data, "data"), (samples, "samples")):
            plot.samples(points, axis, elements=(x, y), label=label)
        # Limits are set by the data: early in training samples may be far away.
        low, margin = data.min(axis=0), 0.3 * np.ptp(data, axis=0)
        high = low + np.ptp(data, axis=0)
        axis.set_xlim(low[x] - margin[x], high[x] + margin[x])
        if x != y:
            axis.set_ylim(low[y] - margin[y], high[y] + margin[y])
    axes[0, 0].legend(markerscale=4)
    figure.suptitle(without_math(title))
    save_figure(figure, path)


def save_images(path: Path, rows: dict[str, np.ndarray], columns: int) -> None:
    """Writes one titled grid of images [N, H, W, C] in [0, 1] for each entry, side by side."""
    figure, axes = plt.subplots(1, len(rows), figsize=(4.5 * len(rows), 4.8), squeeze=False, layout="constrained")
    for axis, (title, images) in zip(axes[0], rows.items(), strict=True):
        plot.samples(np.asarray(images), axis, columns=columns)
        axis.set_title(title)
    save_figure(figure, path)


class Row(NamedTuple):
    """A titled row of images [N, H, W, C]; values outside [0, 1] are clipped, those that are not finite are grey."""

    title: str
    images: np.ndarray


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Draws rows of equally many images, each below its title."""
    number = len(rows[0].images)
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.85 * number, 1.2 * len(rows)), layout="constrained")
    for axis, row in zip(np.atleast_1d(axes), rows, strict=True):
        images = as_shown(np.asarray(row.images, np.float64))
        images = np.clip(np.where(np.isfinite(images), images, 0.5), 0, 1)
        grid = image_grid(images, number)
        axis.imshow(grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(row.title, fontsize=9, loc="left", pad=3)
    save_figure(figure, path)


def save_strip(path: Path, images: np.ndarray, labels: Sequence[str], title: str) -> None:
    """Writes images [N, H, W, C] in [0, 1] in one row, each with its label below."""
    figure, axes = plt.subplots(1, len(images), figsize=(1.1 * len(images), 1.7), squeeze=False, layout="constrained")
    for axis, image, label in zip(axes[0], as_shown(images), labels, strict=True):
        axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], xlabel=label)
    figure.suptitle(without_math(title), fontsize=10)
    save_figure(figure, path)


def save_curves(
    path: Path, metrics: list[dict], *, metric: str, trained: str, label: str, unit: str, title: str
) -> None:
    """Draws a metric of training and validation against the step, and the final test value if it is finite.

    If training logs another metric than validation, it has a panel of its own.
    """
    judged = f"validation_{metric}"
    train = np.array([(m["step"], m[trained]) for m in metrics if m["split"] == "train"], float).reshape(-1, 2)
    validation = np.array([(m["step"], m[judged]) for m in metrics if judged in m], float).reshape(-1, 2)
    test = [m for m in metrics if m["split"] == "test" and None not in (m[metric], m[f"{metric}_stderr"])]
    panels = 1 + (trained != metric)
    figure, axes = plt.subplots(panels, 1, figsize=(7, 4.2 if panels == 1 else 6), sharex=True, layout="constrained")
    losses, axis = np.atleast_1d(axes)[0], np.atleast_1d(axes)[-1]
    few = len(train) < 20
    losses.plot(*train.T, ".-" if few else "-", color="C0", alpha=0.35, lw=0.8, label="train, batches")
    if not few:
        width = max(len(train) // 40, 2)
        losses.plot(*trailing_mean(train, width).T, color="C0", lw=1.5, label=f"train, mean of the last {width}")
    axis.plot(*validation.T, "o-", color="C1", ms=3, label="validation, averaged weights")
    for m in test:
        text = f"test, {m[metric]:.3f} $\\pm$ {m[f'{metric}_stderr']:.3f}"
        axis.errorbar(m["step"], m[metric], m[f"{metric}_stderr"], fmt="*", color="C3", ms=9, label=text)
    late = train[len(train) // 20 :, 1]
    _set_limits(losses, late if panels == 2 else np.concatenate([late, validation[:, 1]]))
    if panels == 2:
        losses.set(ylabel=f"training loss, {unit}")
    axis.set(xlabel="step", ylabel=label)
    losses.set(title=without_math(title))
    for panel in {losses, axis}:
        panel.grid(alpha=0.3)
        panel.legend()
    save_figure(figure, path)


def _set_limits(axis: plt.Axes, values: np.ndarray) -> None:
    """Limits of the vertical axis around all values but the most extreme."""
    values = values[np.isfinite(values)]
    if len(values):
        low, high = np.percentile(values, [1, 99])
        axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)


def save_confusion(path: Path, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], title: str) -> None:
    """Draws the number of examples by class (rows) and predicted class (columns); the diagonal is right."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predicted), 1)
    figure, axis = plt.subplots(figsize=(6.4, 6), layout="constrained")
    axis.imshow(counts / np.maximum(1, counts.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:
        ticks = {"ticks": range(len(names)), "labels": [without_math(name[:12]) for name in names]}
        axis.set_xticks(**ticks, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(**ticks)
        for row, column in zip(*np.nonzero(counts), strict=True):
            share = counts[row, column] / counts[row].sum()
            color = "white" if share > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", fontsize=8, color=color)
    title = f"{without_math(title)}: {np.mean(labels != predicted):.2%} wrong"
    axis.set(xlabel="predicted class", ylabel="class", title=title)
    save_figure(figure, path)


def save_densities(
    path: Path,
    data: np.ndarray,
    density: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
    samples: np.ndarray,
    titles: dict[str, str],
) -> None:
    """Draws data [N, 2], a density [y, x] on a grid over a box and samples [M, 2] side by side.

    The panels share their axes, around the data, and their colour scale.
    """
    half = 1.08 * np.abs(data).max()
    limits = (-half, half)
    counts, edges, _ = np.histogram2d(*data.T, bins=120, range=[limits, limits], density=True)
    top = np.percentile(counts[counts > 0], 99)
    style = {"cmap": "viridis", "vmin": 0, "vmax": top, "origin": "lower"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.7), sharex=True, sharey=True, layout="constrained")
    axes[0].imshow(counts.T, extent=(*limits, *limits), **style)
    (left, bottom), (right, upper) = box
    axes[1].imshow(density, extent=(left, right, bottom, upper), interpolation="bilinear", **style)
    sampled, _, _ = np.histogram2d(*samples.T, bins=edges, density=True)
    axes[2].imshow(sampled.T, extent=(*limits, *limits), **style)
    for axis, name in zip(axes, ("data", "density", "samples"), strict=True):
        axis.set(xlim=limits, ylim=limits, aspect="equal", facecolor=plt.get_cmap("viridis")(0.0))
        axis.set_title(titles[name])
    save_figure(figure, path)


def save_histograms(path: Path, panels: dict[str, dict[str, np.ndarray]], title: str) -> None:
    """Draws a panel for each quantity: the histogram of each named set of scores [N] on common bins, as a density.

    Scores that are not finite are left out; the legend counts them.
    """
    size = 7 * len(panels) ** 0.75, 4.2
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (quantity, scores) in zip(axes[0], panels.items(), strict=True):
        finite = {name: values[np.isfinite(values)] for name, values in scores.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins=60)
        for name, values in finite.items():
            left_out = len(scores[name]) - len(values)
            label = without_math(name) + (f" ({left_out} not finite)" if left_out else "")
            weights = np.full(len(values), 1 / max(1, len(values)))
            axis.hist(
                values, bins=edges, weights=weights / np.diff(edges)[0], histtype="stepfilled", alpha=0.5, label=label
            )
        axis.set(xlabel=quantity, ylabel="density of examples")
        axis.grid(alpha=0.3)
        axis.legend()
    if len(panels) == 1:
        axes[0, 0].set_title(without_math(title))
    else:
        figure.suptitle(without_math(title))
    save_figure(figure, path)


def trailing_mean(points: np.ndarray, width: int) -> np.ndarray:
    """Trailing means over `width` values of points (step, value) [N, 2]: [N - width + 1, 2]."""
    smooth = np.convolve(points[:, 1], np.ones(width) / width, "valid")
    return np.stack([points[width - 1 :, 0], smooth], axis=1)
