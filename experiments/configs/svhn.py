"""SVHN, 32x32, with the sizes of Chen et al. (2019, arXiv 1906.02735) and the crops of the authors' `train_img.py`.

python -m experiments.density svhn --data.dir DIR

No bits/dim are published for it. This run has not been made with this library.
"""

from experiments.configs.base import DataConfig
from experiments.configs.published import published
from resflow_jax import ImageFlowConfig, ImageTransform

CONFIG = published(
    DataConfig("svhn_cropped", crop=4), ImageFlowConfig((32, 32, 3), data=ImageTransform(logit_alpha=0.05))
)
