"""From the config NAME_uniform to NAME of `experiments.density`, one change after the other, or all but one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from experiments.configs import CONFIGS
from experiments.configs.base import DensityConfig

Change = Callable[[DensityConfig], DensityConfig]


class Variant(NamedTuple):
    """A config with some of the changes.

    Attributes:
      title: what distinguishes it: the last change, or the one that it lacks.
      config: the config.
    """

    title: str
    config: DensityConfig


def variants_of(data: str) -> tuple[Variant, ...]:
    """All configs on the way to that of a data set in `CHANGES`, that of NAME_uniform first."""
    found = [Variant(f"`{data}_uniform`", CONFIGS[f"{data}_uniform"])]
    for title, change in CHANGES[data].items():
        found.append(Variant(title, change(found[-1].config)))
    return tuple(found)


def without(data: str, change: int) -> Variant:
    """The config with all changes but one, which is number `change`, from 1 on."""
    config = CONFIGS[f"{data}_uniform"]
    for number, other in enumerate(CHANGES[data].values(), 1):
        config = config if number == change else other(config)
    return Variant(f"without: {list(CHANGES[data])[change - 1]}", config)


def _of_model(**settings: Any) -> Change:
    return lambda config: replace(config, model=replace(config.model, **settings))


def _narrow(config: DensityConfig) -> DensityConfig:
    """Networks of half the width."""
    tail = replace(config.model.tail, hidden=config.model.tail.hidden // 2)
    return replace(config, model=replace(config.model, hidden_channels=config.model.hidden_channels // 2, tail=tail))


def _learning_rate(rate: float) -> Change:
    return lambda config: replace(config, optimizer=replace(config.optimizer, learning_rate=rate))


def _estimator_of(data: str) -> Change:
    return lambda config: replace(config, estimator=CONFIGS[data].estimator)


CHANGES: dict[str, dict[str, Change]] = {
    "digits": {
        "half of the width": _narrow,
        "learning rate 0.03 instead of 0.01": _learning_rate(0.03),
        "CPila instead of LipSwish": _of_model(activation="cpila"),
        'an activation before the first layer of every g (`preactivation="all"`)': _of_model(preactivation="all"),
        "one exact term, then one example of four": _estimator_of("digits"),
        "variational dequantisation": _of_model(data=CONFIGS["digits"].model.data),
    },
    "fashion_mnist": {
        "half of the width": _narrow,
        "learning rate 0.04 instead of 0.008": _learning_rate(0.04),
        "CPila instead of LipSwish": _of_model(activation="cpila"),
        'an activation before the first layer of every g (`preactivation="all"`)': _of_model(preactivation="all"),
        "two exact terms, then one example of four": _estimator_of("fashion_mnist"),
        "a learned spline of the pixel values (`spline_bins=32`)": _of_model(data=CONFIGS["fashion_mnist"].model.data),
        "4-8-8 blocks instead of 4-4-4": _of_model(blocks=CONFIGS["fashion_mnist"].model.blocks),
    },
}
