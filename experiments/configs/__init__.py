"""The settings of every run by name, one file a data set."""

from experiments.configs import (
    ablations,
    celebahq64,
    celebahq256,
    cifar10,
    cifar10_densenet,
    cifar10_monotone,
    digits,
    digits_densenet,
    digits_monotone,
    digits_uniform,
    fashion_mnist,
    fashion_mnist_monotone,
    fashion_mnist_uniform,
    imagenet32,
    imagenet64,
    images,
    mnist,
    photographs,
    svhn,
    toy,
    vectors,
)

_MODULES = (
    digits,
    digits_uniform,
    digits_densenet,
    digits_monotone,
    photographs,
    mnist,
    fashion_mnist,
    fashion_mnist_uniform,
    fashion_mnist_monotone,
    cifar10,
    cifar10_densenet,
    cifar10_monotone,
    svhn,
    imagenet32,
    imagenet64,
    celebahq64,
    celebahq256,
    images,
    vectors,
)
SUMMARIES = {module.__name__.rpartition(".")[2]: module.__doc__.splitlines()[0] for module in _MODULES}
CONFIGS = {name: module.CONFIG for name, module in zip(SUMMARIES, _MODULES, strict=True)}
CONFIGS["fashion_mnist_small"] = fashion_mnist_uniform.SMALL
SUMMARIES["fashion_mnist_small"] = "Fashion-MNIST with 2-2-2 blocks and 600 steps, the flow that studies measure."
for module in (ablations, toy):
    CONFIGS |= module.CONFIGS
    SUMMARIES |= dict.fromkeys(module.CONFIGS, module.__doc__.splitlines()[0])
