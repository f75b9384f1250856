"""The options of the authors' training scripts: their defaults, their types, and how their texts are read and written.

`train_img.py` and `train_toy.py` save the namespace of their options with a model. Options that only the training uses
(estimators, optimiser, tolerances of the power iteration) do not matter to the model, nor does dropout, which is the
identity outside of training. Where a file of an earlier version of the scripts lacks an option, it has the default of
the present version.
"""

import argparse
import math
from typing import Any

from resflow_jax.functional.estimators import Estimator, Roulette, Truncated
from resflow_jax.functional.length_laws import Geometric, Poisson
from resflow_jax.interop.torch.storages import brief

IMAGE_DEFAULTS = {
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
TOY_DEFAULTS = {
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
TRAINING_DEFAULTS = {
    "wd": 0.0,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "scheduler": False,
    "add_noise": True,
    "neumann_grad": True,
    "var_reduc_lr": 0.0,
    "brute_force": False,
    "exact_trace": False,
    "optimizer": "adam",
    "lr": 1e-3,
    "warmup_iters": 1000,
    "update_freq": 1,
    "batchsize": 64,
    "annealing_iters": 0,
    "task": "density",
    "scale_dim": False,
}
"""Options of a training that a run takes over, or says that it does not."""

_DIGITS = 9  # of a size
_ACTIVATIONS = {
    "swish": "lipswish",
    "lcube": "lipschitz_cube",
    **{name: name for name in ("softplus", "elu", "identity", "relu", "tanh", "maxmin", "fullsort")},
}


def is_toy(args: argparse.Namespace) -> bool:
    """Whether the options are those of the toy script."""
    return hasattr(args, "dims") or hasattr(args, "arch")


def checked_options(args: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    """The options that matter to the model.

    Raises:
      ValueError: for an option whose type is not that of its default; the message names it.
    """
    options = {name: getattr(args, name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        value, kind = options[name], type(default)
        right = value is None or isinstance(value, int) if default is None else isinstance(value, kind)
        if kind is float:
            right = isinstance(value, int | float) and math.isfinite(_within_64_bits(name, value))
        if isinstance(value, int):
            _within_64_bits(name, value)
        if not right or (isinstance(value, bool) and kind is not bool):
            expected = "int or None" if default is None else kind.__name__
            raise ValueError(f"{name}: expected {expected}, got {brief(value)}")
    return options


def _within_64_bits(name: str, value: float) -> float:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name}: expected a number within 64 bits, got {brief(value)}")
    return value


def data_levels(args: argparse.Namespace) -> int:
    """The number of levels of the images, by which the image script divides.

    Raises:
      ValueError: for options that are none, and for another number of bits than 1 to 8.
    """
    options = checked_options(args, IMAGE_DEFAULTS)
    if options["data"] == "celebahq":
        if not 1 <= options["nbits"] <= 8:
            raise ValueError(f"nbits: expected between 1 and 8, got {options['nbits']}")
        return 2 ** options["nbits"]
    return 32 if options["data"] == "celeba_5bit" else 256


def estimator_from_args(args: argparse.Namespace) -> Estimator:
    """The estimator of the image script's training. Its law has the starting values, which the script never moves."""
    options = checked_options(args, IMAGE_DEFAULTS)
    if options["n_power_series"] is not None:
        return Truncated(options["n_power_series"])
    law = Poisson(2.0) if options["n_dist"] == "poisson" else Geometric(0.5)
    settings = {"exact_terms": options["n_exact_terms"], "samples": options["n_samples"]}
    return Roulette(law, **settings, minres_steps=0, probe="gaussian")


def numbers_of(name: str, text: str) -> tuple[int, ...]:
    """The numbers of an option that joins them by dashes, such as "3-1-3"."""
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}: expected numbers joined by '-', got {brief(text)}")
    if max(map(len, parts)) > _DIGITS:
        raise ValueError(f"{name}: expected numbers of at most {_DIGITS} digits, got {brief(text)}")
    return tuple(map(int, parts))


def numbers_text(numbers: tuple[int, ...]) -> str:
    """The inverse of `numbers_of`."""
    return "-".join(map(str, numbers))


def activation_of(option: str) -> str:
    """This library's name of an activation, for the option `act`."""
    if option not in _ACTIVATIONS:
        why = ": its slopes of up to 1.76 make no contraction" if option == "selu" else ""
        raise ValueError(f"act: expected one of {', '.join(_ACTIVATIONS)}; got {brief(option)}{why}")
    return _ACTIVATIONS[option]


def activation_option(name: str) -> str:
    """The inverse of `activation_of`."""
    options = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if name not in options:
        raise ValueError(f"activation: expected one of {', '.join(options)}, which the original has; got {name!r}")
    return options[name]


def orders_of(text: str, layers: int) -> tuple[float, ...] | None:
    """The orders of norms in the option `vnorms`, one more than there are layers; None if all are 2."""
    if not text or not set(text) <= set("123456789f"):
        raise ValueError(f"vnorms: expected digits from 1 to 9 and 'f' (infinity), got {brief(text)}")
    if len(text) != layers + 1:
        raise ValueError(f"vnorms: expected {layers + 1} orders for {layers} layers, got {brief(text)}")
    return None if set(text) == {"2"} else tuple(math.inf if letter == "f" else float(letter) for letter in text)


def orders_text(orders: tuple[float, ...] | None, layers: int) -> str:
    """The inverse of `orders_of`.

    Raises:
      ValueError: for an order that the option has no letter for.
    """
    orders = (orders or (2.0,) * (layers + 1))[: layers + 1]
    for order in orders:
        if order != math.inf and not (order.is_integer() and order < 10):
            raise ValueError(f"norms: expected whole orders below 10 or infinity, got {order}")
    return "".join("f" if order == math.inf else str(int(order)) for order in orders)


def check_closed_forms(vnorms: str, orders: tuple[float, ...] | None, kernels: tuple[int, ...], smallest: int) -> None:
    """Raises ValueError for norms that have a closed form here, and that the original iterates or measures otherwise.

    Args:
      vnorms: the option, for messages.
      orders: its orders.
      kernels: sizes of the kernels.
      smallest: height of the smallest images that the kernels are applied to.
    """
    for domain, codomain, kernel in zip(orders or (), (orders or ())[1:], kernels, strict=False):
        closed = domain == 1 or codomain == math.inf
        if closed and (codomain if domain == 1 else domain) not in (1, 2, math.inf):
            raise ValueError(f"vnorms: expected orders 1, 2 or f with a norm from 1 or to f, got {brief(vnorms)}")
        if closed and kernel > smallest:
            raise ValueError(f"kernels: expected sizes that fit images of {smallest} pixels, got {kernel}")
