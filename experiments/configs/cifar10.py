"""CIFAR-10 with the sizes of Chen et al. (2019, arXiv 1906.02735): 25.2 million parameters.

python -m experiments.density cifar10 --data.dir DIR

Published: 3.280 bits/dim. This run has not been made with this library.
"""

from experiments.configs.base import DataConfig
from experiments.configs.published import published
from resflow_jax import ImageFlowConfig, ImageTransform

CONFIG = published(
    DataConfig("cifar10", flip=True), ImageFlowConfig((32, 32, 3), data=ImageTransform(logit_alpha=0.05))
)
