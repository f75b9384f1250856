"""The task of runs on vectors: their batches, their log-likelihood in nats, and pictures.

The flow takes vectors as float32, minus the shift of the config. The shift changes no density, so that likelihoods are
those of the vectors in their own units.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.base import RunConfig, VectorDataConfig, VectorsConfig
from experiments.runs import pictures
from experiments.runs.devices import data_mesh
from experiments.runs.names import printable
from experiments.runs.tasks.subset import subset
from experiments.runs.tasks.task import Drawing, Task, draw_samples, reconstructed
from resflow_jax import Estimate, Estimator, Exact, ResidualFlow
from resflow_jax.data.batches import Batches
from resflow_jax.data.embedded import load_cell_nuclei
from resflow_jax.data.splits import SPLITS
from resflow_jax.data.toy import TOY_DENSITIES, sample_toy
from resflow_jax.data.units import in_own_units, rounded_columns, shifted
from resflow_jax.data.vectors import VectorSplits, load_vectors
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.losses import negative_log_likelihood

Array = jax.Array

SAMPLES = 1000  # in a sketch


def load(config: VectorDataConfig) -> VectorSplits:
    """Loads the vectors that a config names: float32, minus its shift.

    Warns of columns that float32 would round much.
    """
    loaded = load_cell_nuclei() if config.path is None else load_vectors(config.path)
    if columns := rounded_columns(loaded.train, config.shift):
        warnings.warn(
            f"data.shift: expected a number near the mean of column {columns[0] + 1} of {config.path}, got "
            f"{config.shift and config.shift[columns[0]]}; float32 rounds the column to more than 1/4096 of its "
            "standard deviation",
            stacklevel=2,
        )
    return VectorSplits(*(shifted(getattr(loaded, split), config.shift) for split in SPLITS))


class VectorTask(Task):
    """Density estimation of vectors, in nats."""

    metric, unit, label, sign, batch_size = "log_prob", "nats", "log_prob, nats", -1, 1000
    splits: VectorSplits

    def __init__(self, config: VectorsConfig):
        """Raises ValueError if the vectors have another dimension than the model."""
        self._set(config, load(config.data), printable(str(config.data.path or "cell nuclei")))
        self._batches(0, 1)  # raises now for settings that make no batches

    @property
    def shift(self) -> tuple[float, ...] | None:
        """What has been subtracted from the vectors; None for nothing."""
        return getattr(self.config.data, "shift", None)

    def in_own_units(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors [N, D] as the flow takes or draws them, in the units of the data: float64 if they were shifted."""
        return in_own_units(np.asarray(vectors), self.shift)

    def _set(self, config: RunConfig, splits: VectorSplits, name: str) -> None:
        super().__init__(config)
        if splits.dim != config.model.dim:
            raise ValueError(f"model.dim: expected {splits.dim}, the dimension of the vectors, got {config.model.dim}")
        self.splits, self.name = splits, name
        self.loss = negative_log_likelihood(self.log_det_weight())

    def initial(self) -> Array:
        return jnp.asarray(subset(self.splits.train, 10000))

    def batches(self, step: int, part: int = 0, parts: int = 1) -> Iterator[np.ndarray]:
        return self._batches(part, parts).starting_at(step)

    def _batches(self, part: int, parts: int) -> Batches:
        config = self.config
        return Batches(self.splits.train, seed=config.seed, batch_size=config.batch_size, part=part, parts=parts)

    def scores(
        self, flow: ResidualFlow, examples: np.ndarray, key: Array, estimator: Estimator, draws: int, batch_size: int
    ) -> np.ndarray:
        mesh = data_mesh(jax.device_count())
        if isinstance(estimator, Exact):
            batch_size = min(batch_size, max(1, 2**24 // self.splits.dim**2))  # dense Jacobians of 64 MB
        return vector_log_prob(flow, examples, key, estimator=estimator, draws=draws, batch_size=batch_size, mesh=mesh)

    def mean(self, scores: np.ndarray, estimator: Estimator) -> Estimate:
        """The mean with its standard errors; the noise is 0 where estimator and flow are deterministic.

        A single draw cannot show that.
        """
        found = super().mean(scores, estimator)
        is_exact = isinstance(estimator, Exact) and not self.config.model.data.padding.channels
        return found._replace(noise_stderr=0.0) if is_exact else found

    def inputs(self, examples: np.ndarray) -> Array:
        return jnp.asarray(examples)

    def permuted(self, examples: np.ndarray) -> np.ndarray:
        """Vectors [N, D] with each element permuted among the vectors on its own: elements become independent."""
        return np.random.default_rng(0).permuted(examples, axis=0)

    def other(self, name: str) -> np.ndarray:
        """The test vectors of another file, or points of a toy density; see `Task.other`."""
        if name in TOY_DENSITIES:
            vectors = sample_toy(name, len(self.splits.test), np.random.default_rng(0))
        else:
            vectors = load_vectors(Path(name)).test
        if vectors.shape[1] != self.splits.dim:
            raise ValueError(
                f"other: expected vectors of dimension {self.splits.dim}, like those of {self.name}; got "
                f"{vectors.shape[1]} in {name}"
            )
        return shifted(vectors, self.shift)

    def sketch(self, flow: ResidualFlow, prefix: Path) -> dict[str, Path]:
        path = prefix.with_name(f"{prefix.name}_samples.png")
        pictures.save_scatter(path, *self._shown(flow), f"{self.name}: data and samples")
        return {"samples": path}

    def draw(self, flow: ResidualFlow, result: Estimate) -> Drawing:
        path = self.config.workdir / "samples.png"
        pictures.save_scatter(path, *self._shown(flow), f"{self.name}: data and samples")
        test = self.inputs(self.splits.test[:SAMPLES])
        _, rows = reconstructed(flow, test)
        if self.config.model.data.mean is not None:
            rows["units"] = "those of the data, for likelihoods and samples; the flow standardises each column"
        return Drawing({"samples": path}, rows)

    def _shown(self, flow: ResidualFlow) -> tuple[np.ndarray, np.ndarray]:
        """Training vectors and samples, in the units of the data."""
        samples = draw_samples(flow, self.config.seed + 3, SAMPLES)
        return self.in_own_units(self.splits.train[:SAMPLES]), self.in_own_units(np.asarray(samples))
