"""The task of runs that classify images: labelled batches, the error in %, and pictures of what is learned."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.classification import ClassifyConfig
from experiments.runs import pictures
from experiments.runs.devices import data_mesh
from experiments.runs.tasks.judging_classes import class_rows
from experiments.runs.tasks.labelled import LabelledSplits, Rows, load_labelled
from experiments.runs.tasks.task import Drawing, Split, Task, unconverged
from resflow_jax import Estimate, Estimator
from resflow_jax.data.batches import Augmentation, Batches
from resflow_jax.data.images import dequantize, to_unit_interval
from resflow_jax.data.labels import keep_labels
from resflow_jax.models.flow import Flow
from resflow_jax.training.class_evaluation import class_logits
from resflow_jax.training.class_losses import classification_loss

Array = jax.Array

SHOWN = 64  # images whose reconstruction is drawn
COLUMNS = 8


class ClassTask(Task):
    """Classification of images; the metric is the error in %, the loss of training is in nats."""

    metric, unit, label, sign, batch_size = "error", "nats", "error in %", 1, 500
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
        self.name = str(config.data.path or config.data.name)
        self.density_weight = config.hybrid.of_dim(int(np.prod(data.shape)))
        options = {"density_weight": self.density_weight, "dropout": config.dropout}
        self.loss = classification_loss(data.levels, **options)
        self._labels = data.train.labels
        if config.labels is not None:
            self._labels = keep_labels(data.train.labels, config.labels, model.classes, config.seed)
        self._sources(0, 1)  # raises now for settings that make no batches

    def initial(self) -> Array:
        config, data = self.config, self.splits
        height, width, _ = data.shape
        number = min(len(data.train), 512, max(config.batch_size, 2**22 // (height * width)))
        images = Batches(data.train.images, seed=config.seed, batch_size=number)[0]
        if self.density_weight:
            return dequantize(jnp.asarray(images), jax.random.key(config.seed), data.levels)
        return to_unit_interval(images, data.levels)

    def batches(self, step: int, part: int = 0, parts: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        data = self.config.data
        options = {"threads": data.threads, "workers": data.workers}
        sources = [source.starting_at(step, **options) for source in self._sources(part, parts)]
        return sources[0] if len(sources) == 1 else map(_interleaved, *sources)

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

    def logits(self, flow: Flow, images: np.ndarray) -> np.ndarray:
        """The logits [N, classes] of integer images."""
        return class_logits(
            flow, images, levels=self.splits.levels, batch_size=self.batch_size, mesh=data_mesh(jax.device_count())
        )

    def scores(
        self, flow: Flow, examples: Rows, key: Array, estimator: Estimator, draws: int, batch_size: int
    ) -> np.ndarray:
        """100 for every example that is misclassified, and 0 for the others, [1, N]."""
        return 100.0 * (self.logits(flow, examples.images).argmax(axis=1) != examples.labels)[None]

    def estimate(self, flow: Flow, split: Split) -> Estimate:
        """The error in % of a split. It has no noise."""
        return super().estimate(flow, split)._replace(noise_stderr=0.0)

    def inputs(self, examples: Rows) -> Array:
        return to_unit_interval(examples.images, self.splits.levels)

    def permuted(self, examples: Rows) -> Rows:
        """Images with their pixels permuted in one common order; the channels of a pixel stay together."""
        pixels = examples.images.reshape(len(examples), -1, examples.images.shape[-1])
        order = np.random.default_rng(0).permutation(pixels.shape[1])
        return Rows(pixels[:, order].reshape(examples.images.shape), examples.labels)

    def other(self, name: str) -> Rows:
        """The test images of another data set with labels, by a name or a path; see `Task.other`."""
        own = self.splits
        height, _, channels = own.shape
        path = Path(name) if Path(name).exists() else None
        data = load_labelled(replace(self.config.data, name=name, path=path, size=height, channels=channels))
        if (data.shape, data.levels) != (own.shape, own.levels):
            raise ValueError(
                f"other: expected images of shape {own.shape} with {own.levels} levels, like those of {self.name}; got "
                f"shape {data.shape} with {data.levels} levels in {name}"
            )
        return data.test

    def sketch(self, flow: Flow, prefix: Path) -> dict[str, Path]:
        path = prefix.with_name(f"{prefix.name}_reconstructions.png")
        self._draw_reconstructions(flow, path)
        return {"reconstructions": path}

    def draw(self, flow: Flow, result: Estimate) -> Drawing:
        directory = self.config.workdir
        reconstructions, confusion = directory / "reconstructions.png", directory / "confusion.png"
        error = self._draw_reconstructions(flow, reconstructions)
        test = self.splits.test[: self.config.evaluation.examples]
        logits = self.logits(flow, test.images)
        pictures.save_confusion(confusion, test.labels, logits.argmax(axis=1), self.splits.names, self.name)
        rows = class_rows(self, flow, test, logits)
        drawn = {
            "test images, and their reconstruction from the features by fixed-point iteration": reconstructions,
            "test images by class and predicted class": confusion,
        }
        return Drawing(drawn, {**rows, "reconstruction error": error})

    def _draw_reconstructions(self, flow: Flow, path: Path) -> str:
        """Draws test images with f^-1(f(x)); returns the text of the closing table."""
        x = self.inputs(self.splits.test[:SHOWN])
        found, status = flow.inverse(flow(x), return_status=True)
        found = np.asarray(found)
        shown = np.clip(np.where(np.isfinite(found), found, 0.5), 0, 1)
        pictures.save_images(path, {"test images": np.asarray(x), "f^-1(f(x))": shown}, COLUMNS)
        return f"{np.abs(np.asarray(x) - found).max():.1e}, max |x - f^-1(f(x))|{unconverged(status)}"


def _repeated(images: np.ndarray, labels: np.ndarray, size: int) -> Rows:
    """The rows, repeated as often as a batch of `size` needs."""
    times = -(-size // len(labels))
    return Rows(np.tile(images, (times, 1, 1, 1)), np.tile(labels, times))


def _interleaved(*halves: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of halves of a batch in turn, so that devices that divide it have equally many of each."""
    parts = zip(*halves, strict=True)
    return tuple(np.stack(part, axis=1).reshape(-1, *part[0].shape[1:]) for part in parts)
