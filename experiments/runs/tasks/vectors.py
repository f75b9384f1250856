"""The task of runs on vectors: their batches, their log-likelihood in nats, and pictures."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.base import RunConfig, VectorDataConfig, VectorsConfig
from experiments.runs import pictures
from experiments.runs.devices import data_mesh
from experiments.runs.names import printable
from experiments.runs.tasks.task import Drawing, Task, draw_samples, unconverged
from resflow_jax import Estimate, Estimator, Exact, ResidualFlow
from resflow_jax.data.batches import Batches
from resflow_jax.data.embedded import load_cell_nuclei
from resflow_jax.data.toy import TOY_DENSITIES, sample_toy
from resflow_jax.data.vectors import VectorSplits, load_vectors
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.losses import negative_log_likelihood

Array = jax.Array

SAMPLES = 1000  # in a sketch


def load(config: VectorDataConfig) -> VectorSplits:
    """Loads the vectors that a config names."""
    return load_cell_nuclei() if config.path is None else load_vectors(config.path)


class VectorTask(Task):
    """Density estimation of vectors, in nats."""

    metric, unit, label, sign, batch_size = "log_prob", "nats", "log_prob, nats", -1, 1000
    splits: VectorSplits

    def __init__(self, config: VectorsConfig):
        """Raises ValueError if the vectors have another dimension than the model."""
        self._set(config, load(config.data), printable(str(config.data.path or "cell nuclei")))
        self._batches(0, 1)  # raises now for settings that make no batches

    def _set(self, config: RunConfig, splits: VectorSplits, name: str) -> None:
        super().__init__(config)
        if splits.dim != config.model.dim:
            raise ValueError(f"model.dim: expected {splits.dim}, the dimension of the vectors, got {config.model.dim}")
        self.splits, self.name = splits, name
        self.loss = negative_log_likelihood(self.log_det_weight())

    def initial(self) -> Array:
        return jnp.asarray(self.splits.train[:10000])

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
        return vectors

    def sketch(self, flow: ResidualFlow, prefix: Path) -> dict[str, Path]:
        path = prefix.with_name(f"{prefix.name}_samples.png")
        pictures.save_scatter(path, *self._shown(flow), f"{self.name}: data and samples")
        return {"samples": path}

    def draw(self, flow: ResidualFlow, result: Estimate) -> Drawing:
        path = self.config.workdir / "samples.png"
        pictures.save_scatter(path, *self._shown(flow), f"{self.name}: data and samples")
        test = self.inputs(self.splits.test[:SAMPLES])
        reconstructed, status = flow.inverse(flow(test), return_status=True)
        error = f"{np.abs(np.asarray(test) - np.asarray(reconstructed)).max():.1e}, max |x - f^-1(f(x))|"
        return Drawing({"samples": path}, {"reconstruction error": error + unconverged(status)})

    def _shown(self, flow: ResidualFlow) -> tuple[np.ndarray, np.ndarray]:
        """Training vectors and samples."""
        samples, _ = draw_samples(flow, self.config.seed + 3, SAMPLES)
        return self.splits.train[:SAMPLES], np.asarray(samples)
