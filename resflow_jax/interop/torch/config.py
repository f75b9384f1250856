"""From the options of a PyTorch checkpoint to a config: the file's `args`, and where they do not say, its tensors.

`train_img.py` and `train_toy.py` of the authors save the namespace of their options. The image script reads the number
of channels and the constants of the data off the name of the data set; here the constants come from the tensors.
Options that only the training used (estimators, optimiser, tolerances of the power iteration) do not matter here, nor
does dropout, which is the identity outside of training. Where a file of an earlier version of the scripts lacks an
option, it has the default of the present one.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from resflow_jax.functional.estimators import Estimator, Roulette, Truncated
from resflow_jax.functional.length_laws import Geometric, Poisson
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.interop.torch.storages import brief
from resflow_jax.models.config import FlowConfig, ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.groups import BetweenBlocks, DenseTail, ImageTransform, Norms, Padding, Scales

Tensors = Mapping[str, np.ndarray]

_LARGEST = 4096  # side of images
FC_BLOCKS = 4  # the image script builds so many after the last scale
NORMALIZATION = "transforms.0.chain.0"  # the place of the data's constants, where there are any

_IMAGE_DEFAULTS = {
    "data": "cifar10",
    "imagesize": 32,
    "nbits": 8,
    "block": "resblock",
    "coeff": 0.98,
    "vnorms": "2222",
    "learn_p": False,
    "factor_out": False,
    "act": "swish",
    "idim": 512,
    "nblocks": "16-16-16",
    "squeeze_first": False,
    "actnorm": True,
    "fc_actnorm": False,
    "batchnorm": False,
    "dropout": 0.0,
    "fc": False,
    "kernels": "3-1-3",
    "logit_transform": True,
    "quadratic": False,
    "fc_end": True,
    "fc_idim": 128,
    "preact": True,
    "padding": 0,
    "first_resblock": True,
    "cdim": 256,
    "task": "density",
    "padding_dist": "uniform",
    "n_dist": "poisson",
    "n_exact_terms": 2,
    "n_samples": 1,
    "n_power_series": None,
}
_TOY_DEFAULTS = {
    "arch": "iresnet",
    "coeff": 0.9,
    "vnorms": "222222",
    "learn_p": False,
    "mixed": True,
    "dims": "128-128-128-128",
    "act": "swish",
    "nblocks": 100,
    "actnorm": False,
    "batchnorm": False,
}
ACTIVATIONS = {
    "swish": "lipswish",
    "lcube": "lipschitz_cube",
    **{name: name for name in ("softplus", "elu", "identity", "relu", "tanh", "maxmin", "fullsort")},
}
_CHANNELS = {"mnist": 1} | dict.fromkeys(("cifar10", "svhn", "celebahq", "celeba_5bit", "imagenet32", "imagenet64"), 3)


def is_toy(args: argparse.Namespace) -> bool:
    """Whether the options are those of the toy script."""
    return hasattr(args, "dims") or hasattr(args, "arch")


def config_from_args(args: argparse.Namespace, tensors: Tensors) -> FlowConfig:
    """The config of the flow whose tensors a file holds; a `TorchImageConfig` where no plain one can say it.

    Raises:
      ValueError: that names the option which is unknown, unsupported, or in conflict with the tensors.
    """
    return _vector_config(args) if is_toy(args) else _image_config(args, tensors).simplest()


def args_from_config(config: FlowConfig) -> argparse.Namespace:
    """The options with which the scripts build the flow of a config.

    Raises:
      ValueError: that names the first part of the config for which they have no option.
    """
    image = isinstance(config, ImageFlowConfig)
    config = _with_torch_options(config) if image else config
    options = _image_options(config) if image else _toy_options(config)
    args = argparse.Namespace(**(_IMAGE_DEFAULTS if image else _TOY_DEFAULTS) | options)
    classifier = {"logit_layer.weight": np.zeros((config.classes if image else 0, 0))}
    constants = {"mean": config.data.mean or (), "std": config.data.std or ()}
    size = config.shape[-1] if image else 0
    tensors = {f"{NORMALIZATION}.{part}": np.asarray(values[:size]) for part, values in constants.items()}
    built = _image_config(args, classifier | tensors) if image else _vector_config(args)
    unused, others = _unused_fields(config), _flat(built)
    for name, wanted in _flat(config).items():
        if name in ("norms.orders", "tail.norms") and wanted is not None and set(wanted) == {2.0}:
            wanted = None
        if wanted != others[name] and name not in unused:
            expected = f"expected {others[name]!r}, which the original has an option for"
            raise ValueError(f"{name}: {expected}, got {wanted!r}")
    return args


def _with_torch_options(config: ImageFlowConfig) -> TorchImageConfig:
    """The same flow as a `TorchImageConfig`."""
    if isinstance(config, TorchImageConfig):
        return config
    return TorchImageConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of a config by their names, those of groups as "tail.blocks"."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= _flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def _image_options(config: TorchImageConfig) -> dict[str, Any]:
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
        "coeff": config.coefficient,
        "vnorms": _norms_as_text(config.norms.orders, len(kernels)),
        "learn_p": config.norms.learned,
        "factor_out": config.scales.factor_out,
        "act": _activation_option(config.activation),
        "idim": config.hidden_channels,
        "nblocks": "-".join(map(str, config.blocks)),
        "squeeze_first": config.scales.squeeze_first,
        "actnorm": between.actnorm,
        "fc_actnorm": between.feature_actnorm,
        "batchnorm": between.centering == "layers",
        "fc": config.fully_connected,
        "kernels": "-".join(map(str, kernels)),
        "logit_transform": config.data.logit_alpha is not None,
        "quadratic": between.invertible_linear,
        "fc_end": tail.blocks > 0,
        "fc_idim": tail.hidden,
        "preact": config.preactivation != "none",
        "padding": padding.channels,
        "padding_dist": padding.noise,
        "first_resblock": first if config.preactivation != "none" else between.first_actnorm,
        "cdim": config.classifier_channels,
        "task": "hybrid" if config.classes else "density",
    }


def _toy_options(config: VectorFlowConfig) -> dict[str, Any]:
    layers = len(config.hidden) + 1
    return {
        "coeff": config.coefficient,
        "vnorms": _norms_as_text(config.norms.orders, layers + (config.norms.ties == "none")),
        "learn_p": config.norms.learned,
        "mixed": config.norms.ties != "all",
        "dims": "-".join(map(str, config.hidden)),
        "act": _activation_option(config.activation),
        "nblocks": config.blocks,
        "actnorm": config.between.actnorm,
        "batchnorm": config.between.centering == "blocks",
    }


def _activation_option(name: str) -> str:
    options = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if name not in options:
        raise ValueError(f"activation: expected one of {', '.join(options)}, which the original has; got {name!r}")
    return options[name]


def _norms_as_text(norms: tuple[float, ...] | None, layers: int) -> str:
    """The option `vnorms`, of whole orders."""
    orders = (norms or (2.0,) * (layers + 1))[: layers + 1]
    for order in orders:
        if order != math.inf and not (order.is_integer() and order < 10):
            raise ValueError(f"norms: expected whole orders below 10 or infinity, got {order}")
    return "".join("f" if order == math.inf else str(int(order)) for order in orders)


def _unused_fields(config: FlowConfig) -> set[str]:
    """Parts of a config that make no difference to the flow, beside others of it."""
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
        unused |= {"kernels"}  # as many layers in either case
    return unused


def estimator_from_args(args: argparse.Namespace) -> Estimator:
    """The estimator of a training on images, with the starting values of its law, which the script never moves."""
    options = _options(args, _IMAGE_DEFAULTS)
    if options["n_power_series"] is not None:
        return Truncated(options["n_power_series"])
    law = Poisson(2.0) if options["n_dist"] == "poisson" else Geometric(0.5)
    return Roulette(law, exact_terms=options["n_exact_terms"], samples=options["n_samples"])


def data_levels(args: argparse.Namespace) -> int:
    """How many levels the images have, by which the image script divides."""
    options = _options(args, _IMAGE_DEFAULTS)
    return {"celeba_5bit": 32, "celebahq": 2 ** options["nbits"]}.get(options["data"], 256)


def _image_config(args: argparse.Namespace, tensors: Tensors) -> TorchImageConfig:
    options = _options(args, _IMAGE_DEFAULTS)
    if options["block"] != "resblock":
        raise ValueError(f"block: expected 'resblock', got {options['block']!r}: coupling blocks are not supported")
    if options["data"] not in _CHANNELS:
        raise ValueError(f"data: expected one of {', '.join(_CHANNELS)}; got {options['data']!r}")
    channels, size = _CHANNELS[options["data"]], options["imagesize"]
    if not 4 <= size <= _LARGEST:
        raise ValueError(f"imagesize: expected a number from 4 to {_LARGEST}, got {size}")
    kernels = _numbers("kernels", options["kernels"])
    blocks = _numbers("nblocks", options["nblocks"])[: _scales(size // 2 if options["squeeze_first"] else size)]
    if not blocks or min(blocks) < 1:
        raise ValueError(f"nblocks: expected at least one block a scale, got {options['nblocks']!r}")
    layers = len(kernels)
    conv_norms = fc_norms = None
    if not options["learn_p"]:
        fc_norms = conv_norms = _norms(options["vnorms"], layers)
    if layers == 1 and not options["fc"]:  # the script builds a first and a last convolution of this size
        kernels = 2 * kernels
        if conv_norms and conv_norms[0] != conv_norms[1]:
            raise ValueError(
                f"vnorms: expected two equal orders for the one size in kernels, got {options['vnorms']!r}"
            )
        conv_norms = conv_norms and (*conv_norms, conv_norms[0])
    if options["fc"]:
        kernels = (1,) * layers  # only their number counts
    _check_closed_forms(options["vnorms"], conv_norms, kernels, _smallest(size, len(blocks), options["squeeze_first"]))
    alone = len(blocks) == 1 or options["fc"]  # then no block is built without its first activation
    preactivation = "all" if alone or not options["first_resblock"] else "all_but_first"
    classifies = options["task"] in ("classification", "hybrid")
    normalizes = classifies and options["data"] == "cifar10"
    logit = options["logit_transform"] and not normalizes
    padding = options["padding"]
    law = _padding_law(options["padding_dist"], data_levels(args)) if padding else {}
    return TorchImageConfig(
        shape=(size, size, channels),
        blocks=blocks,
        hidden_channels=options["idim"],
        kernels=kernels,
        activation=_activation(options["act"]),
        preactivation=preactivation if options["preact"] else "none",
        coefficient=options["coeff"],
        data=ImageTransform(
            **_data_constants(tensors, 4 * channels if options["squeeze_first"] else channels, normalizes),
            padding=Padding(channels=padding, **law),
            logit_alpha=(1e-6 if options["data"] == "mnist" else 0.05) if logit else None,
        ),
        between=BetweenBlocks(
            actnorm=options["actnorm"],
            feature_actnorm=options["fc_actnorm"],
            first_actnorm=options["first_resblock"],
            centering="layers" if options["batchnorm"] and not options["fc"] else None,
            invertible_linear=options["quadratic"],
        ),
        norms=Norms(
            orders=conv_norms,
            learned=options["learn_p"],
            ties="all" if options["learn_p"] and layers == 1 else "closed",
        ),
        tail=DenseTail(
            blocks=FC_BLOCKS if options["fc_end"] else 0, hidden=options["fc_idim"], layers=layers, norms=fc_norms
        ),
        scales=Scales(squeeze_first=options["squeeze_first"], factor_out=options["factor_out"]),
        fully_connected=options["fc"],
        padding_first=padding > 0,
        classes=_shape(tensors, "logit_layer.weight")[0] if classifies else 0,
        classifier_channels=options["cdim"],
    )


def _vector_config(args: argparse.Namespace) -> VectorFlowConfig:
    options = _options(args, _TOY_DEFAULTS)
    if options["arch"] != "iresnet":
        raise ValueError(f"arch: expected 'iresnet', got {options['arch']!r}: coupling blocks are not supported")
    hidden = _numbers("dims", options["dims"])
    layers, given = len(hidden) + 1, len(options["vnorms"]) - 1
    if given < layers:
        raise ValueError(
            f"vnorms: expected at least {layers + 1} orders for {layers} layers, got {options['vnorms']!r}"
        )
    norms, ties = None, "closed"
    if not options["learn_p"]:
        norms = _norms(options["vnorms"][: layers + 1], layers)
        _check_closed_forms(options["vnorms"], norms, (1,) * layers, 1)
    elif not options["mixed"]:
        ties = "all"
    elif given > layers:
        ties = "none"  # the last order is tied to one of a layer that the script never built
    return VectorFlowConfig(
        dim=2,
        blocks=options["nblocks"],
        hidden=hidden,
        activation=_activation(options["act"]),
        preactivation="all",
        coefficient=options["coeff"],
        between=BetweenBlocks(
            actnorm=options["actnorm"],
            first_actnorm=options["actnorm"],
            centering="blocks" if options["batchnorm"] else None,
        ),
        norms=Norms(orders=norms, learned=options["learn_p"], ties=ties),
    )


def _options(args: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    """The options that matter, each of the type of its default."""
    options = {name: getattr(args, name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        value, kind = options[name], type(default)
        right = value is None or isinstance(value, int) if default is None else isinstance(value, kind)
        if kind is float:
            right = isinstance(value, int | float)
        if not right or (isinstance(value, bool) and kind is not bool):
            expected = "int or None" if default is None else kind.__name__
            raise ValueError(f"{name}: expected {expected}, got {brief(value)}")
    return options


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Numbers joined by dashes."""
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}: expected numbers joined by '-', got {text!r}")
    return tuple(map(int, parts))


