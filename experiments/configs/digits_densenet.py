"""The 8x8 digits with an invertible DenseNet of as many parameters as the default run.

python -m experiments.density digits_densenet
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import digits

CONFIG = replace(
    digits.CONFIG,
    model=replace(
        digits.CONFIG.model, activation="clipswish", dense_depth=3, dense_growth=32, fc_dense_first=32, fc_dense_growth=16
    ),
    workdir=Path("runs/digits_densenet"),
)
