"""Fashion-MNIST at 28x28 with 256 levels, small enough for a CPU.

python -m experiments.density fashion_mnist --data.dir DIR
"""

from pathlib import Path

from experiments.configs.base import DataConfig, DensityConfig, EvaluationConfig
from resflow_jax import ImageFlowConfig

CONFIG = DensityConfig(
    data=DataConfig("fashion_mnist"),
    model=ImageFlowConfig(shape=(28, 28, 1), blocks=(2, 2, 2), hidden_channels=64, fc_hidden=64),
    workdir=Path("runs/fashion_mnist"),
    steps=600,
    evaluation=EvaluationConfig(every=100, images=500, draws=1),
)
