"""MNIST by class.

python -m experiments.classify mnist --data.dir DIR
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs.base import DataConfig
from experiments.configs.classes import fashion_mnist

CONFIG = replace(fashion_mnist.CONFIG, data=DataConfig("mnist"), workdir=Path("runs/classify_mnist"))
