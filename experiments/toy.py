"""Density estimation in the plane: `experiments.density` on a toy density, by its name.

    python -m experiments.toy [--data 8gaussians] [--estimator exact | roulette] [--workdir DIR] [--steps N] ...

is `python -m experiments.density 8gaussians [...]`. See `experiments/configs/toy.py` for what to expect.
"""

import argparse
import sys
from dataclasses import replace

from experiments.configs import CONFIGS
from experiments.runs.command import named_config
from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch
from experiments.runs.plane import ESTIMATORS
from resflow_jax.data.toy import TOY_DENSITIES


def main(arguments: list[str] | None = None) -> None:
    """Parses the two settings of its own and hands on the rest."""
    parser = argparse.ArgumentParser(prog="python -m experiments.toy", add_help=False, allow_abbrev=False)
    parser.add_argument("--data", choices=TOY_DENSITIES, default="8gaussians")
    parser.add_argument("--estimator", choices=tuple(ESTIMATORS), default="exact")
    own, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    config = replace(CONFIGS[own.data], estimator=ESTIMATORS[own.estimator])
    use_xla_flags()
    configs = {own.data: config}
    launch(
        named_config(
            [own.data, *rest], configs, prog="python -m experiments.toy", description=__doc__, default=own.data
        )
    )


if __name__ == "__main__":
    main()
