"""The tiny version of every config: the same code with a tiny flow and embedded data, done in seconds."""

from dataclasses import replace

from experiments.configs.base import DataConfig, DensityConfig, RunConfig
from experiments.configs.classification import ClassifyConfig
from experiments.configs.toy import ToyConfig
from experiments.runs.models import tiny_model, tiny_transform
from resflow_jax import ImageFlowConfig, VectorFlowConfig


def tiny(config: RunConfig) -> RunConfig:
    """The config of a short run through the same code: two updates of a tiny flow of the same kind.

    Images that may not be on disk are replaced by crops of the embedded photographs with the same shape and bits, and
    your own vectors by the embedded ones.
    """
    steps = 2 * config.optimizer.accumulate
    milestones = (1,) if config.optimizer.milestones else ()
    config = replace(
        config,
        workdir=config.workdir.with_name(f"{config.workdir.name}_tiny"),
        steps=steps,
        batch_size=8,
        optimizer=replace(config.optimizer, milestones=milestones),
        evaluation=replace(config.evaluation, examples=8, draws=1, every=steps),
    )
    if isinstance(config, ClassifyConfig):
        return _tiny_classifier(config)
    if isinstance(config, ToyConfig):
        config = replace(config, evaluation=replace(config.evaluation, samples=1000, cells=60))
    if not isinstance(config.model, ImageFlowConfig | VectorFlowConfig):
        model = tiny_model(config.model)
        data = _embedded(config.data, model.shape) if isinstance(config, DensityConfig) else config.data
        return replace(config, model=model, data=data)
    if not isinstance(config, DensityConfig):
        return replace(config, model=replace(config.model, blocks=2, hidden=(8,)))
    model = replace(
        config.model,
        blocks=(1,) * len(config.model.blocks),
        hidden_channels=8,
        tail=replace(
            config.model.tail,
            blocks=min(1, config.model.tail.blocks),
            hidden=8,
            densenet_first=8,
            densenet_growth=4,
        ),
        densenet=replace(config.model.densenet, growth=4),
        data=tiny_transform(config.model.data),
    )
    return replace(config, data=_embedded(config.data, model.shape), model=model)


def _tiny_classifier(config: ClassifyConfig) -> ClassifyConfig:
    """The embedded photographs have two classes, the temple and the flower."""
    model, stages = config.model, len(config.model.blocks)
    data = _embedded(config.data, model.shape)
    classes = model.classes if data is config.data else 2
    model = replace(model, blocks=(2,) + (1,) * (stages - 1), hidden_channels=(8,) * stages, classes=classes)
    return replace(config, data=data, model=model)


def _embedded(data: DataConfig, shape: tuple[int, int, int]) -> DataConfig:
    """The digits, or crops of the photographs of this shape."""
    height, _, channels = shape
    return data if data.name == "digits" else replace(data, name="photographs", size=height, channels=channels)
