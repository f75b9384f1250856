"""The pictures of an experiment: grids of images, curves, two-dimensional densities."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from experiments.runs.names import without_math
from resflow_jax import plot
from resflow_jax.plot import as_shown, image_grid


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as a PNG file, and closes it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_grid(path: Path, images: np.ndarray, columns: int) -> None:
    """Writes images [N, H, W, C] in [0, 1] as one PNG; small images are enlarged, NaN is drawn grey."""
    grid = np.clip(np.nan_to_num(image_grid(np.asarray(images), columns), nan=0.5), 0, 1)
    grid = np.rint(255 * grid).astype(np.uint8)
    zoom = max(1, 600 // len(grid))
    Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).resize(
        (zoom * grid.shape[1], zoom * grid.shape[0]), Image.Resampling.NEAREST
    ).save(path)


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
    """Draws a metric of training and validation against the step, and the final test value.

    If training logs another metric than validation, it has a panel of its own.
    """
    judged = f"validation_{metric}"
    train = np.array([(m["step"], m[trained]) for m in metrics if m["split"] == "train"], float).reshape(-1, 2)
    validation = np.array([(m["step"], m[judged]) for m in metrics if judged in m], float).reshape(-1, 2)
    test = [m for m in metrics if m["split"] == "test"]
    panels = 1 + (trained != metric)
    figure, axes = plt.subplots(panels, 1, figsize=(7, 4.2 if panels == 1 else 6), sharex=True, layout="constrained")
    losses, axis = np.atleast_1d(axes)[0], np.atleast_1d(axes)[-1]
    few = len(train) < 20
    losses.plot(*train.T, ".-" if few else "-", color="C0", alpha=0.35, lw=0.8, label="train, batches")
    if not few:
        width = max(len(train) // 40, 2)
        losses.plot(*_trailing_mean(train, width).T, color="C0", lw=1.5, label=f"train, mean of the last {width}")
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


def save_bias_curves(path: Path, metrics: list[dict], titles: dict[str, str]) -> None:
    """Draws, for each titled run, the training estimate and the exact test value of bits/dim against the step.

    A second panel shows the estimate minus the exact value, for the same test images.
    """
    figure, (axis, gaps) = plt.subplots(
        1, 2, figsize=(12, 4.6), layout="constrained", gridspec_kw={"width_ratios": (3, 2)}
    )
    values = []
    for n, (run, title) in enumerate(titles.items()):
        lines = [m for m in metrics if m["run"] == run]
        train = np.array([(m["step"], m["bits_per_dim"]) for m in lines if m["split"] == "train"])
        train = _trailing_mean(train, max(len(train) // 20, 1))
        step, exact, gap, stderr = np.array(
            [(m["step"], m["bits_per_dim"], m["gap"], m["gap_stderr"]) for m in lines if m["split"] == "test"]
        ).T
        color = ("C3", "C0")[n]
        axis.plot(*train.T, color=color, lw=1.2, label=f"{title}: training estimate")
        axis.plot(step, exact + gap, "^:", color=color, ms=4, mfc="none", label=f"{title}: estimate, test images")
        axis.plot(step, exact, "o--", color=color, ms=4, label=f"{title}: exact, test images")
        gaps.errorbar(step, gap, stderr, fmt="o-", color=color, ms=4, capsize=3, label=title)
        values += [train[len(train) // 10 :, 1], exact]
    low, high = np.min(np.concatenate(values)), np.max(np.concatenate(values))
    axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    gaps.axhline(0, color="black", lw=0.8)
    axis.set(xlabel="step", ylabel="bits/dim", title="digits: trained with a biased and with an unbiased log-det")
    gaps.set(xlabel="step", ylabel="bits/dim", title="estimate - exact, same test images")
    for a in (axis, gaps):
        a.grid(alpha=0.3)
        a.legend()
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


def save_bars(path: Path, values: dict[str, dict[str, float]], title: str) -> None:
    """Draws {group: {name: value}} as one panel of horizontal bars per group, on a common logarithmic axis.

    The axis begins at 1e-3, or at the least value if that is larger. There are at most five panels in a row.
    """
    found = [value for bars in values.values() for value in bars.values()]
    columns = min(len(values), 5)
    rows = -(-len(values) // columns)
    size = 3 + 2.6 * columns, 4.2 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(values) :]:
        axis.set_visible(False)
    for number, (group, bars) in enumerate(values.items()):
        axis, names = axes.flat[number], list(bars)
        axis.barh(names, list(bars.values()), color=[f"C{n}" for n in range(len(names))])
        axis.set_xscale("log")
        axis.set_xlim(max(min(found) / 2, 1e-3), 2 * max(found))
        axis.axvline(1, color="black", lw=0.8)
        axis.invert_yaxis()
        axis.set_title(textwrap.fill(group, 24), fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", labelleft=number % columns == 0)
    figure.suptitle(title)
    save_figure(figure, path)


def save_error_curves(path: Path, iterations: Sequence[int], errors: dict[str, list[float]], title: str) -> None:
    """Draws named curves of errors, on a logarithmic axis, against iterations."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in errors.items():
        axis.plot(iterations, values, "o-", ms=4, label=name)
    axis.set(xlabel="evaluations of g in every block", ylabel="max |x - f$^{-1}$(f(x))|", yscale="log", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
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


def save_fits(path: Path, x: np.ndarray, target: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    """Draws each curve [N] over x [N] in a panel of its own, on the dashed target."""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3.4), sharey=True, layout="constrained")
    for axis, (title, values) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        axis.plot(x, target, "k--", linewidth=1, label="target")
        axis.plot(x, values, linewidth=1.5, label="learned")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("x")
    np.atleast_1d(axes)[0].legend()
    save_figure(figure, path)