def _scales(size: int) -> int:
    """How many scales the image script makes of images of this size at most."""
    number = 0
    while size >= 4:
        number, size = number + 1, size // 2
    return number


def _smallest(size: int, scales: int, squeeze_first: bool) -> int:
    """The size of the images in the last scale."""
    return size // 2 ** (scales - 1 + squeeze_first)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        why = ": its slopes of up to 1.76 make no contraction" if name == "selu" else ""
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}; got {name!r}{why}")
    return ACTIVATIONS[name]


def _norms(text: str, layers: int) -> tuple[float, ...] | None:
    """The orders, or None if all are 2."""
    if not text or not set(text) <= set("123456789f"):
        raise ValueError(f"vnorms: expected digits from 1 to 9 and 'f' (infinity), got {text!r}")
    if len(text) != layers + 1:
        raise ValueError(f"vnorms: expected {layers + 1} orders for {layers} layers, got {text!r}")
    return None if set(text) == {"2"} else tuple(math.inf if letter == "f" else float(letter) for letter in text)


def _check_closed_forms(vnorms: str, norms: tuple[float, ...] | None, kernels: tuple[int, ...], smallest: int) -> None:
    """Raises for norms that have a closed form here, but are iterated there or measured in another way."""
    for domain, codomain, kernel in zip(norms or (), (norms or ())[1:], kernels, strict=False):
        closed = domain == 1 or codomain == math.inf
        if closed and (codomain if domain == 1 else domain) not in (1, 2, math.inf):
            raise ValueError(f"vnorms: expected orders 1, 2 or f beside a norm from 1 or to f, got {vnorms!r}")
        if closed and kernel > smallest:
            raise ValueError(f"kernels: expected sizes that fit images of {smallest} pixels, got {kernel}")


