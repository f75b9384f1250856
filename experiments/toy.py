"""Density estimation in the plane: `experiments.density` on a toy density.

    python -m experiments.toy [NAME] [--estimator exact | roulette | truncated] [--workdir DIR] [--steps N] ...

is the same as `python -m experiments.density NAME [...]`; the default NAME is 8gaussians. The likelihood is in nats:
the natural logarithm of the density of a point. `experiments/configs/toy.py` lists the expected results.
"""

from experiments.configs import CONFIGS, SUMMARIES
from experiments.configs.tiny import tiny
from experiments.runs.command import NamedCommand
from experiments.runs.devices import use_xla_flags
from experiments.runs.launch import launch
from resflow_jax.data.toy import TOY_DENSITIES

COMMAND = NamedCommand(
    "experiments.toy",
    __doc__,
    {name: CONFIGS[name] for name in TOY_DENSITIES},
    tiny,
    renamed={"--data": "the name alone, as in `python -m experiments.toy rings`"},
    first="8gaussians",
    summaries=SUMMARIES,
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(launch, arguments)


if __name__ == "__main__":
    main()
