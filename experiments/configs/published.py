"""The common settings of the published runs of Chen et al. (2019, arXiv 1906.02735), from the authors' `train_img.py`.

The estimator has two exact terms, Poisson(2) further terms and Gaussian probes. Adam has learning rate 1e-3 after 1000
steps of warm-up, b2 0.99, gradients clipped at norm 1, no weight decay and moving average 0.999. Batches have 64
examples. The number of steps is not published; those here are our choice. These runs take days on accelerators.
"""

from pathlib import Path

from experiments.configs.base import DataConfig, DensityConfig, EvaluationConfig, OptimizerConfig
from resflow_jax import ImageFlowConfig, Poisson, Roulette

ESTIMATOR = Roulette(Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian")
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup=1000, schedule="constant", ema_decay=0.999)


def published(data: DataConfig, model: ImageFlowConfig, **settings) -> DensityConfig:
    """A run with the common settings; `settings` override them."""
    common = {
        "workdir": Path("runs") / data.name.replace("/", "_"),
        "steps": 300_000,
        "batch_size": 64,
        "estimator": ESTIMATOR,
        "optimizer": OPTIMIZER,
        "evaluation": EvaluationConfig(every=5000, draws=1),
        "log_every": 100,
    }
    return DensityConfig(data=data, model=model, **(common | settings))
