"""Eight toy densities in the plane.

python -m experiments.density 8gaussians      (2spirals, checkerboard, rings, moons, pinwheel, swissroll, circles)
python -m experiments.toy rings --estimator roulette      (in place of the exact log-det)

6000 steps of 8 ms take about 70 s on two CPU cores. Test log_prob in nats, +- 0.007; in brackets minus the entropy of
the data, the highest possible value:
  8gaussians -2.83 (-2.84)   2spirals -2.55 (-2.55)   checkerboard -3.61 (-3.47)   rings -2.73 (-2.64)
  moons -2.38 (-2.39)        pinwheel -2.33 (-2.32)   swissroll -2.66 (-2.67)      circles -3.26 (-3.27)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from experiments.configs.base import EvaluationConfig, OptimizerConfig, RunConfig, VectorModel
from resflow_jax import Estimator, Exact, VectorFlowConfig
from resflow_jax.data.toy import TOY_DENSITIES
from resflow_jax.functional.checks import check_choice, check_count


@dataclass(frozen=True)
class ToyEvaluationConfig(EvaluationConfig):
    """How the likelihood is measured, and the density on a grid.

    Attributes:
      samples: number of points drawn from the flow, for the picture and the extent of the grid.
      cells: number of grid cells along each side.
    """

    estimator: Estimator = field(default_factory=Exact)
    draws: int = 1
    examples: int = 20000
    every: int = 1000
    samples: int = 20000
    cells: int = 400

    def __post_init__(self):
        super().__post_init__()
        check_count("samples", self.samples, 1)
        check_count("cells", self.cells, 1)


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """One run of `python -m experiments.density` on a toy density.

    Attributes:
      data: name of the density.
      model: the flow.
    """

    data: tyro.conf.Suppress[tyro.conf.Fixed[Literal[TOY_DENSITIES]]]
    model: VectorModel = VectorFlowConfig(
        dim=2, blocks=32, hidden=(32, 32), activation="elu", preactivation="none", coefficient=0.995
    )
    steps: int = 6000
    batch_size: int = 256
    estimator: Estimator = field(default_factory=Exact)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-2, warmup=300, ema_decay=0.99)
    evaluation: ToyEvaluationConfig = ToyEvaluationConfig()
    log_every: int = 50

    def __post_init__(self):
        super().__post_init__()
        check_choice("data", self.data, TOY_DENSITIES)


CONFIGS = {name: ToyConfig(data=name, workdir=Path("runs/toy") / name) for name in TOY_DENSITIES}
