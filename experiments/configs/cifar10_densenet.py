"""CIFAR-10 with the invertible DenseNet of Perugachi-Diaz et al. (2021, arXiv 2102.02694), for accelerators.

python -m experiments.density cifar10_densenet --data.dir DIR

Sizes and batch are theirs: 3 scales of 16 blocks, depth 3, growth 172, 24.9 million parameters, batches of 64.
They report 3.25 bits/dim. This run has not been made with this library.
"""

from pathlib import Path

from experiments.configs.base import DataConfig, DensityConfig, EvaluationConfig, OptimizerConfig
from resflow_jax import DenseNetBlocks, ImageFlowConfig, ImageTransform

CONFIG = DensityConfig(
    data=DataConfig("cifar10"),
    model=ImageFlowConfig(
        shape=(32, 32, 3),
        activation="clipswish",
        data=ImageTransform(logit_alpha=0.05),
        densenet=DenseNetBlocks(depth=3, growth=172),
    ),
    workdir=Path("runs/cifar10_densenet"),
    steps=300000,
    batch_size=64,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=1000, b2=0.99, ema_decay=0.999),
    evaluation=EvaluationConfig(every=5000, draws=1),
    log_every=100,
)
