"""The trained flows that studies measure: those of given work directories, or flows trained when needed."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.configs import CONFIGS
from experiments.configs.base import DensityConfig
from experiments.configs.tiny import tiny
from experiments.runs.launch import run_config
from experiments.runs.saved import has_all_steps, saved_config, saved_flow
from experiments.runs.tasks.images import load
from resflow_jax import ResidualFlow
from resflow_jax.training.parallel import Strategy

NAMES = ("digits", "fashion_mnist")
_CONFIGS = {"digits": "digits_uniform", "fashion_mnist": "fashion_mnist_small"}  # config names of experiments.density


def trained_runs(
    names: Sequence[str], given: dict[str, Path | None], workdir: Path, parallel: Strategy = "jit", small: bool = False
) -> Iterator[DensityConfig]:
    """Yields the config of the finished run of each name, as soon as that run is finished.

    A run without a given directory is made under `workdir`, unless it is finished there; its steps are divided among
    devices by `parallel`, and with `small` it is the run of `--tiny`. A run whose data are not on disk is skipped with
    a printed message.

    Raises:
      ValueError: if a given directory holds no run, one on other data, or one with a variational dequantisation.
    """
    for name in names:
        directory = given.get(name)
        if directory is not None and not (directory / "checkpoints").is_dir():
            raise ValueError(f"{name}: expected the work directory of a run of this data set, got {directory}")
        if directory is None:
            config = tiny(CONFIGS[_CONFIGS[name]]) if small else CONFIGS[_CONFIGS[name]]
            config = dataclasses.replace(config, workdir=workdir / name, parallel=parallel)
        else:
            config = saved_config(directory)
            if not isinstance(config, DensityConfig) or config.data.name != name:
                found = getattr(config.data, "name", config.data)
                raise ValueError(f"{name}: expected a run on these images, got {directory} with one on {found}")
            if config.model.data.dequantization.couplings:
                expected = "expected a run with a uniform dequantisation, as of digits_uniform"
                raise ValueError(f"{name}: {expected}, got {directory}")
        try:
            if directory is None and not has_all_steps(config):
                run_config(config)
            load(config.data)
        except FileNotFoundError as error:
            print(f"{name}: left out, {error}")
            continue
        yield config


def trained_flow(config: DensityConfig) -> ResidualFlow:
    """The flow of a run with its best weights, tightened."""
    return saved_flow(config.workdir).flow
