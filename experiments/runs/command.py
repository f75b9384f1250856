"""Command lines whose first argument names one of the configs."""

import sys
from collections.abc import Mapping

import tyro

from experiments.configs import SUMMARIES
from experiments.configs.base import RunConfig
from experiments.configs.tiny import tiny


def named_config(
    arguments: list[str], configs: Mapping[str, RunConfig], *, prog: str, description: str, default: str
) -> RunConfig:
    """The config that the first argument names, with the settings that the others change.

    Args:
      arguments: NAME and the flags after it; without a NAME the default.
      configs: the configs by name.
      prog: the command, as help texts name it.
      description: of the command, for its help text.
      default: a name.
    """
    change = tiny if "--tiny" in arguments else lambda config: config
    arguments = [argument for argument in arguments if argument != "--tiny"]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [default, *arguments]
    if not arguments[0].startswith("-") and arguments[0] not in configs:
        sys.exit(f"NAME: expected one of {', '.join(configs)}; got {arguments[0]!r}")
    named = {name: (SUMMARIES[name], change(config)) for name, config in configs.items()}
    return tyro.extras.overridable_config_cli(named, args=arguments, prog=prog, description=description)
