"""Your own images by class: a folder with one subfolder a class, .npz with labels, or IDX files.

python -m experiments.classify images --data.path FOLDER
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs.base import DataConfig
from experiments.configs.classes import fashion_mnist

CONFIG = replace(fashion_mnist.CONFIG, data=DataConfig("images"), workdir=Path("runs/classify_images"))
