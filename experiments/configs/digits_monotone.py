"""The 8x8 digits with monotone blocks: invertible DenseNets with CPila, of the size of `digits_densenet`.

python -m experiments.density digits_monotone

The blocks are those of Ahn et al. (2022, arXiv 2210.08176); they publish no run on this data set. The estimator is the
library's.

On 2 CPU cores that other work shared: 6 minutes, 250 ms a step. Expected: 1.75 +- 0.014 test bits/dim (one seed);
`digits_densenet` has 1.81 and `digits_uniform` 1.86 on the same images.
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import digits_densenet

CONFIG = replace(
    digits_densenet.CONFIG,
    model=replace(digits_densenet.CONFIG.model, activation="cpila", block="monotone"),
    workdir=Path("runs/digits_monotone"),
)
