"""The ablation of unbiasedness and LipSwish of Chen et al. (2019, arXiv 1906.02735).

    python -m experiments.studies.ablation [digits | mnist | cifar10] [--seeds 0 1 2] [--workdir DIR] ...

trains three flows with each seed: an i-ResNet (ELU, five terms of the power series), a residual flow with ELU, and one
with LipSwish. Each is trained by `experiments.density` under DIR/NAME/SEED; DIR is runs/ablation by default. Finished
runs are only evaluated again, and interrupted runs are resumed. All are evaluated by the same unbiased estimator on the
same images. The study prints the mean and standard deviation over seeds of the test bits/dim, and writes them to
DIR/ablation.json with the figures of every run.

On digits and 2 CPU cores a run takes about a minute; the first run of each variant takes two. Expected:
1.910 +- 0.004, 1.868 +- 0.007, 1.856 +- 0.001.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments.configs import CONFIGS, SUMMARIES
from experiments.configs.base import DensityConfig
from experiments.configs.tiny import tiny as tiny_run
from experiments.runs.command import NamedCommand, Output
from experiments.runs.devices import cores_for, use_all_cores, use_xla_flags
from experiments.runs.launch import run_config
from experiments.runs.workdir import write_atomically
from resflow_jax.functional.checks import check_choice
from resflow_jax.io.config_json import as_json
from resflow_jax.training.parallel import STRATEGIES, Strategy

DATASETS = ("digits", "mnist", "cifar10")
VARIANTS = {
    "i-ResNet, ELU": "_truncated_elu",
    "Residual flow, ELU": "_elu",
    "Residual flow, LipSwish": "",
}


def config_name(dataset: str, variant: str) -> str:
    """The name of the config of a variant in `experiments.density`."""
    suffix = VARIANTS[variant] or ("_uniform" if dataset == "digits" else "")
    return f"{dataset}{suffix}"


@dataclass(frozen=True)
class AblationConfig:
    """One run of `python -m experiments.studies.ablation`.

    Attributes:
      dataset: name of the images.
      seeds: random seeds; each variant is trained once with each.
      workdir: directory that everything is written to.
      data_dir: directory of TensorFlow data sets, as `--data.dir` of `experiments.density`.
      steps: number of steps of every run; by default that of the config of the data.
      parallel: how a step is divided among devices, as in `experiments.density`.
      small: whether to use the small runs of `--tiny`.
    """

    dataset: tyro.conf.Suppress[tyro.conf.Fixed[Literal[DATASETS]]] = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    workdir: Path = Path("runs/ablation")
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
    steps: int | None = None
    parallel: Strategy = "jit"
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("parallel", self.parallel, STRATEGIES)
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ValueError(f"seeds: expected two or more different numbers, got {self.seeds}")


def tiny(config: AblationConfig) -> AblationConfig:
    """Two updates of each tiny flow, with two seeds."""
    return replace(config, seeds=(0, 1), workdir=Path("runs/ablation_tiny"), small=True)


def output(config: AblationConfig) -> Output:
    """The table, and a directory for each flow."""
    names = (config_name(config.dataset, variant) for variant in VARIANTS)
    return Output(config.workdir, ("ablation.json", *(f"{name}/" for name in names)))


COMMAND = NamedCommand(
    "experiments.studies.ablation",
    __doc__,
    {name: AblationConfig(name) for name in DATASETS},
    tiny,
    output,
    renamed={
        "--data": "the name alone, as in `python -m experiments.studies.ablation mnist`",
        "--data-dir": "--data.dir DIR",
    },
    first="digits",
    summaries=SUMMARIES,
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(start, arguments)


def start(config: AblationConfig) -> None:
    """Runs on as many devices as can take equal shares of a batch."""
    use_all_cores(cores_for(settings(config, config.dataset, 0).batch_size))
    run(config)


def run(config: AblationConfig) -> dict[str, Any]:
    """Trains the missing runs, prints and writes the table, and returns it."""
    table = {}
    for title in VARIANTS:
        name = config_name(config.dataset, title)
        estimates = [run_config(settings(config, name, seed)) for seed in config.seeds]
        means = [estimate.mean for estimate in estimates]
        table[title] = {
            "config": name,
            "mean": float(np.mean(means)),
            "deviation": float(np.std(means, ddof=1)),
            "runs": {str(seed): estimate._asdict() for seed, estimate in zip(config.seeds, estimates, strict=True)},
        }
    write_atomically(config.workdir / "ablation.json", json.dumps(as_json(table), indent=2) + "\n")
    print(f"\n{'bits/dim of ' + config.dataset:<28}mean and deviation over seeds {', '.join(map(str, config.seeds))}")
    for title, row in table.items():
        means = ", ".join(f"{estimate['mean']:.4f}" for estimate in row["runs"].values())
        print(f"{title:<28}{row['mean']:.4f} +- {row['deviation']:.4f}   ({means})")
    return table


def settings(config: AblationConfig, name: str, seed: int) -> DensityConfig:
    """The settings of one run: a config of `experiments.density` with another seed and other directories."""
    base = tiny_run(CONFIGS[name]) if config.small else CONFIGS[name]
    return replace(
        base,
        data=replace(base.data, dir=config.data_dir),
        seed=seed,
        steps=config.steps or base.steps,
        parallel=config.parallel,
        workdir=config.workdir / name / str(seed),
    )


if __name__ == "__main__":
    main()
