"""Images of your own: a folder of image files, a .npy or .npz array, or IDX files.

python -m experiments.density images --data.path FOLDER

The flow takes its shape from the images. It has as many scales as the image sides allow, three at most. Its sizes
are those of `fashion_mnist_uniform`, for a CPU: 28x28 grey images take 0.34 s per step on two cores. Pixels have 256
levels; `--data.bits 5` keeps 32.
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import fashion_mnist_uniform
from experiments.configs.base import DataConfig
from resflow_jax import ImageTransform

CONFIG = replace(
    fashion_mnist_uniform.CONFIG,
    data=DataConfig("images"),
    model=replace(fashion_mnist_uniform.CONFIG.model, data=ImageTransform(logit_alpha=0.05)),
    workdir=Path("runs/images"),
)
