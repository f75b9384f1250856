"""Growth of time and memory of a step with depth, width, batch and image size.

    python -m experiments.studies.scaling [--workdir DIR]
    python -m experiments.studies.scaling --series depth --depths 16 64 256 --side 32 --width 16 [--reversible]

The study starts from one small flow and doubles one setting at a time, repeatedly. An exponent is the slope of a
straight line fitted to the logarithms. With `--reversible` it also prints by how much the gradients differ from those
of flows that store their inputs. Prints the table and writes scaling.json and scaling.png. It takes about 3 minutes on
2 CPU cores.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx

from experiments.runs.command import Command, Output
from experiments.runs.devices import use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.pictures import save_figure
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.competitors import CASES, Case, Ours, make_flow, photograph_crops
from resflow_jax import DenseTail, ImageFlowConfig, make_reversible
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.training.parallel import STRATEGIES, Strategy

BASE = Case(ImageFlowConfig((16, 16, 1), blocks=(4,), hidden_channels=64, preactivation="all", tail=DenseTail(0)), 32)


def varied(name: str, value: int, base: Case | None = None) -> Case:
    """The base case, by default `BASE`, with one setting changed."""
    base = base or BASE
    match name:
        case "depth":
            return replace(base, config=replace(base.config, blocks=(value,)))
        case "width":
            return replace(base, config=replace(base.config, hidden_channels=value))
        case "batch":
            return replace(base, batch_size=value)
        case "side":
            return replace(base, config=replace(base.config, shape=(value, value, 1)))
    raise ValueError(f"name: expected one of {', '.join(SERIES)}; got {name!r}")


SERIES = {"depth": (4, 8, 16, 32), "width": (64, 128, 256, 512), "batch": (32, 64, 128, 256), "side": (16, 32, 64)}


@dataclass(frozen=True)
class ScalingConfig:
    """The settings of the study.

    Attributes:
      steps: number of timed steps for each value; the median is reported.
      series: settings to vary.
      length: number of values of each setting, at least 2.
      depths: numbers of blocks that the series "depth" takes.
      side: height and width of the images of the flow that the study starts from.
      width: its hidden channels.
      batch: its images a step.
      reversible: whether gradients recompute the inputs of blocks, see `rf.make_reversible`.
      workdir: directory that scaling.json and scaling.png are written to.
      parallel: how a step is divided among cores, as in `experiments.density`.
      small: whether to use the flow of `--tiny`.
    """

    steps: int = 7
    series: tuple[str, ...] = tuple(SERIES)
    length: int = 4
    depths: tuple[int, ...] = SERIES["depth"]
    side: int = BASE.config.shape[0]
    width: int = BASE.config.hidden_channels
    batch: int = BASE.batch_size
    reversible: bool = False
    workdir: Path = Path("runs/scaling")
    parallel: Strategy = "jit"
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("parallel", self.parallel, STRATEGIES)
        check_count("steps", self.steps, 1)
        for name in self.series:
            check_choice("series", name, tuple(SERIES))
        check_count("length", self.length, 2)
        for name in ("side", "width", "batch"):
            check_count(name, getattr(self, name), 1)
        for depth in self.depths:
            check_count("depths", depth, 1)
        if len(set(self.depths)) < 2:
            raise ValueError(f"depths: expected two different numbers or more, got {self.depths}")


def tiny(config: ScalingConfig) -> ScalingConfig:
    """Two depths and two batch sizes of a tiny flow."""
    return replace(config, steps=2, series=("depth", "batch"), length=2, workdir=Path("runs/scaling_tiny"), small=True)


COMMAND = Command(
    "experiments.studies.scaling",
    __doc__,
    ScalingConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("scaling.json", "scaling.png")),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    use_all_cores()
    use_compilation_cache()
    COMMAND.call(run, arguments)


def run(config: ScalingConfig) -> dict[str, dict[str, list[float]]]:
    """Measures, prints and draws; returns values, seconds, bytes and the exponents of both, by setting."""
    config.workdir.mkdir(parents=True, exist_ok=True)
    result, base = {}, CASES["tiny"] if config.small else _base(config)
    print(f"{'':8}{'value':>8}{'ms a step':>12}{'MB a device':>14}")
    for name in config.series:
        values = (config.depths if name == "depth" else SERIES[name])[: config.length]
        options = config.steps, config.parallel, config.reversible
        found = [measure(varied(name, value, base), *options) for value in values]
        for value, (seconds, size) in zip(values, found, strict=True):
            print(f"{name:8}{value:8}{1e3 * seconds:12.1f}{size / 1e6:14.2f}", flush=True)
        seconds, sizes = (list(column) for column in zip(*found, strict=True))
        exponents = {"time_exponent": exponent(values, seconds), "memory_exponent": exponent(values, sizes)}
        print(
            f"{name}: time ~ value^{exponents['time_exponent']:.2f}, memory ~ value^{exponents['memory_exponent']:.2f}"
        )
        result[name] = {"values": list(values), "seconds": seconds, "bytes": sizes, **exponents}
        if config.reversible:
            errors = [gradient_error(varied(name, value, base)) for value in values]
            print(f"{name}: relative error of the gradient {', '.join(f'{error:.1e}' for error in errors)}")
            result[name]["gradient_errors"] = errors
    write_atomically(config.workdir / "scaling.json", json.dumps(result, indent=2) + "\n")
    _save_scaling(config.workdir / "scaling.png", result)
    return result


def _base(config: ScalingConfig) -> Case:
    """The case that the study starts from."""
    base = varied("width", config.width, varied("side", config.side))
    return varied("batch", config.batch, base)


def measure(case: Case, steps: int, strategy: Strategy = "jit", reversible: bool = False) -> tuple[float, float]:
    """Median seconds of a training step, and its temporary memory in bytes per device."""
    ours = Ours(case, strategy)
    if reversible:
        make_reversible(ours.flow)
    ours.train()
    seconds = float(np.median([ours.train()["seconds"] for _ in range(steps)]))
    return seconds, float(ours.step.memory_analysis().temp_size_in_bytes)


def gradient_error(case: Case) -> float:
    """|a - b| / |b| of the gradients of a batch's mean log p in all parameters: a of the reversible flow, b without."""
    images = photograph_crops(case.config.shape, case.batch_size)
    x, key = jnp.asarray((images + 0.5) / 256, jnp.float32), jax.random.key(0)
    flow = make_flow(case, images)

    def gradient() -> np.ndarray:
        graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
        loss = lambda params: nnx.merge(graphdef, params, rest).log_prob(x, key=key).mean()  # noqa: E731
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])

    kept = gradient()
    make_reversible(flow)
    return float(np.linalg.norm(gradient() - kept) / np.linalg.norm(kept))


