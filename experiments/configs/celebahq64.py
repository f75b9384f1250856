"""CelebA-HQ at 64x64 with 5 bits; data settings of the authors' `train_img.py`, model settings of ImageNet 64.

python -m experiments.density celebahq64 --data.dir DIR

No bits/dim are published for it. This run has not been made with this library.
"""

from experiments.configs.base import DataConfig
from experiments.configs.published import published
from resflow_jax import ImageFlowConfig, ImageTransform, Scales

CONFIG = published(
    DataConfig("celeb_a_hq/64", bits=5, flip=True),
    ImageFlowConfig(
        (64, 64, 3), data=ImageTransform(logit_alpha=0.05), scales=Scales(squeeze_first=True, factor_out=True)
    ),
)
