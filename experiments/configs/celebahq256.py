"""CelebA-HQ at 256x256 with 5 bits, with the sizes of Chen et al. (2019, arXiv 1906.02735): six scales, ELU.

python -m experiments.density celebahq256 --data.dir DIR

The estimator has eight exact terms. Batches have 8 images, and an update takes five batches. Published: 0.992 bits/dim.
This run has not been made with this library.
"""

from dataclasses import replace

from experiments.configs.base import DataConfig
from experiments.configs.published import ESTIMATOR, OPTIMIZER, published
from resflow_jax import DenseTail, ImageFlowConfig, ImageTransform, Scales

CONFIG = published(
    DataConfig("celeb_a_hq/256", bits=5, flip=True),
    ImageFlowConfig(
        (256, 256, 3),
        blocks=(16,) * 6,
        activation="elu",
        data=ImageTransform(logit_alpha=0.05),
        tail=DenseTail(0),
        scales=Scales(squeeze_first=True, factor_out=True),
    ),
    batch_size=8,
    estimator=replace(ESTIMATOR, exact_terms=8),
    optimizer=replace(OPTIMIZER, accumulate=5),
)
