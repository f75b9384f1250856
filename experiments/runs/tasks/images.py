"""The task of image runs: the images, their batches, their bits/dim, and the pictures of a flow on them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.base import DataConfig, DensityConfig, RunConfig
from experiments.runs import pictures
from experiments.runs.devices import data_mesh
from experiments.runs.names import printable
from experiments.runs.tasks.task import Drawing, Task, draw_samples, reconstructed
from resflow_jax import Estimate, Estimator, ResidualFlow
from resflow_jax.data.batches import Augmentation, Batches
from resflow_jax.data.embedded import load_digits, load_photographs
from resflow_jax.data.files import load_path
from resflow_jax.data.images import Images, ImageSplits, dequantize, to_unit_interval
from resflow_jax.data.tfds import load_tfds
from resflow_jax.training.evaluation import image_bits_per_dim
from resflow_jax.training.losses import dequantized_bits_per_dim

Array = jax.Array

SHOWN = 64  # images in a picture
COLUMNS = 8


def load(config: DataConfig) -> ImageSplits:
    """Loads the images that a config names."""
    if config.path is not None:
        return load_path(config.path, bits=config.bits)
    if config.name == "images":
        raise ValueError("data.path: expected a folder or a file of images, as --data.path FOLDER; got None")
    if config.name == "digits":
        return load_digits()
    if config.name == "photographs":
        return load_photographs(config.size, config.channels, bits=config.bits)
    return load_tfds(config.name, config.dir, bits=config.bits)


def first_images(images: Images, config: RunConfig) -> Images:
    """Images of the first batches, from which a flow is initialised."""
    _, height, width, _ = images.shape
    number = min(len(images), 512, max(config.batch_size, 2**22 // (height * width)))
    return Batches(images, seed=config.seed, batch_size=number)[0]


def permuted_pixels(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] with their pixels permuted in one common order; the channels of a pixel stay together."""
    pixels = images.reshape(len(images), -1, images.shape[-1])
    order = np.random.default_rng(0).permutation(pixels.shape[1])
    return pixels[:, order].reshape(images.shape)


def other_images(name: str, config: DataConfig, own: Any, of: str) -> np.ndarray:
    """The test images of another data set. They need no labels.

    Args:
      name: name or path of the other data.
      config: the images of the run.
      own: these images, with a shape and a number of levels.
      of: their name, for messages.

    Raises:
      ValueError: if the images have another shape or other levels than those of the run.
    """
    height, _, channels = own.shape
    path = Path(name) if Path(name).exists() else None
    data = load(replace(config, name=name, path=path, size=height, channels=channels))
    if (data.shape, data.levels) != (own.shape, own.levels):
        raise ValueError(
            f"other: expected images of shape {own.shape} with {own.levels} levels, like those of {of}; got shape "
            f"{data.shape} with {data.levels} levels in {name}"
        )
    return data.test


class ImageTask(Task):
    """Density estimation of images, in bits/dim."""

    metric, unit, label, sign, batch_size = "bits_per_dim", "bits/dim", "bits/dim", 1, 128

    def __init__(self, config: DensityConfig):
        """Raises ValueError if the images have another shape than the model."""
        super().__init__(config)
        self.splits = load(config.data)
        if self.splits.shape != config.model.shape:
            raise ValueError(
                f"model.shape: expected {self.splits.shape}, the shape of the images, got {config.model.shape}"
            )
        self.name = printable(str(config.data.path or config.data.name))
        self.loss = dequantized_bits_per_dim(self.splits.levels, self.log_det_weight())
        self._batches(0, 1)  # raises now for settings that make no batches

    @property
    def notes(self) -> dict[str, str]:
        is_bound = self.config.model.data.dequantization.couplings > 0
        text = "variational: these bits/dim are an upper bound on those of the integer images"
        return {"dequantisation": text} if is_bound else {}

    def initial(self) -> Array:
        images = jnp.asarray(first_images(self.splits.train, self.config))
        return dequantize(images, jax.random.key(self.config.seed), self.splits.levels)

    def batches(self, step: int, part: int = 0, parts: int = 1) -> Iterator[np.ndarray]:
        data = self.config.data
        return self._batches(part, parts).starting_at(step, threads=data.threads, workers=data.workers)

    def _batches(self, part: int, parts: int) -> Batches:
        config = self.config
        augmentation = Augmentation(config.data.flip, config.data.crop)
        settings = {"seed": config.seed, "batch_size": config.batch_size, "augmentation": augmentation}
        return Batches(self.splits.train, **settings, part=part, parts=parts)

    def scores(
        self, flow: ResidualFlow, examples: np.ndarray, key: Array, estimator: Estimator, draws: int, batch_size: int
    ) -> np.ndarray:
        return image_bits_per_dim(
            flow,
            examples,
            key,
            levels=self.splits.levels,
            estimator=estimator,
            draws=draws,
            batch_size=batch_size,
            mesh=data_mesh(jax.device_count()),
        )

    def inputs(self, examples: np.ndarray) -> Array:
        return to_unit_interval(examples, self.splits.levels)

    def permuted(self, examples: np.ndarray) -> np.ndarray:
        return permuted_pixels(examples)

    def other(self, name: str) -> np.ndarray:
        """The test images of another data set, by a name or a path; see `Task.other`."""
        return other_images(name, self.config.data, self.splits, self.name)

    def sketch(self, flow: ResidualFlow, prefix: Path) -> dict[str, Path]:
        images = self.inputs(self.splits.validation[:SHOWN])
        shown = {"samples": self._samples(flow), "reconstructions": flow.inverse(flow(images), return_status=True)[0]}
        paths = {name: prefix.with_name(f"{prefix.name}_{name}.png") for name in shown}
        for name, path in paths.items():
            pictures.save_grid(path, shown[name], COLUMNS)
        return paths

    def draw(self, flow: ResidualFlow, result: Estimate) -> Drawing:
        workdir = self.config.workdir
        images = self.inputs(self.splits.test[:SHOWN])
        reconstructions, rows = reconstructed(flow, images)
        shown = {"samples": workdir / "samples.png", "reconstructions": workdir / "reconstructions.png"}
        pictures.save_images(
            shown["samples"],
            {
                "samples of the flow": self._samples(flow),
                "images of the training set": self.inputs(self.splits.train[:SHOWN]),
            },
            COLUMNS,
        )
        pictures.save_images(
            shown["reconstructions"],
            {"test images x": images, "reconstructions $f^{-1}(f(x))$": reconstructions},
            COLUMNS,
        )
        return Drawing(shown, rows)

    def _samples(self, flow: ResidualFlow) -> Array:
        return jnp.clip(draw_samples(flow, self.config.seed + 3, SHOWN), 0, 1)
