"""The task of runs on a toy density in the plane: fresh points in every batch, and the learned density on a grid."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.toy import ToyConfig
from experiments.runs import pictures
from experiments.runs.tasks.task import Drawing, unconverged
from experiments.runs.tasks.vectors import VectorTask
from resflow_jax import Estimate, ResidualFlow
from resflow_jax.data.toy import sample_toy
from resflow_jax.data.vectors import VectorSplits
from resflow_jax.plot import box_around, density_on_grid

INTEGRAL_TOLERANCE = 0.01
_PURPOSES = ("initialize", "train", "test", "picture", "validation")


@dataclass(frozen=True)
class Grid:
    """A density on a grid.

    Attributes:
      density: density at the midpoints of the cells, [y, x].
      low: lower corner.
      high: upper corner.
      integral: integral of the density over the grid.
    """

    density: np.ndarray
    low: np.ndarray
    high: np.ndarray
    integral: float


class ToyTask(VectorTask):
    """A toy density in the plane. Every batch has fresh points; validation and test have points of their own."""

    def __init__(self, config: ToyConfig):
        number = config.evaluation.examples
        splits = VectorSplits(
            train=sample_toy(config.data, 2048, _rng(config, "initialize")),
            validation=sample_toy(config.data, number, _rng(config, "validation")),
            test=sample_toy(config.data, number, _rng(config, "test")),
        )
        self._set(config, splits, config.data)

    def batches(self, step: int, part: int = 0, parts: int = 1) -> Iterator[np.ndarray]:
        config, own = self.config, self.config.batch_size // parts
        wholes = (sample_toy(config.data, config.batch_size, _rng(config, "train", n)) for n in count(step))
        return (whole[part * own : (part + 1) * own] for whole in wholes)

    def rows_at(self, step: int) -> None:
        """None: every batch is drawn by the seed and the number of its step."""

    def draw(self, flow: ResidualFlow, result: Estimate) -> Drawing:
        """Draws the data, the density on a grid and samples.

        The density must integrate to 1, however well it was learned. This checks that the log-det belongs to the map,
        and to the samples, whose extent sets the grid's box.
        """
        config, path = self.config, self.config.workdir / "toy.png"
        z = jax.random.normal(jax.random.key(config.seed + 1), (config.evaluation.samples, 2), flow.dtype)
        samples, status = flow.inverse(z, return_status=True)
        grid = grid_of(flow, config.evaluation.cells, self.splits.test, np.asarray(samples))
        pictures.save_densities(
            path,
            sample_toy(config.data, 200000, _rng(config, "picture")),
            grid.density,
            (grid.low, grid.high),
            np.asarray(samples),
            {
                "data": f"data: {config.data}",
                "density": f"learned density, {result.mean:.3f} nats",
                "samples": "samples of the flow",
            },
        )
        (left, bottom), (right, top) = grid.low, grid.high
        rows = {
            "integral of density": f"{grid.integral:.4f} over [{left:.1f}, {right:.1f}] x [{bottom:.1f}, {top:.1f}], "
            f"{config.evaluation.cells}^2 cells",
            "reconstruction error": f"{jnp.max(jnp.abs(z - flow(samples))):.1e}, max |z - f(f^-1(z))|"
            + unconverged(status),
        }
        if not abs(grid.integral - 1) <= INTEGRAL_TOLERANCE:
            rows["WARNING"] = (
                f"the density integrates to {grid.integral:.4f}, not to 1 within {INTEGRAL_TOLERANCE:.0%}: the grid is "
                "too coarse (raise --evaluation.cells), or the box leaves mass outside"
            )
        return Drawing({"data, learned density and samples": path}, rows)


def grid_of(flow: ResidualFlow, cells: int, *points: np.ndarray) -> Grid:
    """The density of a flow in the plane on a grid in a box around point sets [N, 2]."""
    low, high = box_around(*points)
    density = density_on_grid(flow, low, high, cells, 4000)
    return Grid(density, low, high, float(density.mean(dtype=np.float64) * np.prod(high - low)))


def _rng(config: ToyConfig, purpose: str, step: int = 0) -> np.random.Generator:
    """The random generator of one purpose and one step of a run, independent of the others."""
    return np.random.default_rng((config.seed, _PURPOSES.index(purpose), step))
