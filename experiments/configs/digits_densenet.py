"""The 8x8 digits with an invertible DenseNet of as many parameters as the default run, 107398 beside 107361.

python -m experiments.density digits_densenet
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import digits

CONFIG = replace(
    digits.CONFIG,
    model=replace(
        digits.CONFIG.model,
        activation="clipswish",
        dense_depth=3,
        dense_growth=20,
        fc_dense_first=52,
        fc_dense_growth=24,
    ),
    workdir=Path("runs/digits_densenet"),
)
