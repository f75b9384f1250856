"""Fashion-MNIST with monotone blocks: invertible DenseNets with CPila.

python -m experiments.density fashion_mnist_monotone --data.dir DIR

The blocks are those of Ahn et al. (2022, arXiv 2210.08176); they publish no run on this data set. Scales, steps,
optimiser and estimator are those of `fashion_mnist_uniform`. This run has not been made. Its first steps took six
seconds each on 2 CPU cores that other work shared, so all 5000 take hours there.
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import fashion_mnist_uniform
from resflow_jax import DenseNetBlocks

MODEL = fashion_mnist_uniform.CONFIG.model
CONFIG = replace(
    fashion_mnist_uniform.CONFIG,
    model=replace(
        MODEL,
        activation="cpila",
        tail=replace(MODEL.tail, densenet_first=52, densenet_growth=24),
        densenet=DenseNetBlocks(depth=3, growth=20),
        block="monotone",
    ),
    workdir=Path("runs/fashion_mnist_monotone"),
)
