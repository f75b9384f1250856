"""Fits the model to the user's own data: to the shape of images, or the dimension and the units of vectors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.configs.base import DensityConfig, ImageModel, RunConfig, VectorsConfig
from experiments.configs.classification import ClassifyConfig
from experiments.runs.choices import value_of
from resflow_jax import ClassifierConfig, VectorFlowConfig
from resflow_jax.data.files import image_shape
from resflow_jax.data.labelled_files import load_labelled_path
from resflow_jax.data.units import units_of
from resflow_jax.data.vectors import load_vectors
from resflow_jax.models.recipe_checks import halvings


def fitted_to_data(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """The config with its model fitted to the size of the data of `--data.path`, if the arguments have it.

    A flow on vectors also gets the mean and the std of the training split, and its data the shift of columns that are
    far from zero.

    Raises:
      FileNotFoundError, ValueError: as `image_shape`, `load_vectors` and `units_of`.
    """
    path = value_of("data.path", arguments)
    if path is None:
        return config
    if isinstance(config, DensityConfig):
        return replace(config, model=fitted_to_shape(config.model, image_shape(Path(path))))
    if isinstance(config, ClassifyConfig):
        data = load_labelled_path(Path(path))
        return replace(config, model=_fitted_classifier(config.model, data.shape, data.labels.classes))
    if isinstance(config, VectorsConfig):
        return fitted_to_vectors(config, load_vectors(path).train, path)
    return config


def fitted_to_vectors(config: VectorsConfig, train: np.ndarray, place: str) -> VectorsConfig:
    """The config with the dimension and the units of training vectors [N, D], as they were read from a place."""
    units = units_of(train, place)
    model, dim = config.model, len(units.mean)
    model = replace(model, dim=dim) if isinstance(model, VectorFlowConfig) else model.fitted((dim,))
    model = replace(model, data=replace(model.data, mean=units.mean, std=units.std))
    return replace(config, model=model, data=replace(config.data, shift=units.shift))


def _fitted_classifier(model: ClassifierConfig, shape: tuple[int, int, int], classes: int) -> ClassifierConfig:
    """The network for images of a shape, with as many of its stages as the shape can be halved for."""
    halvable = halvings(shape, 8)
    squeeze_first = model.squeeze_first and halvable >= len(model.blocks)
    stages = max(1, min(len(model.blocks), halvable + 1 - squeeze_first))
    sizes = {"blocks": model.blocks[:stages], "hidden_channels": model.hidden_channels[:stages]}
    return replace(model, shape=shape, classes=classes, squeeze_first=squeeze_first, **sizes)


def fitted_to_shape(model: ImageModel, shape: tuple[int, int, int]) -> ImageModel:
    """The model for images of a shape, with as many of its first scales as the shape can be squeezed for."""
    if hasattr(model, "fitted"):
        return model.fitted(shape)
    squeezes_first = int(model.scales.squeeze_first)
    halvable = halvings(shape, len(model.blocks))
    scales = max(1, min(len(model.blocks), halvable + 1 - squeezes_first))
    widths = model.hidden_channels
    widths = widths[:scales] if isinstance(widths, tuple) else widths
    return replace(model, shape=shape, blocks=model.blocks[:scales], hidden_channels=widths)
