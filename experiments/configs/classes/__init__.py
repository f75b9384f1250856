"""The settings of every run of `experiments.classify` by name.

Each network is there three times: invertible, without the bound ("vanilla"), and as a standard residual network.
"""

from dataclasses import replace

from experiments.configs.classes import cifar10, digits, fashion_mnist, images, mnist
from experiments.configs.classification import ClassifyConfig


def without_bound(config: ClassifyConfig, architecture: str) -> ClassifyConfig:
    """The same network without the bound on its convolutions, or the standard network of the same size."""
    name = "vanilla" if architecture == "invertible" else architecture
    model = replace(config.model, coefficient=None, architecture=architecture)
    return replace(config, model=model, workdir=config.workdir.with_name(f"{config.workdir.name}_{name}"))


_SETS = {
    "digits": digits.CONFIG,
    "fashion_mnist": fashion_mnist.CONFIG,
    "mnist": mnist.CONFIG,
    "cifar10": cifar10.CONFIG,
    "cifar100": cifar10.CIFAR100,
    "images": images.CONFIG,
}
CLASS_CONFIGS = {
    **_SETS,
    **{f"{name}_vanilla": without_bound(config, "invertible") for name, config in _SETS.items()},
    **{f"{name}_standard": without_bound(config, "standard") for name, config in _SETS.items()},
}
CLASS_SUMMARIES = {
    "digits": digits.__doc__.splitlines()[0],
    "fashion_mnist": fashion_mnist.__doc__.splitlines()[0],
    "mnist": mnist.__doc__.splitlines()[0],
    **dict.fromkeys(("cifar10", "cifar100"), cifar10.__doc__.splitlines()[0]),
    "images": images.__doc__.splitlines()[0],
    **{f"{name}_vanilla": "The same networks without the bound: no inverse that can be relied on." for name in _SETS},
    **{f"{name}_standard": "Standard residual networks of the same size, with strides." for name in _SETS},
}
