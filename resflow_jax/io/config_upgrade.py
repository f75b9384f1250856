"""What configs of flows were in earlier formats of `config_json`, and the steps to the present one.

Version 0 is without a version: all settings of a flow stood side by side in its config, as "fc_blocks" for what is now
"tail.blocks". Those which only files of the PyTorch implementation need were part of `ImageFlowConfig`.

Version 1 has other names for some settings: see `_RENAMED`.
"""

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]

_PADDING = {"padding": "channels", "padding_noise": "noise", "padding_scale": "scale", "padding_shift": "shift"}
_NORMALIZATION = {"data_mean": "mean", "data_deviation": "deviation"}
_BETWEEN = ("actnorm", "feature_actnorm", "first_actnorm", "batchnorm", "centering", "invertible_linear")
_TAIL = {
    "fc_blocks": "blocks",
    "fc_hidden": "hidden",
    "fc_layers": "layers",
    "fc_norms": "norms",
    "fc_dense_first": "densenet_first",
    "fc_dense_growth": "densenet_growth",
}
# Of a flow's config: the group that holds a setting now, its dataclass, and the setting's names before and now.
_COMMON = {
    "between": ("BetweenBlocks", {name: name for name in _BETWEEN}),
    "norms": ("Norms", {"norms": "orders", "learn_norms": "learned", "order_ties": "ties"}),
    "densenet": ("DenseNetBlocks", {"dense_depth": "depth", "dense_growth": "growth"}),
}
_GROUPS = {
    "VectorFlowConfig": {"data": ("VectorTransform", _NORMALIZATION), **_COMMON},
    "ImageFlowConfig": {
        "data": ("ImageTransform", {**_NORMALIZATION, "logit_alpha": "logit_alpha"}),
        "tail": ("DenseTail", _TAIL),
        "scales": ("Scales", {"squeeze_first": "squeeze_first", "factor_out": "factor_out"}),
        **_COMMON,
    },
}
_TORCH = ("fully_connected", "padding_first", "classes", "classifier_channels")


def upgrade(document: Any, version: int) -> Any:
    """Plain JSON values of a version, as the present version writes them."""
    for step in STEPS[version:]:
        document = _everywhere(document, step)
    return document


def _everywhere(value: Any, step: Callable[[Fields], Fields]) -> Any:
    """Applies a step to every object with a type, the inner ones first."""
    if isinstance(value, list):
        return [_everywhere(item, step) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: _everywhere(item, step) for name, item in value.items()}
    return step(value) if "type" in value else value


def _grouped(config: Fields) -> Fields:
    """From version 0 to 1: settings of a flow in groups; what is unknown stays, for the reader to name."""
    groups = _GROUPS.get(config["type"]) if isinstance(config["type"], str) else None
    if groups is None:
        return config
    config = dict(config)
    torch = {name: config.pop(name) for name in _TORCH if name in config}
    padding = _moved(config, _PADDING)
    for group, (cls, names) in groups.items():
        if found := _moved(config, names):
            config[group] = {"type": cls, **found}
    if padding:
        config.setdefault("data", {"type": groups["data"][0]})["padding"] = {"type": "Padding", **padding}
    if config["type"] == "ImageFlowConfig" and "densenet" in config:
        config["densenet"].setdefault("growth", 172)
    return {**config, "type": "TorchImageConfig", **torch} if _needs_torch(config, torch) else config


def _moved(config: Fields, names: dict[str, str]) -> Fields:
    """Takes settings out of a config, under their new names; what is a group already is left."""
    return {new: config.pop(old) for old, new in names.items() if old in config and not isinstance(config[old], dict)}


def _needs_torch(config: Fields, torch: Fields) -> bool:
    """Whether settings that only files of the PyTorch implementation need make a difference."""
    data, scales = config.get("data", {}), config.get("scales", {})
    pads_first = torch.get("padding_first") and data.get("padding", {}).get("channels")
    mean, shape = data.get("mean"), config.get("shape")
    squeezed = scales.get("squeeze_first") and mean is not None and shape is not None and len(mean) != shape[-1]
    return bool(torch.get("fully_connected") or torch.get("classes") or pads_first or squeezed)


# By the type of an object: the names of its settings in version 1, and those of version 2.
_RENAMED = {"Roulette": {"krylov": "minres_steps"}}


def _renamed(config: Fields) -> Fields:
    """From version 1 to 2."""
    names = _RENAMED.get(config["type"], {}) if isinstance(config["type"], str) else {}
    return {names.get(name, name): value for name, value in config.items()}


STEPS = (_grouped, _renamed)
