"""MNIST, 28x28 with 256 levels, with the sizes of Chen et al. (2019, arXiv 1906.02735).

python -m experiments.density mnist --data.dir DIR

Published: 0.970 bits/dim. This run has not been made with this library.
"""

from experiments.configs.base import DataConfig
from experiments.configs.published import published
from resflow_jax import ImageFlowConfig

CONFIG = published(DataConfig("mnist"), ImageFlowConfig((28, 28, 1)))
