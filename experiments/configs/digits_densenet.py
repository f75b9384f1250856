"""The 8x8 digits with an invertible DenseNet of about the size of `digits_uniform`: 107398 and 107361 parameters.

python -m experiments.density digits_densenet

On 2 CPU cores: about 7 minutes. Expected: 1.81 +- 0.013 test bits/dim; `digits_uniform` has 1.86 on the same images.
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import digits_uniform
from resflow_jax import DenseNetBlocks

CONFIG = replace(
    digits_uniform.CONFIG,
    model=replace(
        digits_uniform.CONFIG.model,
        activation="clipswish",
        tail=replace(digits_uniform.CONFIG.model.tail, densenet_first=52, densenet_growth=24),
        densenet=DenseNetBlocks(depth=3, growth=20),
    ),
    workdir=Path("runs/digits_densenet"),
)
