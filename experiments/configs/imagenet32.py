"""ImageNet at 32x32 with the sizes of Chen et al. (2019, arXiv 1906.02735): 96 convolutional blocks.

python -m experiments.density imagenet32 --data.dir DIR

Published: 4.010 bits/dim on the validation split. This run has not been made with this library.
"""

from experiments.configs.base import DataConfig
from experiments.configs.published import published
from resflow_jax import ImageFlowConfig, ImageTransform

CONFIG = published(
    DataConfig("downsampled_imagenet/32x32"),
    ImageFlowConfig((32, 32, 3), blocks=(32, 32, 32), data=ImageTransform(logit_alpha=0.05)),
)
