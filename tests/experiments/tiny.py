"""A run of `experiments.density digits` that takes seconds."""

from dataclasses import replace

from experiments import density
from experiments.configs.base import EvaluationConfig
from resflow_jax import ImageFlowConfig, Roulette

DIGITS = replace(
    density.CONFIGS["digits"],
    model=ImageFlowConfig((8, 8, 1), blocks=(1,), hidden_channels=4, fc_blocks=0, kernels=(3, 3)),
    steps=2,
    batch_size=8,
    evaluation=EvaluationConfig(estimator=Roulette(), draws=1, examples=20, every=2),
)
