"""The task of runs that classify images: labelled batches, the error in %, and pictures of what is learned."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.configs.classification import ClassifyConfig
from experiments.runs import pictures
from experiments.runs.devices import data_mesh, own_mesh
from experiments.runs.likelihoods import PERMUTED
from experiments.runs.names import printable
from experiments.runs.tasks.class_samples import class_samples, columns_of, is_mixture
from experiments.runs.tasks.images import COLUMNS, SHOWN, first_images, other_images, permuted_pixels
from experiments.runs.tasks.judging_classes import class_rows, errors_of, measured
from experiments.runs.tasks.labelled import LabelledSplits, Rows, load_labelled
from experiments.runs.tasks.subset import subset
from experiments.runs.tasks.task import Drawing, Task, reconstructed
from resflow_jax import Estimate, Estimator
from resflow_jax.data.batches import Augmentation, Batches
from resflow_jax.data.images import Images, dequantize, to_unit_interval
from resflow_jax.data.labels import keep_labels
from resflow_jax.models.flow import Flow
from resflow_jax.training.class_evaluation import class_logits
from resflow_jax.training.class_losses import classification_loss

Array = jax.Array


class ClassTask(Task):
    """Classification of images; the metric is the error in %, the loss of training is in nats."""

    metric, unit, label, sign, batch_size = "error", "nats", "error in %", 1, 100
    train_metric = "loss"
    splits: LabelledSplits

    def __init__(self, config: ClassifyConfig):
        """Raises ValueError if the images have another shape, or other classes, than the model."""
        super().__init__(config)
        self.splits = data = load_labelled(config.data)
        model = config.model
        if data.shape != model.shape:
            raise ValueError(f"model.shape: expected {data.shape}, the shape of the images, got {model.shape}")
        if len(data.names) != model.classes:
            raise ValueError(f"model.classes: expected {len(data.names)}, the classes of the data, got {model.classes}")
        if config.labels is not None and not model.classes <= config.labels <= len(data.train):
            raise ValueError(
                f"labels: expected a number from {model.classes}, one for each class, to {len(data.train)}, that "
                f"of the training images, got {config.labels}"
            )
        self.name = printable(str(config.data.path or config.data.name))
        self.density_weight = config.hybrid.of_dim(int(np.prod(data.shape)))
        options = {"density_weight": self.density_weight, "dropout": config.dropout}
        self.loss = classification_loss(data.levels, **options)
        self._labels = data.train.labels
        if config.labels is not None:
            self._labels = keep_labels(data.train.labels, config.labels, model.classes, config.seed)
        self.pictures = ("reconstructions.png", "confusion.png") + ("samples.png",) * bool(self.density_weight)
        self._sources(0, 1)  # raises now for settings that make no batches

    def initial(self) -> Array:
        levels, images = self.splits.levels, first_images(self.splits.train.images, self.config)
        if self.density_weight:
            return dequantize(jnp.asarray(images), jax.random.key(self.config.seed), levels)
        return to_unit_interval(images, levels)

    def batches(self, step: int, part: int = 0, parts: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        data = self.config.data
        options = {"threads": data.threads, "workers": data.workers}
        sources = [source.starting_at(step, **options) for source in self._sources(part, parts)]
        return sources[0] if len(sources) == 1 else map(_interleaved, *sources)

    def rows_at(self, step: int) -> list[int] | None:
        """Without few labels as for other tasks; with them the halves of a batch have orders of their own."""
        return super().rows_at(step) if self.config.labels is None else None

    def _sources(self, part: int, parts: int) -> list[Batches]:
        """The batches, or the halves of the batches, with and without labels."""
        config, train = self.config, self.splits.train
        augmentation = Augmentation(config.data.flip, config.data.crop)
        options = {"seed": config.seed, "augmentation": augmentation, "part": part, "parts": parts}
        if config.labels is None:
            return [Batches(train.images, labels=self._labels, batch_size=config.batch_size, **options)]
        labelled = np.flatnonzero(self._labels >= 0)
        size = config.batch_size // 2 if self.density_weight else config.batch_size
        few = _repeated(train.images[labelled], self._labels[labelled], size)
        if not self.density_weight:
            return [Batches(few.images, labels=few.labels, batch_size=size, **options)]
        if config.batch_size % 2:
            raise ValueError(f"batch_size: expected an even number with labels and a density, got {config.batch_size}")
        unlabelled = np.full_like(self._labels, -1)
        return [
            Batches(few.images, labels=few.labels, batch_size=size, **options),
            Batches(train.images, labels=unlabelled, batch_size=size, **options),
        ]

    def logits(self, flow: Flow, images: Images, mesh: Mesh | None) -> np.ndarray:
        """The logits [N, classes] of integer images, on the devices of a mesh; None for one device."""
        return class_logits(flow, images, levels=self.splits.levels, batch_size=self.batch_size, mesh=mesh)

    def scores(
        self, flow: Flow, examples: Rows, key: Array, estimator: Estimator, draws: int, batch_size: int
    ) -> np.ndarray:
        """100 for every example that is misclassified, and 0 for the others, [1, N]; see `errors_of`."""
        logits = self.logits(flow, examples.images, data_mesh(jax.device_count()))
        return errors_of(logits, examples.labels)[None]

    def mean(self, scores: np.ndarray, estimator: Estimator) -> Estimate:
        """The error in %. It has no noise."""
        return super().mean(scores, estimator)._replace(noise_stderr=0.0)

    def inputs(self, examples: Rows) -> Array:
        return to_unit_interval(examples.images, self.splits.levels)

    def permuted(self, examples: Rows) -> np.ndarray:
        """The images alone, with their pixels permuted in one common order."""
        return permuted_pixels(examples.images)

    def other(self, name: str) -> np.ndarray:
        """The test images of another data set, which need no labels; see `Task.other`."""
        return other_images(name, self.config.data, self.splits, self.name)

    def sketch(self, flow: Flow, prefix: Path) -> dict[str, Path]:
        x = self.inputs(self.splits.validation[:SHOWN])
        shown = {"reconstructions": flow.inverse(flow(x), return_status=True)[0]}
        if self.density_weight:
            shown["samples"] = class_samples(flow, self.config.seed + 3)
        paths = {name: prefix.with_name(f"{prefix.name}_{name}.png") for name in shown}
        for name, path in paths.items():
            pictures.save_grid(path, shown[name], columns_of(flow) if name == "samples" else COLUMNS)
        return paths

    def draw(self, flow: Flow, result: Estimate) -> Drawing:
        directory = self.config.workdir
        reconstructions, confusion = directory / "reconstructions.png", directory / "confusion.png"
        error = self._draw_reconstructions(flow, reconstructions)
        test = subset(self.splits.test, self.config.evaluation.examples)
        logits = self.logits(flow, test.images, own_mesh())
        pictures.save_confusion(confusion, test.labels, logits.argmax(axis=1), self.splits.names, self.name)
        found, _ = measured(self, flow, test, {PERMUTED: self.permuted(test)}, logits)
        drawn = {
            "test images, and their reconstruction from the features by fixed-point iteration": reconstructions,
            "test images by class and predicted class": confusion,
        }
        if self.density_weight:
            path = directory / "samples.png"
            samples, columns = class_samples(flow, self.config.seed + 3), columns_of(flow)
            train = self.inputs(subset(self.splits.train, len(samples)))
            of = "samples, a class in each column" if is_mixture(flow) else "samples of the flow"
            pictures.save_images(path, {of: samples, "images of the training set": train}, columns)
            drawn["samples, and images of the training set"] = path
        return Drawing(drawn, {**class_rows(self, found), **error})

    def _draw_reconstructions(self, flow: Flow, path: Path) -> dict[str, str]:
        """Draws test images with f^-1(f(x)); returns the line of the closing table."""
        x = self.inputs(self.splits.test[:SHOWN])
        found, error = reconstructed(flow, x)
        shown = np.clip(np.where(np.isfinite(found), found, 0.5), 0, 1)
        pictures.save_images(path, {"test images x": np.asarray(x), "reconstructions $f^{-1}(f(x))$": shown}, COLUMNS)
        return error


def _repeated(images: np.ndarray, labels: np.ndarray, size: int) -> Rows:
    """The rows, repeated as often as a batch of `size` needs."""
    times = -(-size // len(labels))
    return Rows(np.tile(images, (times, 1, 1, 1)), np.tile(labels, times))


def _interleaved(*halves: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of halves of a batch in turn, so that devices that divide it have equally many of each."""
    parts = zip(*halves, strict=True)
    return tuple(np.stack(part, axis=1).reshape(-1, *part[0].shape[1:]) for part in parts)
