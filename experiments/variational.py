"""Variational inference in the plane: fits a flow to an unnormalised density.

    python -m experiments.variational [--target ring | wave | banana] [--estimator roulette] [--steps N] ...

    min over the flow of KL(flow || target) = E_x~flow[log p(x) - log q(x)] + log Z,   q = target up to Z

A sample is x = f^-1(z), so the gradient is taken through the inverse, by the implicit function theorem, and
through the log-det at the sample. Training uses no samples of the target. The weight of log q in the gradient rises
from 0.01 to 1 over the first steps (Rezende & Mohamed 2015, arXiv 1505.05770, section 6.1), since a flow that minimises
this divergence may cover one of several modes and stay there. What is shown and logged has weight 1. `--help` lists
every setting.
Under the work directory (runs/variational/NAME) it writes variational.png (target, learned density, samples),
metrics.jsonl and config.json. Running the command again starts from the beginning.

It takes about two minutes on 2 CPU cores, 39 ms per step, and reaches KL 0.014 +- 0.001 nats for ring.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.runs import pictures
from experiments.runs.command import Command, Output
from experiments.runs.devices import use_compilation_cache
from experiments.runs.lock import locked
from experiments.runs.metrics_file import MetricsFile
from experiments.runs.plane import PlaneConfig, train_flow
from experiments.runs.tables import certificate_rows, print_table
from experiments.runs.workdir import claim_workdir
from resflow_jax import Anderson, Diagnostics, Estimator, Exact, ResidualFlow, certify
from resflow_jax.data.potentials import POTENTIAL_BOX, POTENTIALS, log_density
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.plot import density_on_grid, grid_midpoints
from resflow_jax.training.losses import update_running_statistics, with_order_gradient

Array = jax.Array

# The eager calls of the report raise an error if a solve fails. The compiled step cannot raise: it reads the status,
# and a derivative whose solve failed is NaN.
SOLVER = Anderson(on_failure="raise")


@dataclass(frozen=True)
class VariationalConfig(PlaneConfig):
    """One run of `python -m experiments.variational`, under runs/variational/NAME by default.

    Attributes:
      target: name of the unnormalised density.
      annealing: number of steps over which the weight of log q in the gradient rises to 1.
      samples: number of samples drawn for the evaluation.
      cells: number of grid cells along each side, for the target's normaliser and the picture.
    """

    target: Literal[POTENTIALS] = "ring"
    annealing: int = 1000
    samples: int = 20000
    cells: int = 800

    def __post_init__(self):
        super().__post_init__()
        check_choice("target", self.target, POTENTIALS)
        check_count("annealing", self.annealing, 0)
        check_count("samples", self.samples, 2)
        check_count("cells", self.cells, 1)

    @property
    def out(self) -> Path:
        """The directory that is written to."""
        return self.workdir or Path("runs/variational") / self.target


@dataclass(frozen=True)
class Divergence:
    """How far the flow is from its target.

    Attributes:
      kl: KL(flow || target) in nats, from samples of the flow and the target's normaliser on a grid.
      stderr: standard error of `kl`.
      log_normalizer: log Z of the target from the grid.
      estimated_log_normalizer: the same from importance weights of the flow's samples alone.
      sample_efficiency: effective sample size of these weights over the number of samples, in (0, 1].
    """

    kl: float
    stderr: float
    log_normalizer: float
    estimated_log_normalizer: float
    sample_efficiency: float


def tiny(config: VariationalConfig) -> VariationalConfig:
    """Four steps of a tiny flow."""
    return dataclasses.replace(
        config,
        workdir=Path("runs/variational_tiny"),
        steps=4,
        batch_size=32,
        annealing=2,
        log_every=2,
        samples=200,
        cells=40,
        model=dataclasses.replace(config.model, blocks=2, hidden=(8,)),
    )


COMMAND = Command(
    "experiments.variational",
    __doc__,
    VariationalConfig(),
    tiny,
    output=lambda config: Output(config.out, ("variational.png", "metrics.jsonl", "config.json")),
    renamed={"--data": "--target NAME"},
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    COMMAND.call(run, arguments)


def run(config: VariationalConfig) -> Divergence:
    """Trains, evaluates and draws."""
    began = time.perf_counter()
    use_compilation_cache()
    config = dataclasses.replace(config, workdir=config.out)
    with locked(config.workdir):
        claim_workdir(config.workdir, config)
        metrics = MetricsFile(config.workdir / "metrics.jsonl", keep_until=0)
        flow, step_time = train(config, metrics)
        return report(config, flow, metrics, step_time, began)


def train(config: VariationalConfig, metrics: MetricsFile) -> tuple[ResidualFlow, float]:
    """Runs all steps. Returns the flow with the averaged parameters, and the median seconds per step."""

    def loss(flow: ResidualFlow, z: Array, key: Array, estimator: Estimator, step: Array) -> tuple[Array, Diagnostics]:
        x, log_prob, diagnostics, status = flow.inverse_and_log_prob(
            z, key=key, estimator=estimator, solver=SOLVER, return_diagnostics=True, return_status=True
        )
        weight = jnp.minimum(1.0, 0.01 + step / max(config.annealing, 1))
        log_q = log_density(config.target, x)
        without = (1 - weight) * log_q  # its gradient is left out, its value is not
        values = log_prob - log_q + (without - jax.lax.stop_gradient(without))
        # A wrong sample would give a wrong gradient; with a NaN loss the update is left out, which metrics.jsonl says.
        values = jnp.where(status.converged.all(axis=0), values, jnp.nan)
        update_running_statistics(flow, x)
        return with_order_gradient(jnp.mean(values), flow), diagnostics

    def latents_at(step: int) -> np.ndarray:
        shape = config.batch_size, config.model.dim
        return np.random.default_rng((config.seed, step)).normal(size=shape).astype(np.float32)

    def as_line(loss: float) -> dict[str, float]:
        return {"kl_minus_log_normalizer": loss}

    flow = ResidualFlow(config.model, rngs=nnx.Rngs(config.seed))
    try:
        return train_flow(config, flow, loss, latents_at, metrics, unit="nats (KL - log Z)", as_line=as_line)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error} The loss is also nan if a solve of the inverse did not converge, and the gradient if a solve of "
            "its derivative did not."
        ) from error


def report(
    config: VariationalConfig, flow: ResidualFlow, metrics: MetricsFile, step_time: float, began: float
) -> Divergence:
    """Tightens and certifies the flow, compares it with its target, draws the picture, prints the closing table."""
    flow.tighten()
    certificate = certify(flow)
    x, log_prob = flow.sample_and_log_prob(
        jax.random.key(config.seed + 1), config.samples, estimator=Exact(), solver=SOLVER
    )
    target, log_normalizer = target_on_grid(config.target, config.cells)
    result = divergence(np.asarray(log_prob), np.asarray(log_density(config.target, x)), log_normalizer)
    skipped = sum(line["split"] == "skipped" for line in metrics.lines)
    metrics.write(step=config.steps, split="test", **dataclasses.asdict(result))

    low, high = (np.full(2, bound) for bound in POTENTIAL_BOX)
    pictures.save_densities(
        config.workdir / "variational.png",
        draw_from_grid(target, low, high, 200000, np.random.default_rng(config.seed)),
        density_on_grid(flow, low, high, config.cells, 4000),
        (low, high),
        np.asarray(x),
        {
            "data": f"target: {config.target} (samples from a grid)",
            "density": f"learned density, KL {result.kl:.4f} nats",
            "samples": "samples of the flow",
        },
    )
    print_table(
        {
            "KL(flow || target)": f"{result.kl:.4f} +- {result.stderr:.4f} nats ({config.samples} samples)",
            "log normaliser": f"{result.estimated_log_normalizer:.4f} by importance sampling, "
            f"{log_normalizer:.4f} by a grid",
            "sample efficiency": f"{result.sample_efficiency:.3f} of the importance weights",
            **certificate_rows(certificate),
            **({"not finite": f"{skipped} updates skipped"} if skipped else {}),
            "time per step": f"{step_time * 1e3:.0f} ms, batches of {config.batch_size}, "
            f"{type(config.estimator).__name__} log-det",
            "time in all": f"{time.perf_counter() - began:.0f} s, set-up and compilation included",
        }
    )
    return result


def divergence(log_prob: np.ndarray, log_target: np.ndarray, log_normalizer: float) -> Divergence:
    """Compares a density with an unnormalised target from its log-densities at samples of the former, [N] each."""
    log_weights = (log_target - log_prob).astype(np.float64)
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    return Divergence(
        kl=float(log_normalizer - log_weights.mean()),
        stderr=float(log_weights.std(ddof=1) / np.sqrt(len(log_weights))),
        log_normalizer=log_normalizer,
        estimated_log_normalizer=float(top + np.log(weights.mean())),
        sample_efficiency=float(weights.sum() ** 2 / np.sum(weights**2) / len(weights)),
    )


def target_on_grid(name: str, cells: int) -> tuple[np.ndarray, float]:
    """The normalised target at the midpoints of cells x cells cells of `POTENTIAL_BOX`, [y, x], and log Z."""
    low, high = POTENTIAL_BOX
    grid = jnp.asarray(grid_midpoints(low, high, cells), float)
    values = np.exp(np.asarray(log_density(name, grid), np.float64)).reshape(cells, cells)
    normalizer = values.sum() * ((high - low) / cells) ** 2
    return values / normalizer, float(np.log(normalizer))


def draw_from_grid(
    density: np.ndarray, low: np.ndarray, high: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Points [number, 2] from a density [y, x] constant on the equal cells of a box."""
    cells = rng.choice(density.size, number, p=density.ravel() / density.sum())
    corners = np.stack([cells % density.shape[1], cells // density.shape[1]], axis=1)
    return low + (high - low) * (corners + rng.random((number, 2))) / density.shape[::-1]


if __name__ == "__main__":
    main()
