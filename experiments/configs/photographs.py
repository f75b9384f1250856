"""16x16 crops in colour of the two photographs that scikit-learn ships, split by region; no network.

python -m experiments.density photographs

On 2 CPU cores: about 4 minutes. Expected: 3.38 +- 0.08 test bits/dim (the test region is smoother than that of
training, 4.0), colours and rough textures of the photographs in the samples.
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
