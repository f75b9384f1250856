"""Earlier formats of the configs of `config_json`, and the conversion to the present one.

Version 0 has no version field. All settings of a flow were fields of its config: "fc_blocks" is now "tail.blocks".
Settings that only files of the PyTorch implementation need were fields of `ImageFlowConfig`.

Version 1 has other names for some settings: see `io.renames`.

A `Roulette` without `subsample`, in any version, was written before it existed: files have all settings.
"""

from collections.abc import Callable
from typing import Any

from resflow_jax.io.renames import ARGUMENTS, with_names

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
# By group of a flow's config: the dataclass of the group, and its settings by their names in version 0.
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
    """Converts plain JSON values of a version to the present version."""
    for step in STEPS[version:]:
        document = _everywhere(document, step)
    return _everywhere(document, _with_whole_batches)


def _everywhere(value: Any, step: Callable[[Fields], Fields]) -> Any:
    """Applies a step to every object that has a type, inner objects first."""
    if isinstance(value, list):
        return [_everywhere(item, step) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: _everywhere(item, step) for name, item in value.items()}
    return step(value) if "type" in value else value


def _grouped(config: Fields) -> Fields:
    """From version 0 to 1: moves settings into groups. Unknown settings stay, and the reader will name them."""
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
    """Removes settings from a config and returns them under their new names. Groups are not moved."""
    return {new: config.pop(old) for old, new in names.items() if old in config and not isinstance(config[old], dict)}


def _needs_torch(config: Fields, torch: Fields) -> bool:
    """Whether a setting is in use that only files of the PyTorch implementation need."""
    data, scales = config.get("data", {}), config.get("scales", {})
    pads_first = torch.get("padding_first") and data.get("padding", {}).get("channels")
    mean, shape = data.get("mean"), config.get("shape")
    squeezed = scales.get("squeeze_first") and mean is not None and shape is not None and len(mean) != shape[-1]
    return bool(torch.get("fully_connected") or torch.get("classes") or pads_first or squeezed)


def _renamed(config: Fields) -> Fields:
    """From version 1 to 2."""
    return with_names(config, ARGUMENTS.get(config["type"], {}) if isinstance(config["type"], str) else {})


def _with_whole_batches(config: Fields) -> Fields:
    """A `Roulette` that was written before `subsample` existed has all terms for all examples."""
    return {"subsample": 1, **config} if config["type"] == "Roulette" else config


STEPS = (_grouped, _renamed)