def _trailing_mean(points: np.ndarray, width: int) -> np.ndarray:
    """Trailing means over `width` values of points (step, value) [N, 2]: [N - width + 1, 2]."""
    smooth = np.convolve(points[:, 1], np.ones(width) / width, "valid")
    return np.stack([points[width - 1 :, 0], smooth], axis=1)


def save_scaling(path: Path, result: dict[str, dict[str, Any]]) -> None:
    """Draws time and memory of a training step against each setting on logarithmic axes, with fitted exponents."""
    figure, axes = plt.subplots(2, len(result), figsize=(3.2 * len(result), 5.2), squeeze=False, layout="constrained")
    for column, (name, found) in enumerate(result.items()):
        rows = (("seconds", 1e3, "ms a step", "time"), ("bytes", 1e-6, "MB a device", "memory"))
        for row, (key, scale, unit, kind) in enumerate(rows):
            ax, values = axes[row, column], np.asarray(found["values"], float)
            measured, exponent = scale * np.asarray(found[key]), found[f"{kind}_exponent"]
            line = np.exp(np.mean(np.log(measured)) + exponent * (np.log(values) - np.mean(np.log(values))))
            ax.loglog(values, measured, "o", color="C0")
            ax.loglog(values, line, "-", color="C1", label=f"{name}$^{{{exponent:.2f}}}$")
            ax.set(xlabel=name, ylabel=unit if column == 0 else None, title=kind if column == 0 else None)
            ax.set_xticks(values, [f"{value:g}" for value in values])
            ax.set_yticks(measured, [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in measured])
            ax.minorticks_off()
            ax.legend()
    save_figure(figure, path)


def save_posteriors(
    path: Path,
    samples: dict[str, list[np.ndarray]],
    observed: np.ndarray,
    title: str,
    circle: Callable[[np.ndarray], tuple[np.ndarray, float]] | None = None,
) -> None:
    """Draws the first two elements of samples [N, D], with a row for each name and a column for each x of `observed`.

    Axis limits of a column are set by its first row. circle(x) gives the centre and radius of a circle to draw.
    """
    shape = len(samples), len(observed)
    figure, axes = plt.subplots(*shape, figsize=(2.2 * shape[1] + 0.4, 2.2 * shape[0] + 0.4), layout="constrained")
    reference = next(iter(samples.values()))
    for n, (row, (name, posteriors)) in enumerate(zip(axes, samples.items(), strict=True)):
        for axis, theta, truth, x in zip(row, posteriors, reference, observed, strict=True):
            axis.plot(theta[:, 0], theta[:, 1], ".", ms=1.5, alpha=0.5, color=f"C{n}")
            if circle is not None:
                axis.add_patch(plt.Circle(*circle(x), fill=False, color="black", lw=1))
            middle = (truth[:, :2].max(axis=0) + truth[:, :2].min(axis=0)) / 2
            half = 0.65 * np.ptp(truth[:, :2], axis=0).max()
            axis.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
            axis.set_aspect("equal")
            axis.tick_params(labelsize=6)
            if n == 0:
                axis.set_title("x = " + ", ".join(f"{value:.2f}" for value in x[:2]), fontsize=8)
        row[0].set_ylabel(name)
    figure.suptitle(f"{title}: posterior samples at {len(observed)} observations")
    save_figure(figure, path)
