"""Pictures of flows for matplotlib: samples, a density in the plane, the loss curves of a training run.

Every function draws on the given Axes, by default the current ones, and returns them. A function is deterministic for
a given key. matplotlib is an extra: pip install 'resflow_jax[plot]'.

Example:
  >>> import matplotlib; matplotlib.use("Agg")
  >>> rf.plot.samples(np.zeros((10, 2))).get_xlabel()
  'element 0'
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from resflow_jax.functional.checks import as_host_array, as_key, check_choice, check_count, check_finite, check_type
from resflow_jax.functional.estimators import Estimator
from resflow_jax.models.flow import Flow
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.history import History

Array = jax.Array
Box = tuple[tuple[float, float], tuple[float, float]]

_IMAGES, _POINTS = 16, 1000  # samples of a flow, by default


def samples(
    x: Any,
    ax: Any = None,
    *,
    key: Array | int = 0,
    number: int | None = None,
    condition: Any = None,
    elements: tuple[int, int] = (0, 1),
    columns: int | None = None,
    **options: Any,
) -> Any:
    """Draws samples: images as a grid, vectors as points of two of their elements, single numbers as a histogram.

    Args:
      x: images [N, H, W, C] in [0, 1], vectors [N, D], or a flow to draw them from, by `Flow.sample`. With two channels
        the first is shown, with more than three the first three. Points that are not finite are left out; such pixels
        are grey.
      ax: Axes; by default the current ones.
      key: PRNG key, or an integer seed, of a flow's samples.
      number: number of a flow's samples; by default 16 images, 1000 vectors.
      condition: for a conditional flow, as in `Flow.sample`.
      elements: the two elements of the vectors that are drawn along the axes.
      columns: columns of the grid of images; by default about as many as rows.
      options: for Axes.imshow, Axes.plot or Axes.hist.

    Returns:
      The Axes.

    Cost: none for given samples; `Flow.sample` for a flow.

    Raises:
      ValueError: for a bad argument; the message names it.
      ImportError: without matplotlib.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> import numpy as np, resflow_jax as rf
      >>> ax = rf.plot.samples(np.random.default_rng(0).normal(size=(100, 3)), elements=(0, 2), label="data")
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('element 0', 'element 2')
    """
    if isinstance(x, Flow):
        if number is None:
            number = _IMAGES if len(x.event_shape) == 3 else _POINTS
        check_count("number", number, 1)
        x = x.sample(as_key("key", key), number, condition=condition)
    elif number is not None or condition is not None:
        raise ValueError("x: expected a flow together with number or condition, got samples")
    values = np.asarray(as_host_array("x", x, "a flow, images [N, H, W, C] or vectors [N, D]"))
    if values.ndim not in (2, 4) or not values.size:
        raise ValueError(f"x: expected a flow, images [N, H, W, C] or vectors [N, D], got shape {values.shape}")
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"x: expected floats, images in [0, 1], got dtype {values.dtype}")
    if values.ndim == 4:
        columns = math.ceil(math.sqrt(len(values))) if columns is None else columns
        check_count("columns", columns, 1)
        ax = _axes(ax)
        grid = np.clip(np.nan_to_num(image_grid(values, columns), nan=0.5), 0, 1)
        ax.imshow(grid.squeeze(-1) if grid.shape[-1] == 1 else grid, **{"cmap": "gray", "vmin": 0, "vmax": 1} | options)
        ax.axis("off")
        return ax
    values = values[np.isfinite(values).all(axis=1)]
    if values.shape[1] == 1:
        ax = _axes(ax)
        ax.hist(values[:, 0], **{"bins": 60, "density": True, "alpha": 0.5} | options)
        ax.set(xlabel="element 0", ylabel="density")
        return ax
    first, second = _elements(elements, values.shape[1])
    ax = _axes(ax)
    ax.plot(values[:, first], values[:, second], **{"ls": "", "marker": ".", "ms": 2, "alpha": 0.6} | options)
    ax.set(xlabel=f"element {first}", ylabel=f"element {second}")
    return ax


def density(
    flow: Flow,
    ax: Any = None,
    *,
    box: Box | None = None,
    cells: int = 100,
    condition: Any = None,
    estimator: Estimator | None = None,
    key: Array | int = 0,
    **options: Any,
) -> Any:
    """Draws the density of a flow in the plane, p(x) of x [2], on a grid of cells x cells points.

    Cost: `Flow.log_prob` of cells^2 points, by default with the exact log-det; without a box also 1000 samples.

    Args:
      flow: a flow of vectors of two elements.
      ax: Axes; by default the current ones.
      box: ((left, right), (bottom, top)) of the grid; by default around samples of the flow.
      cells: number of cells of the grid, along each side.
      condition: for a conditional flow, [*condition_shape].
      estimator: estimator of the log-det; `Exact()` by default.
      key: PRNG key, or an integer seed, of these samples and of the estimate.
      options: for Axes.imshow.

    Returns:
      The Axes.

    Raises:
      ValueError: for a bad argument; the message names it.
      ImportError: without matplotlib.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> import resflow_jax as rf
      >>> from flax import nnx
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> ax = rf.plot.density(flow, box=((-3, 3), (-2, 2)), cells=20)
      >>> ax.images[-1].get_extent()
      [-3.0, 3.0, -2.0, 2.0]
    """
    check_type("flow", flow, Flow)
    if flow.event_shape != (2,):
        raise ValueError(f"flow: expected a flow of vectors of 2 elements, got events {flow.event_shape}")
    check_count("cells", cells, 1)
    key = as_key("key", key)
    if box is None:
        low, high = box_around(np.asarray(flow.sample(key, _POINTS, condition=condition)))
    else:
        low, high = _corners(box)
    ax = _axes(ax)
    found = density_on_grid(flow, low, high, cells, condition=condition, estimator=estimator, key=key)
    extent = [float(end) for end in (low[0], high[0], low[1], high[1])]
    ax.imshow(found, **{"extent": extent, "origin": "lower", "aspect": "auto", "interpolation": "bilinear"} | options)
    ax.set(xlabel="element 0", ylabel="element 1")
    return ax


def curves(history: History, ax: Any = None, *, unit: str = "nats", **options: Any) -> Any:
    """Draws the training and validation losses of a history of `fit` against the step; a star where weights were best.

    The ordinate is cut where the first twentieth of the losses would hide the others.

    Args:
      history: from `fit(...).history`.
      ax: Axes; by default the current ones.
      unit: "nats" or, for integer images, "bits/dim".
      options: for Axes.plot.

    Returns:
      The Axes.

    Raises:
      ValueError: for a bad argument; the message names it.
      ImportError: without matplotlib.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> import numpy as np, resflow_jax as rf
      >>> loss, step = np.array([3.0, 2.5]), np.array([10, 20])
      >>> rf.plot.curves(rf.History(step, loss, loss, step / 10, 20, "steps", None, (2,))).get_ylabel()
      '-log p, nats'
    """
    check_type("history", history, History)
    check_choice("unit", unit, ("nats", "bits/dim"))
    if unit == "nats":
        losses, label = {"train": history.train, "validation": history.validation}, "-log p, nats"
    elif history.levels is None:
        raise ValueError('unit: expected "nats", since the examples are not integer images, got "bits/dim"')
    else:
        losses, label = {"train": history.train_bits_per_dim, "validation": history.validation_bits_per_dim}, unit
    ax = _axes(ax)
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    for name, loss in losses.items():
        ax.plot(history.step, loss, **{"label": name} | options)
    if history.best_step:
        best = history.step == history.best_step
        ax.plot(
            history.step[best], losses["validation" if "validation" in losses else "train"][best], "k*", label="best"
        )
    values = np.concatenate([loss[len(loss) // 20 :] for loss in losses.values()])
    if len(values) and np.ptp(values) > 0:
        margin = 0.05 * np.ptp(values)
        ax.set_ylim(values.min() - margin, values.max() + margin)
    ax.set(xlabel="step", ylabel=label)
    ax.legend()
    return ax


def as_shown(images: np.ndarray) -> np.ndarray:
    """Images [..., C] with one or three channels: with two channels the first, with more than three the first three."""
    channels = images.shape[-1]
    return images if channels in (1, 3) else images[..., : 1 if channels == 2 else 3]


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tiles [N, H, W, C] into one [rows * (H + 1) + 1, columns * (W + 1) + 1, C], with a margin of one pixel."""
    images = as_shown(images)
    number, height, width, channels = images.shape
    rows = -(-number // columns)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 0.5)
    for n, image in enumerate(images):
        top, left = 1 + n // columns * (height + 1), 1 + n % columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    return grid


def box_around(*points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of a box around point sets [N, 2], with a margin of 15 % on every side."""
    low = np.min([p.min(0) for p in points], axis=0)
    high = np.max([p.max(0) for p in points], axis=0)
    margin = 0.15 * (high - low)
    return low - margin, high + margin


def grid_midpoints(low: np.ndarray | float, high: np.ndarray | float, cells: int) -> np.ndarray:
    """The midpoints of cells x cells equal cells of a box, [cells * cells, 2], row by row of y."""
    middles = (np.arange(cells) + 0.5) / cells
    grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
    return low + (high - low) * grid


def density_on_grid(
    flow: Flow,
    low: np.ndarray,
    high: np.ndarray,
    cells: int,
    batch_size: int = 4000,
    *,
    condition: Any = None,
    estimator: Estimator | None = None,
    key: Array | None = None,
) -> np.ndarray:
    """p at the midpoints of cells x cells equal cells of a box, [y, x]. Arguments as in `density`."""
    points = grid_midpoints(low, high, cells).astype(flow.dtype)
    key = jax.random.key(0) if key is None else key
    options = {"condition": condition, "estimator": estimator, "batch_size": batch_size}
    (log_prob,) = vector_log_prob(flow, points, key, **options)
    return np.exp(log_prob).reshape(cells, cells)


def _axes(ax: Any) -> Any:
    """The given Axes, or the current ones."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.pyplot import gca
    except ImportError as error:
        message = f"resflow_jax.plot needs the extra plot: pip install 'resflow_jax[plot]' ({error})"
        raise ImportError(message) from error
    if ax is None:
        return gca()
    check_type("ax", ax, Axes)
    return ax


def _elements(elements: Any, dim: int) -> tuple[int, int]:
    """Two element numbers below dim, checked."""
    if not isinstance(elements, Sequence) or len(elements) != 2:
        raise ValueError(f"elements: expected two numbers below {dim}, got {elements!r}")
    for element in elements:
        check_count("elements", element, 0)
        if element >= dim:
            raise ValueError(f"elements: expected two numbers below {dim}, got {elements!r}")
    return tuple(elements)


def _corners(box: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of ((left, right), (bottom, top))."""
    try:
        (left, right), (bottom, top) = box
    except (TypeError, ValueError) as error:
        raise ValueError(f"box: expected ((left, right), (bottom, top)), got {box!r}") from error
    for end in (left, right, bottom, top):
        check_finite("box", end)
    if not (left < right and bottom < top):
        raise ValueError(f"box: expected ((left, right), (bottom, top)), got {box!r}")
    return np.array([left, bottom], float), np.array([right, top], float)
