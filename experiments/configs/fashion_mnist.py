"""Fashion-MNIST at 28x28 with 256 levels, of a size for a CPU.

python -m experiments.density fashion_mnist --data.dir DIR

About 35 minutes on 2 CPU cores.
"""

from pathlib import Path

from experiments.configs.base import DataConfig, DensityConfig, EvaluationConfig, OptimizerConfig
from resflow_jax import ImageFlowConfig

CONFIG = DensityConfig(
    data=DataConfig("fashion_mnist"),
    model=ImageFlowConfig(shape=(28, 28, 1), blocks=(4, 4, 4), hidden_channels=64, fc_hidden=64),
    workdir=Path("runs/fashion_mnist"),
    steps=5000,
    optimizer=OptimizerConfig(learning_rate=8e-3, ema_decay=0.998),
    evaluation=EvaluationConfig(every=500, draws=3),
)
