"""What residual blocks cannot learn: a staircase on the line whose steps are steep.

    python -m experiments.studies.steep [--workdir DIR] [--steps N] [--steepness S] [--coefficient C] ...

Fits an increasing staircase y = t(x) on [-2, 2], with slopes 1/S and S in turn, by least squares with four flows of the
same contractions g of Lipschitz constant below L. Each has two of them:

  residual          two blocks x + g(x): slopes of at most (1 + L)^2 < 4
  residual, scaled  the same with an affine layer before, between and after them: (1 + L)^2 times any scale
  implicit          one block y + g_y(y) = x + g_x(x): slopes of at most (1 + L) / (1 - L)
  monotone          two blocks of Ahn et al. (2022, arXiv 2210.08176): at most ((1 + L) / (1 - L))^2

The bound on the slope of residual blocks is independent of training, width and activation: S = 20 is out of their
reach unless a scale stretches all of the line, flat parts too, which g must then undo. It follows the experiment of Ahn
et al. in one dimension. The other two blocks have no scale. g has one hidden layer, with a sort as activation: its
slopes reach L in both directions.

On 2 CPU cores: a minute and a half. It prints the root mean square error (0.13, 0.12, 0.13, 0.03), the largest slope
that was learned (3.0, 3.4, 6.4, 27) and the bound on it. Under the work directory (runs/steep) it writes steep.png,
steep.json and config.json. Running the command again starts from the beginning.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache
from experiments.runs.lock import locked
from experiments.runs.pictures import save_figure
from experiments.runs.workdir import claim_workdir, write_atomically
from resflow_jax import Affine, Chain, Flow, ImplicitBlock, LipschitzMLP, MonotoneBlock, ResidualBlock, certify
from resflow_jax.functional.checks import check_count, check_open_interval
from resflow_jax.training.step import optax_promotion

Array = jax.Array
KINDS = ("residual", "residual, scaled", "implicit", "monotone")


@dataclass(frozen=True)
class SteepConfig:
    """The staircase, the flows and their training.

    Attributes:
      workdir: directory that everything is written to.
      steps: number of optimiser steps of each flow.
      points: number of points of the line in each step, the same in all.
      steepness: S, the slope of the steep parts; the flat ones have 1/S.
      width: width of the hidden layer of g.
      coefficient: bound on the norm of each layer of g.
      learning_rate: learning rate of Adam; it falls to zero along a cosine.
      seed: random seed of the parameters.
    """

    workdir: Path = Path("runs/steep")
    steps: int = 2500
    points: int = 300
    steepness: float = 20.0
    width: int = 32
    coefficient: float = 0.99
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "width"):
            check_count(name, getattr(self, name), 1)
        check_count("points", self.points, 2)
        if not self.steepness > 1:
            raise ValueError(f"steepness: expected a number above 1, got {self.steepness}")
        check_open_interval("coefficient", self.coefficient, 0, 1)


class Outcome(NamedTuple):
    """The result of one flow.

    Attributes:
      error: root mean square of y - t(x).
      slope: the largest slope between neighbours of a fine grid.
      bound: certified bound on the slope.
      seconds: training time, compilation included.
      values: y on the fine grid, [N].
    """

    error: float
    slope: float
    bound: float
    seconds: float
    values: np.ndarray


def tiny(config: SteepConfig) -> SteepConfig:
    """Two steps of tiny flows."""
    return replace(config, workdir=Path("runs/steep_tiny"), steps=2, points=20, width=4)


COMMAND = Command(
    "experiments.studies.steep",
    __doc__,
    SteepConfig(),
    tiny,
    output=lambda config: Output(config.workdir, ("steep.png", "steep.json", "config.json")),
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: SteepConfig) -> dict[str, Outcome]:
    """Fits every flow, draws, and prints the table."""
    use_compilation_cache()
    with locked(config.workdir):
        claim_workdir(config.workdir, config)
        outcomes = {kind: fit(config, kind) for kind in KINDS}
        report(config, outcomes)
    return outcomes


def staircase(x: Array, steepness: float) -> Array:
    """t(x): one step in each unit interval, with slope 1/S and then S; t(n) = n for integers n."""
    floor = jnp.floor(x)
    part = x - floor
    return floor + jnp.maximum(part / steepness, 1 - steepness * (1 - part))


def flow_of(config: SteepConfig, kind: str) -> Flow:
    """A flow on the line with two contractions."""
    rngs = nnx.Rngs(config.seed)
    options = {"activation": "fullsort", "coefficient": config.coefficient, "rngs": rngs}
    g = partial(LipschitzMLP, 1, (config.width,), **options)
    scale = partial(Affine, (1,))
    layers = {
        "residual": lambda: [ResidualBlock(g()), ResidualBlock(g())],
        "residual, scaled": lambda: [scale(), ResidualBlock(g()), scale(), ResidualBlock(g()), scale()],
        "implicit": lambda: [ImplicitBlock(g(), g())],
        "monotone": lambda: [MonotoneBlock(g()), MonotoneBlock(g())],
    }[kind]()
    return Flow(Chain(layers), event_shape=(1,))


def fit(config: SteepConfig, kind: str) -> Outcome:
    """Trains one flow on all points by the mean square error."""
    began = time.perf_counter()
    graphdef, params, others = nnx.split(flow_of(config, kind), nnx.Param, ...)
    x = jnp.linspace(-2, 2, config.points)[:, None]
    y = staircase(x, config.steepness)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

    def loss(params, others):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params, others).bijector(x) - y))

    def step(carry, _):
        params, others, state = carry
        gradient = jax.grad(loss)(params, others)
        with optax_promotion():
            updates, state = optimizer.update(gradient, state, params)
        flow = nnx.merge(graphdef, optax.apply_updates(params, updates), others)
        flow.update_norms()
        return (*nnx.split(flow, nnx.Param, ...)[1:], state), None

    @jax.jit
    def train(params, others):
        return jax.lax.scan(step, (params, others, optimizer.init(params)), length=config.steps)[0][:2]

    flow = nnx.merge(graphdef, *train(params, others))
    flow.converge_norms()
    flow.tighten()
    fine = jnp.asarray(grid(config))
    values = np.asarray(flow.bijector(fine[:, None])[:, 0], np.float64)
    error = float(np.sqrt(np.mean(np.square(values - np.asarray(staircase(fine, config.steepness))))))
    if not np.isfinite(error):
        raise FloatingPointError(f"the values of the {kind} flow are not finite after {config.steps} steps")
    slope = float(np.max(np.diff(values) / np.diff(np.asarray(fine, np.float64))))
    return Outcome(error, slope, certify(flow).lipschitz, time.perf_counter() - began, values)


def grid(config: SteepConfig) -> np.ndarray:
    """A fine grid on [-2, 2]."""
    return np.linspace(-2, 2, 4 * config.points + 1)


def report(config: SteepConfig, outcomes: dict[str, Outcome]) -> None:
    """Draws the picture, and writes and prints the numbers."""
    x = grid(config)
    target = np.asarray(staircase(x, config.steepness))
    curves = {
        f"{kind}\nerror {found.error:.3f}, slope {found.slope:.3g} <= {found.bound:.3g}": found.values
        for kind, found in outcomes.items()
    }
    _save_fits(config.workdir / "steep.png", x, target, curves)
    numbers = {kind: {n: v for n, v in o._asdict().items() if n != "values"} for kind, o in outcomes.items()}
    write_atomically(config.workdir / "steep.json", json.dumps(numbers, indent=1) + "\n")
    rows: dict[str, Callable[[Outcome], str]] = {
        "rms error": lambda o: f"{o.error:.4f}",
        "largest slope": lambda o: f"{o.slope:.2f}",
        "bound on it": lambda o: f"{o.bound:.3g}",
        "time": lambda o: f"{o.seconds:.0f} s",
    }
    print(f"{'':<18}" + "".join(f"{kind:<18}" for kind in outcomes))
    for name, text in rows.items():
        print(f"{name:<18}" + "".join(f"{text(outcome):<18}" for outcome in outcomes.values()))


def _save_fits(path: Path, x: np.ndarray, target: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    """Draws each curve [N] over x [N] in a panel of its own, on the dashed target."""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3.4), sharey=True, layout="constrained")
    for axis, (title, values) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        axis.plot(x, target, "k--", linewidth=1, label="target")
        axis.plot(x, values, linewidth=1.5, label="learned")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("x")
    np.atleast_1d(axes)[0].legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
