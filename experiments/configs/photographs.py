"""16x16 colour crops of the two photographs that scikit-learn ships, split by region; needs no network.

python -m experiments.density photographs

On 2 CPU cores: about 4 minutes. Expected: 3.38 +- 0.08 test bits/dim (4.0 in training, whose region is less smooth);
the samples show colours and rough textures of the photographs.
"""

from pathlib import Path

from experiments.configs.base import DataConfig, DensityConfig
from resflow_jax import DenseTail, ImageFlowConfig, ImageTransform

CONFIG = DensityConfig(
    data=DataConfig("photographs"),
    model=ImageFlowConfig(
        (16, 16, 3), blocks=(4, 4), hidden_channels=64, data=ImageTransform(logit_alpha=0.05), tail=DenseTail(hidden=64)
    ),
    workdir=Path("runs/photographs"),
    steps=600,
)
