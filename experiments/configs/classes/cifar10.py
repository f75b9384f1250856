"""CIFAR-10 and CIFAR-100 by class, with the settings of Behrmann et al. (2019, arXiv 1811.00995, section 4.1).

python -m experiments.classify cifar10 --data.dir DIR      published: 6.78 % error, without a bound 6.69 %
python -m experiments.classify cifar100 --data.dir DIR     published: 24.58 % error, without a bound 23.97 %
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs.base import DataConfig, EvaluationConfig, OptimizerConfig
from experiments.configs.classification import ClassifyConfig
from resflow_jax import ClassifierConfig

_EPOCH = 45000 // 128  # steps; 5000 images are for validation

CONFIG = ClassifyConfig(
    data=DataConfig("cifar10", flip=True, crop=4),
    model=ClassifierConfig((32, 32, 3), 10),
    workdir=Path("runs/classify_cifar10"),
    steps=200 * _EPOCH,
    batch_size=128,
    optimizer=OptimizerConfig(
        name="sgd",
        learning_rate=0.1,
        warmup=10 * _EPOCH,
        schedule="step",
        milestones=(60 * _EPOCH, 120 * _EPOCH, 160 * _EPOCH),
        decay=0.2,
        weight_decay=5e-4,
        clip=10.0,
        ema_decay=0.999,
    ),
    evaluation=EvaluationConfig(every=2 * _EPOCH, draws=1),
    dropout=0.1,
)
CIFAR100 = replace(
    CONFIG,
    data=replace(CONFIG.data, name="cifar100"),
    model=replace(CONFIG.model, classes=100),
    workdir=Path("runs/classify_cifar100"),
)
