"""The pictures of the studies of classifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.runs.pictures import save_figure


def save_iterations(path: Path, counts: Sequence[int], curves: dict[str, dict[str, list[float]]], title: str) -> None:
    """Draws the maximum error against the number of iterations for each named curve, and the median dashed."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for n, (name, errors) in enumerate(curves.items()):
        axis.plot(counts, errors["max"], "o-", ms=4, color=f"C{n}", label=name)
        axis.plot(counts, errors["median"], "--", lw=1, color=f"C{n}")
    axis.plot([], [], "--", lw=1, color="grey", label="median over images")
    axis.set(xlabel="evaluations of g in every block, n", ylabel="max |x - x$_n$|", yscale="log", title=title)
    axis.set_xticks(counts, map(str, counts))
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def save_comparison(path: Path, results: dict[str, dict[str, Any]], title: str) -> None:
    """Draws a panel for each part of the study of classifiers: {part: {title: {"mean": ..., "stderr": ...}}}.

    The architectures and few labels as errors in %, the hybrids as error against bits/dim; all with standard errors.
    """
    panels = {"architectures": _errors, "hybrid": _error_against_bits, "labels": _errors}
    figure, axes = plt.subplots(1, len(results), figsize=(5.4 * len(results), 4.2), layout="constrained", squeeze=False)
    for axis, (part, rows) in zip(axes[0], results.items(), strict=True):
        panels[part](axis, rows)
        axis.set_title(f"{title}: {part}")
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def _errors(axis: plt.Axes, rows: dict[str, Any]) -> None:
    """Points with error bars, one line for each network."""
    for n, (name, row) in enumerate(rows.items()):
        _point(axis, name, row["mean"]["error"], n, xerr=row["stderr"]["error"])
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("test error in %")


def _error_against_bits(axis: plt.Axes, rows: dict[str, Any]) -> None:
    """A point for each network with a finite density."""
    for name, row in rows.items():
        mean, stderr = row["mean"], row["stderr"]
        if mean.get("bits_per_dim") is not None:
            spread = {"xerr": stderr["bits_per_dim"], "yerr": stderr["error"]}
            _point(axis, name, mean["bits_per_dim"], mean["error"], **spread)
    axis.set(xlabel="test bits/dim", ylabel="test error in %")
    axis.set_ylim(bottom=0)
    axis.legend()


def _point(axis: plt.Axes, name: str, x: float, y: float, **spread: float | None) -> None:
    """A mean with its standard errors."""
    axis.errorbar(x, y, fmt="o", ms=6, capsize=4, label=name, **spread)
