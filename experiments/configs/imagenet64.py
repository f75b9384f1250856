"""ImageNet at 64x64 with the sizes of Chen et al. (2019, arXiv 1906.02735): a first squeeze, factored-out channels.

python -m experiments.density imagenet64 --data.dir DIR

Published: 3.757 bits/dim on the validation split. This run has not been made with this library.
"""

from experiments.configs.base import DataConfig
from experiments.configs.published import published
from resflow_jax import ImageFlowConfig, ImageTransform, Scales

CONFIG = published(
    DataConfig("downsampled_imagenet/64x64"),
    ImageFlowConfig(
        (64, 64, 3),
        blocks=(32, 32, 32),
        data=ImageTransform(logit_alpha=0.05),
        scales=Scales(squeeze_first=True, factor_out=True),
    ),
)
