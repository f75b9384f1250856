"""CIFAR-10 with the monotone flow of Ahn et al. (2022, arXiv 2210.08176), for accelerators.

python -m experiments.density cifar10_monotone --data.dir DIR

The settings are those of the authors' command: 3 scales of 16 blocks, DenseNets of depth 3 and growth 172 with CPila,
10 exact terms and Poisson(2) further ones, batches of 64. Their images are mirrored at random. Two settings differ: the
authors learn the weights of the concatenations only from epoch 25 on, here they are learned from the start; and the
number of steps is that of the other published configs. This run has not been made with this library.
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs.base import DataConfig
from experiments.configs.cifar10_densenet import CONFIG as DENSENET
from experiments.configs.published import ESTIMATOR, published

CONFIG = published(
    DataConfig("cifar10", flip=True),
    replace(DENSENET.model, activation="cpila", block="monotone"),
    estimator=replace(ESTIMATOR, exact_terms=10),
    workdir=Path("runs/cifar10_monotone"),
)
