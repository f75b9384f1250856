"""The models that `--model NAME` chooses in the place of a residual flow, for the same data, training and report.

    residual                                     the flow of the config itself
    nice, real_nvp, glow, flow_pp, neural_spline coupling flows, see `rf.CouplingFlowConfig`
    made, maf                                    autoregressive flows of vectors, see `rf.AutoregressiveFlowConfig`
    ffjord                                       a continuous flow, which needs diffrax; see `rf.ContinuousFlowConfig`

Each takes shape, data transform and condition of the residual flow, but has the dequantisation and the spline of its
own config. A run then has the name of its model in its work directory, and a learning rate of at most 2e-3, since these
networks have no bound that would keep steps small.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from experiments.configs.base import ImageModel, VectorModel
from resflow_jax import (
    AutoregressiveFlowConfig,
    CNNConditioner,
    ContinuousFlowConfig,
    CouplingFlowConfig,
    ImageFlowConfig,
    ImageTransform,
    MLPConditioner,
    ResNetConditioner,
    VectorFlowConfig,
)
from resflow_jax.models.coupling_config import IN_PIECES

Residual = ImageFlowConfig | VectorFlowConfig
Make = Callable[[Any], Any]  # from the config of a residual flow to that of another model

LEARNING_RATE = 2e-3


def _instead(preset: Callable[..., Any]) -> Make:
    """The preset for the events of a residual flow."""

    def make(model: Residual) -> Any:
        shape = model.shape if isinstance(model, ImageFlowConfig) else (model.dim,)
        data = model.data
        config = preset(shape, condition_dim=model.condition_dim)
        if isinstance(model, ImageFlowConfig):
            own = config.data
            data = replace(data, dequantization=own.dequantization, spline_bins=own.spline_bins)
        return replace(config, data=data)

    return make


_COUPLINGS = ("nice", "real_nvp", "glow", "flow_pp", "neural_spline")
IMAGES: Mapping[str, Make] = {
    "residual": lambda model: model,
    **{name: _instead(getattr(CouplingFlowConfig, name)) for name in _COUPLINGS},
    "ffjord": _instead(ContinuousFlowConfig.ffjord),
}
VECTORS: Mapping[str, Make] = {
    **IMAGES,
    "made": _instead(AutoregressiveFlowConfig.made),
    "maf": _instead(AutoregressiveFlowConfig.maf),
}
MODELS: Mapping[Any, Mapping[str, Make]] = {ImageModel: IMAGES, VectorModel: VECTORS}


def with_model(config: Any, makers: Mapping[str, Make], name: str | None) -> Any:
    """The config of a run with another model, if this is the name of one; it is not validated anew.

    A config that has another model already stays as it is.
    """
    if name in (None, "residual") or name not in makers or not isinstance(config.model, Residual):
        return config
    optimizer = config.optimizer
    optimizer = replace(optimizer, learning_rate=min(LEARNING_RATE, optimizer.learning_rate))
    workdir = config.workdir.with_name(f"{config.workdir.name}_{name}")
    return replace(config, model=makers[name](config.model), optimizer=optimizer, workdir=workdir)


def tiny_model(model: Any) -> Any:
    """The same kind of model, as small as it can be."""
    if isinstance(model, AutoregressiveFlowConfig):
        return replace(model, layers=1, hidden=(8,))
    model = replace(model, conditioner=_tiny_network(model.conditioner))
    if isinstance(model, ContinuousFlowConfig):
        return replace(model, squeezes=min(1, model.squeezes), tolerance=1e-2)
    scales = {name: min(1, getattr(model.scales, name)) for name in ("squeezes", "checkerboard", "last")}
    data = tiny_transform(model.data) if len(model.shape) == 3 else model.data
    pieces = 2 if model.coupling in IN_PIECES else model.pieces
    return replace(model, couplings=1, pieces=pieces, scales=replace(model.scales, **scales), data=data)


def tiny_transform(data: ImageTransform) -> ImageTransform:
    """The same transform of images, with a variational dequantisation as small as it can be, if it has one."""
    if not data.dequantization.couplings:
        return data
    return replace(data, dequantization=replace(data.dequantization, couplings=1, width=4))


def _tiny_network(network: MLPConditioner | CNNConditioner | ResNetConditioner) -> Any:
    if isinstance(network, ResNetConditioner):
        return replace(network, width=4, depth=1)
    return replace(network, hidden=(4,) * len(network.hidden))