def exponent(values: Sequence[float], measured: Sequence[float]) -> float:
    """The slope of log measured against log values."""
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])


def _save_scaling(path: Path, result: dict[str, dict[str, Any]]) -> None:
    """Draws time and memory of a training step against each setting on logarithmic axes, with fitted exponents."""
    figure, axes = plt.subplots(2, len(result), figsize=(3.2 * len(result), 5.2), squeeze=False, layout="constrained")
    for column, (name, found) in enumerate(result.items()):
        rows = (("seconds", 1e3, "ms a step", "time"), ("bytes", 1e-6, "MB a device", "memory"))
        for row, (key, scale, unit, kind) in enumerate(rows):
            ax, values = axes[row, column], np.asarray(found["values"], float)
            measured, exponent = scale * np.asarray(found[key]), found[f"{kind}_exponent"]
            line = np.exp(np.mean(np.log(measured)) + exponent * (np.log(values) - np.mean(np.log(values))))
            ax.loglog(values, measured, "o", color="C0")
            ax.loglog(values, line, "-", color="C1", label=f"{name}$^{{{exponent:.2f}}}$")
            ax.set(xlabel=name, ylabel=unit if column == 0 else None, title=kind if column == 0 else None)
            ax.set_xticks(values, [f"{value:g}" for value in values])
            ax.set_yticks(measured, [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in measured])
            ax.minorticks_off()
            ax.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