def _data_constants(tensors: Tensors, channels: int, normalizes: bool) -> dict[str, Any]:
    """Mean and std of the data's channels. After a squeeze the script normalises the first few alone."""
    if not normalizes:
        return {}
    mean, std = (tensors.get(f"{NORMALIZATION}.{name}", np.zeros(0)) for name in ("mean", "std"))
    _shape(tensors, f"{NORMALIZATION}.mean"), _shape(tensors, f"{NORMALIZATION}.std")
    if mean.ndim != 1 or mean.shape != std.shape or mean.size > channels:
        raise ValueError(f"{NORMALIZATION}.mean: expected one number a channel, as in std, got shape {mean.shape}")
    others = channels - mean.size
    return {
        "mean": (*map(float, mean), *[0.0] * others),
        "std": (*map(float, std), *[1.0] * others),
    }


def _padding_law(noise: str, levels: int) -> dict[str, Any]:
    """The script draws noise for integers from 0 to the number of levels, by which it divides."""
    if noise not in ("uniform", "gaussian"):
        raise ValueError(f"padding_dist: expected uniform or gaussian, got {noise!r}")
    scale, shift = (1 / levels, 0.0) if noise == "uniform" else (0.125, 0.5)
    return {"noise": noise, "scale": scale, "shift": shift}


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{name}: expected in the file, as its args say, but it is missing")
    return tensors[name].shape
