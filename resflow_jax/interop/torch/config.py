"""Options of the authors' training scripts as a config of a flow, and back.

Most options say the same as one setting of a config: they are rows of a table, (option, setting, transforms). What
depends on several options, on the tensors of the file or on the name of the data set is said by functions. The image
script reads the number of channels and the constants of the data off the name of the data set; here the constants come
from the tensors.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from resflow_jax.functional.checks import check_choice
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.interop.torch.options import (
    IMAGE_DEFAULTS,
    TOY_DEFAULTS,
    activation_of,
    activation_option,
    check_closed_forms,
    checked_options,
    data_levels,
    is_toy,
    numbers_of,
    numbers_text,
    orders_of,
    orders_text,
)
from resflow_jax.interop.torch.storages import brief
from resflow_jax.models.config import FlowConfig, ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.groups import BetweenBlocks, DenseTail, ImageTransform, Norms, Padding, Scales

Options = Mapping[str, Any]
Settings = dict[str, Any]  # of a config by name, those of groups as "tail.blocks"
Tensors = Mapping[str, np.ndarray]

FC_BLOCKS = 4  # dense blocks that the image script builds after the last scale
NORMALIZATION = "transforms.0.chain.0"  # the module of the data's constants, where there are any
_CHANNELS = {"mnist": 1} | dict.fromkeys(("cifar10", "svhn", "celebahq", "celeba_5bit", "imagenet32", "imagenet64"), 3)
_MAX_SIZE = 4096  # side of images


def _same(value: Any) -> Any:
    return value


class Row(NamedTuple):
    """An option and the setting of a config that says the same.

    Attributes:
      option: name of the option.
      setting: name of the setting, "tail.hidden" for one of a group.
      read: from the value of the option to that of the setting.
      write: from the value of the setting to that of the option.
    """

    option: str
    setting: str
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


_COMMON = (
    Row("coeff", "coefficient"),
    Row("act", "activation", activation_of, activation_option),
    Row("learn_p", "norms.learned"),
    Row("actnorm", "between.actnorm"),
)
_IMAGE = (
    *_COMMON,
    Row("idim", "hidden_channels"),
    Row("fc_actnorm", "between.feature_actnorm"),
    Row("quadratic", "between.invertible_linear"),
    Row("squeeze_first", "scales.squeeze_first"),
    Row("factor_out", "scales.factor_out"),
    Row("fc_end", "tail.blocks", lambda is_built: FC_BLOCKS if is_built else 0, lambda blocks: blocks > 0),
    Row("fc_idim", "tail.hidden"),
    Row("fc", "fully_connected"),
    Row("padding", "data.padding.channels"),
    Row("cdim", "classifier_channels"),
    Row("block", "block"),
)
_TOY = (
    *_COMMON,
    Row("nblocks", "blocks"),
    Row("dims", "hidden", partial(numbers_of, "dims"), numbers_text),
    Row("batchnorm", "between.centering", {True: "blocks", False: None}.get, lambda kind: kind == "blocks"),
)
_GROUPS = {
    "between": BetweenBlocks,
    "data": ImageTransform,
    "data.padding": Padding,
    "norms": Norms,
    "scales": Scales,
    "tail": DenseTail,
}


def config_from_args(args: argparse.Namespace, tensors: Tensors) -> FlowConfig:
    """The config of the flow whose tensors a file holds; a `TorchImageConfig` where no plain one can say it.

    Raises:
      ValueError: for an option that is unknown, not supported, or in conflict with the tensors; the message names it.
    """
    return _vector_config(args) if is_toy(args) else _image_config(args, tensors).simplest()


def args_from_config(config: FlowConfig) -> argparse.Namespace:
    """The options with which the scripts build the flow of a config.

    Raises:
      ValueError: for a setting that the scripts have no option for; the message names the first one.
    """
    image = isinstance(config, ImageFlowConfig)
    config = _with_torch_settings(config) if image else config
    settings = _settings(config)
    options = {row.option: row.write(settings[row.setting]) for row in (_IMAGE if image else _TOY)}
    options |= _image_options(config) if image else _toy_options(config)
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    args = argparse.Namespace(**(IMAGE_DEFAULTS if image else TOY_DEFAULTS) | options)
    _check_says_the_same(args, config, settings)
    return args


def _check_says_the_same(args: argparse.Namespace, config: FlowConfig, settings: Settings) -> None:
    """Raises ValueError unless the flow of the options is that of the config."""
    if isinstance(config, ImageFlowConfig):
        constants = {"mean": config.data.mean or (), "std": config.data.std or ()}
        tensors = {
            f"{NORMALIZATION}.{part}": np.asarray(values[: config.shape[-1]]) for part, values in constants.items()
        }
        found = _settings(_image_config(args, {"logit_layer.weight": np.zeros((config.classes, 0))} | tensors))
    else:
        found = _settings(_vector_config(args))
    unused = _unused_settings(config)
    for name, wanted in settings.items():
        if name in ("norms.orders", "tail.norms") and wanted is not None and set(wanted) == {2.0}:
            wanted = None
        if wanted != found[name] and name not in unused:
            expected = f"expected {found[name]!r}, which the original has an option for"
            raise ValueError(f"{name}: {expected}, got {wanted!r}")


def _unused_settings(config: FlowConfig) -> set[str]:
    """Settings that make no difference to the flow of a config, because of others."""
    unused = {"matmul_dtype", "densenet.growth", "tail.densenet_first", "tail.densenet_growth"}
    unused |= set() if config.norms.learned else {"norms.ties"}
    if not config.data.padding.channels:
        unused |= {"data.padding.noise", "data.padding.scale", "data.padding.shift", "padding_first"}
    if not (config.between.actnorm or config.between.feature_actnorm):
        unused |= {"between.first_actnorm"}
    if isinstance(config, VectorFlowConfig):
        return unused
    if not config.tail.blocks:
        unused |= {"tail.hidden", "tail.layers", "tail.norms"}
    if not config.classes:
        unused |= {"classifier_channels"}
    if config.fully_connected:
        unused |= {"kernels"}  # only their number counts
    return unused


def _with_torch_settings(config: ImageFlowConfig) -> TorchImageConfig:
    """The same flow as a `TorchImageConfig`."""
    if isinstance(config, TorchImageConfig):
        return config
    if config.block != "residual":
        raise ValueError(f"block: expected 'residual', which the original has an option for, got {config.block!r}")
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return TorchImageConfig(**settings | {"block": "resblock"})


def _settings(config: Any, prefix: str = "") -> Settings:
    """The settings of a config by name."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= _settings(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def _from_settings(cls: type, settings: Settings, prefix: str = "") -> Any:
    """The config, or group of a config, with these settings; all others have their defaults."""
    values = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if name in settings:
            values[field.name] = settings[name]
        elif any(setting.startswith(f"{name}.") for setting in settings):
            values[field.name] = _from_settings(_GROUPS[name], settings, f"{name}.")
    return cls(**values)


