"""The 8x8 digits with monotone blocks: invertible DenseNets with CPila, of the size of `digits_densenet`.

python -m experiments.density digits_monotone

The blocks are those of Ahn et al. (2022, arXiv 2210.08176); they publish no run on this data set. The estimator is the
library's.
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import digits_densenet

CONFIG = replace(
    digits_densenet.CONFIG,
    model=replace(digits_densenet.CONFIG.model, activation="cpila", block="monotone"),
    workdir=Path("runs/digits_monotone"),
)