def _image_config(args: argparse.Namespace, tensors: Tensors) -> TorchImageConfig:
    options = checked_options(args, IMAGE_DEFAULTS)
    check_choice("block", options["block"], ("resblock", "coupling"))
    if options["block"] == "coupling":
        options = _of_couplings(options)
    if options["data"] not in _CHANNELS:
        raise ValueError(f"data: expected one of {', '.join(_CHANNELS)}; got {brief(options['data'])}")
    channels, size = _CHANNELS[options["data"]], options["imagesize"]
    if not 4 <= size <= _MAX_SIZE:
        raise ValueError(f"imagesize: expected a number from 4 to {_MAX_SIZE}, got {size}")
    blocks = numbers_of("nblocks", options["nblocks"])
    blocks = blocks[: _most_scales(size // 2 if options["squeeze_first"] else size)]
    if not blocks or min(blocks) < 1:
        raise ValueError(f"nblocks: expected at least one block a scale, got {brief(options['nblocks'])}")
    smallest = size // 2 ** (len(blocks) - 1 + options["squeeze_first"])
    settings = {row.setting: row.read(options[row.option]) for row in _IMAGE}
    settings |= {"shape": (size, size, channels), "blocks": blocks}
    settings |= _kernels_and_norms(options, smallest)
    settings |= _activations_before_blocks(options, len(blocks))
    settings |= _data_and_classes(options, tensors, channels)
    if options["padding"]:
        settings |= _padding_law(options["padding_dist"], data_levels(args))
    return _from_settings(TorchImageConfig, settings)


def _of_couplings(options: Options) -> dict[str, Any]:
    """The options of a model of coupling blocks, without norms: its networks have no bound."""
    if options["batchnorm"] and not options["fc"]:
        raise ValueError("batchnorm: expected False together with coupling blocks, got True")
    layers = len(numbers_of("kernels", options["kernels"]))
    return {**options, "learn_p": False, "vnorms": "2" * (layers + 1)}


def _image_options(config: TorchImageConfig) -> dict[str, Any]:
    """The options of an image config that are not in the table."""
    kernels, tail, padding, between = config.kernels, config.tail, config.data.padding, config.between
    if not config.fully_connected and tail.blocks and tail.layers == 1 and kernels == 2 * kernels[:1]:
        kernels = kernels[:1]
    channels = config.shape[-1]
    levels = round(1 / padding.scale) if padding.noise == "uniform" else 256
    several = len(config.blocks) > 1
    first = config.preactivation == "all_but_first" if several and not config.fully_connected else between.first_actnorm
    return {
        "data": "mnist" if channels == 1 else "celeba_5bit" if padding.channels and levels == 32 else "cifar10",
        "imagesize": config.shape[0],
        "nblocks": numbers_text(config.blocks),
        "kernels": numbers_text(kernels),
        "vnorms": orders_text(config.norms.orders, len(kernels)),
        "batchnorm": between.centering == "layers",
        "logit_transform": config.data.logit_alpha is not None,
        "preact": config.preactivation != "none",
        "first_resblock": first if config.preactivation != "none" else between.first_actnorm,
        "padding_dist": padding.noise,
        "task": "hybrid" if config.classes else "density",
    }


def _kernels_and_norms(options: Options, smallest: int) -> Settings:
    """kernels, vnorms, learn_p and fc; the last scale has images of `smallest` pixels a side."""
    kernels, vnorms = numbers_of("kernels", options["kernels"]), options["vnorms"]
    layers = len(kernels)
    orders = None if options["learn_p"] else orders_of(vnorms, layers)
    conv_orders = orders
    if layers == 1 and not options["fc"]:  # the script builds a first and a last convolution of this size
        kernels = 2 * kernels
        if orders and orders[0] != orders[1]:
            raise ValueError(f"vnorms: expected two equal orders for the one size in kernels, got {brief(vnorms)}")
        conv_orders = orders and (*orders, orders[0])
    if options["fc"]:
        kernels = (1,) * layers  # only their number counts
    check_closed_forms(vnorms, conv_orders, kernels, smallest)
    return {
        "kernels": kernels,
        "norms.orders": conv_orders,
        "norms.ties": "all" if options["learn_p"] and layers == 1 else "closed",
        "tail.layers": layers,
        "tail.norms": orders,
    }


def _activations_before_blocks(options: Options, scales: int) -> Settings:
    """preact, first_resblock and batchnorm."""
    alone = scales == 1 or options["fc"]  # then the script builds every block with its first activation
    preactivation = "all" if alone or not options["first_resblock"] else "all_but_first"
    return {
        "preactivation": preactivation if options["preact"] else "none",
        "between.first_actnorm": options["first_resblock"],
        "between.centering": "layers" if options["batchnorm"] and not options["fc"] else None,
    }


def _data_and_classes(options: Options, tensors: Tensors, channels: int) -> Settings:
    """data, task and logit_transform. A classifier of CIFAR-10 normalises the data instead of applying a logit."""
    classifies = options["task"] in ("classification", "hybrid")
    normalizes = classifies and options["data"] == "cifar10"
    has_logit = options["logit_transform"] and not normalizes
    settings = {
        "data.logit_alpha": (1e-6 if options["data"] == "mnist" else 0.05) if has_logit else None,
        "padding_first": options["padding"] > 0,
        "classes": _shape(tensors, "logit_layer.weight")[0] if classifies else 0,
    }
    if normalizes:
        settings |= _data_constants(tensors, 4 * channels if options["squeeze_first"] else channels)
    return settings


def _data_constants(tensors: Tensors, channels: int) -> Settings:
    """Mean and standard deviation of the data's channels. After a squeeze the script normalises only the first few."""
    mean, std = (tensors.get(f"{NORMALIZATION}.{name}", np.zeros(0)) for name in ("mean", "std"))
    _shape(tensors, f"{NORMALIZATION}.mean"), _shape(tensors, f"{NORMALIZATION}.std")
    if mean.ndim != 1 or mean.shape != std.shape or mean.size > channels:
        raise ValueError(f"{NORMALIZATION}.mean: expected one number a channel, as in std, got shape {mean.shape}")
    others = channels - mean.size
    return {
        "data.mean": (*map(float, mean), *[0.0] * others),
        "data.std": (*map(float, std), *[1.0] * others),
    }


def _padding_law(noise: str, levels: int) -> Settings:
    """The script draws noise for integers from 0 to the number of levels, by which it divides."""
    if noise not in ("uniform", "gaussian"):
        raise ValueError(f"padding_dist: expected uniform or gaussian, got {brief(noise)}")
    scale, shift = (1 / levels, 0.0) if noise == "uniform" else (0.125, 0.5)
    return {"data.padding.noise": noise, "data.padding.scale": scale, "data.padding.shift": shift}


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{name}: expected in the file, as its args say, but it is missing")
    return tensors[name].shape


def _most_scales(size: int) -> int:
    """The largest number of scales that the image script makes of images of this size."""
    scales = 0
    while size >= 4:
        scales, size = scales + 1, size // 2
    return scales


def _vector_config(args: argparse.Namespace) -> VectorFlowConfig:
    options = checked_options(args, TOY_DEFAULTS)
    if options["arch"] != "iresnet":
        raise ValueError(
            f"arch: expected 'iresnet', got {brief(options['arch'])}: the script gives coupling blocks no network, and "
            "writes no such file"
        )
    layers, given = len(numbers_of("dims", options["dims"])) + 1, len(options["vnorms"]) - 1
    if given < layers:
        raise ValueError(
            f"vnorms: expected at least {layers + 1} orders for {layers} layers, got {brief(options['vnorms'])}"
        )
    orders, ties = None, "closed"
    if not options["learn_p"]:
        orders = orders_of(options["vnorms"][: layers + 1], layers)
        check_closed_forms(options["vnorms"], orders, (1,) * layers, 1)
    elif not options["mixed"]:
        ties = "all"
    elif given > layers:
        ties = "none"  # the last order is tied to one of a layer that the script never built
    settings = {row.setting: row.read(options[row.option]) for row in _TOY}
    settings |= {"dim": 2, "preactivation": "all", "between.first_actnorm": options["actnorm"]}
    return _from_settings(VectorFlowConfig, settings | {"norms.orders": orders, "norms.ties": ties})


def _toy_options(config: VectorFlowConfig) -> dict[str, Any]:
    """The options of a config of vectors that are not in the table."""
    layers = len(config.hidden) + 1
    return {
        "vnorms": orders_text(config.norms.orders, layers + (config.norms.ties == "none")),
        "mixed": config.norms.ties != "all",
    }
