"""Compares the solvers of f^-1 at equal error, by evaluations of g and time.

    python -m experiments.studies.inverse [--workdir DIR] [--targets digits fashion_mnist] [--samples N] [--peer] ...

Missing flows are trained first, under the work directory; all are tightened and certified. For every solver the study
finds the loosest tolerance at which the samples x = f^-1(z) have max |x - f^-1(f(x))| at most 1e-5 in float32, and
counts the evaluations of g at that tolerance, block by block. Times are medians of alternating runs. They are measured
for samples alone, for samples with their log-density by the default estimator, and with a series as long as that of
normflows; batches are computed in parts on all devices (see `experiments.runs.parts`). `--peer` also times the same
flow with the same weights in normflows (`pip install -e '.[bench]'`), with PyTorch's number of threads, and Anderson
acceleration with the loosest tolerance whose error is at most that of normflows; the lengths of both series differ by
run. "noise" is the standard deviation of the estimates of log p.

Writes NAME_errors.png (error against iterations), NAME_reconstructions.png (after 1, 2, 4, ... iterations) and
inverse.json, and prints tables. It takes about 10 minutes on 2 CPU cores, and 15 more to train the flows. Every
tolerance compiles its own program: if the system limits memory maps, run one target at a time.
"""

import json
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx

from experiments.runs.command import Command, Output
from experiments.runs.devices import cores_for, use_all_cores, use_compilation_cache
from experiments.runs.parts import PART, number_of_parts, over_parts
from experiments.runs.pictures import save_figure, save_images
from experiments.runs.tables import certificate_rows, print_table
from experiments.runs.tasks.images import load
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.trained import NAMES, trained_flow, trained_runs
from resflow_jax import (
    Anderson,
    Broyden,
    Certificate,
    Estimator,
    FixedPoint,
    Geometric,
    InverseStatus,
    ResidualFlow,
    Roulette,
    Solver,
    certify,
)
from resflow_jax.data.images import to_unit_interval
from resflow_jax.functional.checks import check_choice, check_count, check_positive
from resflow_jax.training.parallel import STRATEGIES, Strategy

Array = jax.Array

# The estimator of normflows in evaluation: 20 terms of the power series, then a geometric number of further terms.
LONG_SERIES = Roulette(Geometric(0.5), exact_terms=20, minres_steps=0, probe="gaussian")
SOLVERS: dict[str, Solver] = {"fixed point": FixedPoint(), "Anderson": Anderson(), "Broyden": Broyden()}
PLAIN, BEST = "fixed point", "Anderson"
AS_PEER = f"{BEST}, error of normflows"
TOLERANCES = tuple(10.0 ** (-n / 4) for n in range(8, 29))  # from loose to tight
DRAWN_ITERATIONS = (1, 2, 4)
PLOTTED_ITERATIONS = (1, 2, 4, 6, 9, 13, 18, 24, 32)
DRAWS = 8  # estimates of log p that measure its noise
HARD = 0.9  # blocks with a larger certified constant count as hard


@dataclass(frozen=True)
class InverseConfig:
    """One run of `python -m experiments.studies.inverse`.

    Attributes:
      workdir: directory that everything is written to.
      targets: names of the flows.
      samples: number of samples drawn from each flow.
      error: largest max |x - f^-1(f(x))| that every solver has to reach.
      part: maximum number of array elements of the samples that one device draws at a time. The default fits the
        caches of a CPU core; for an accelerator set it to all elements.
      repeats: number of timed runs of each competitor.
      peer: whether to time normflows as well.
      digits: work directory of a run of `experiments.density digits_uniform`; by default it is trained under `workdir`.
      fashion_mnist: the same for fashion_mnist; it is left out if it is not given and its data are not found.
      seed: random seed of the samples.
      parallel: how training steps are divided among devices, as in `experiments.density`.
      small: whether to use the flows of `--tiny` and a single tolerance.
    """

    workdir: Path = Path("runs/inverse")
    targets: tuple[str, ...] = NAMES
    samples: int = 64
    error: float = 1e-5
    part: int = PART
    repeats: int = 5
    peer: bool = False
    digits: Path | None = None
    fashion_mnist: Path | None = None
    seed: int = 0
    parallel: Strategy = "jit"
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("parallel", self.parallel, STRATEGIES)
        for target in self.targets:
            check_choice("targets", target, NAMES)
        check_count("samples", self.samples, 1)
        check_positive("error", self.error)
        check_count("part", self.part, 1)
        check_count("repeats", self.repeats, 1)
        check_count("seed", self.seed, 0)


def tiny(config: InverseConfig) -> InverseConfig:
    """Four samples of a tiny flow of the digits, at one tolerance."""
    return replace(config, workdir=Path("runs/inverse_tiny"), targets=("digits",), samples=4, repeats=1, small=True)


def output(config: InverseConfig) -> Output:
    """The table, two pictures of each flow, and the runs."""
    of_flows = (f"{name}{end}" for name in config.targets for end in ("_errors.png", "_reconstructions.png", "/"))
    return Output(config.workdir, ("inverse.json", *of_flows))


COMMAND = Command("experiments.studies.inverse", __doc__, InverseConfig(), tiny, output)


class Cost(NamedTuple):
    """The cost of a solver for the samples of a flow.

    Attributes:
      tolerance: the loosest tolerance that reaches the required error, or the tightest one tried.
      error: max |x - f^-1(f(x))| of the samples.
      mean: evaluations of g in every block, mean over the samples, [blocks].
      largest: evaluations of g in every block, maximum over the samples, which the batch waits for, [blocks].
      bound: largest certified error bound of the solve of one block.
    """

    tolerance: float
    error: float
    mean: np.ndarray
    largest: np.ndarray
    bound: float


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_all_cores(cores_for(64))  # the batch size that flows are trained with
    COMMAND.call(run, arguments)


def run(config: InverseConfig) -> dict[str, Any]:
    """Measures and draws every flow; returns the content of inverse.json."""
    use_compilation_cache()
    config.workdir.mkdir(parents=True, exist_ok=True)
    results, tolerances = {}, TOLERANCES[-1:] if config.small else TOLERANCES
    given = {name: getattr(config, name) for name in NAMES}
    for run_config in trained_runs(config.targets, given, config.workdir, config.parallel, config.small):
        name, data = run_config.data.name, load(run_config.data)
        flow = trained_flow(run_config)
        certificate = certify(flow)
        images = to_unit_interval(data.test[: config.samples], data.levels)
        z = jax.random.normal(jax.random.key(config.seed), (config.samples, flow.dim), flow.dtype)

        costs = {
            solver: equal_error_cost(flow, certificate, z, config.error, SOLVERS[solver], tolerances)
            for solver in SOLVERS
        }
        solvers = {solver: replace(SOLVERS[solver], tolerance=cost.tolerance) for solver, cost in costs.items()}
        exact = {solver: {"error": cost.error, "tolerance": cost.tolerance} for solver, cost in costs.items()}
        peer = None
        if config.peer:
            from experiments.studies.parts.peers import normflows_from

            peer = normflows_from(flow)
            exact["normflows"] = {"error": peer_error(peer, z)}
            cost = equal_error_cost(flow, certificate, z, exact["normflows"]["error"], SOLVERS[BEST], tolerances)
            solvers[AS_PEER] = replace(SOLVERS[BEST], tolerance=cost.tolerance)
            exact[AS_PEER] = {"error": cost.error, "tolerance": cost.tolerance}
        times = time_sampling(flow, z, solvers, peer, config)
        times = {name: row | exact[name] for name, row in times.items()}
        exactness = round_trips(flow, z, images)
        results[name] = report(name, certificate, costs, times, exactness)
        write_atomically(config.workdir / "inverse.json", json.dumps(results, indent=2) + "\n")
        draw(config.workdir, name, flow, images)
    return results


def equal_error_cost(
    flow: ResidualFlow, certificate: Certificate, z: Array, error: float, solver: Solver, tolerances: Sequence[float]
) -> Cost:
    """The evaluations of g at the loosest tolerance whose samples have a reconstruction error of at most `error`.

    The tolerances are sorted from loose to tight and searched by bisection. If none reaches the error, the tightest is
    used.
    """

    @lru_cache
    def solve(n: int) -> tuple[float, InverseStatus]:
        at = replace(solver, tolerance=tolerances[n])
        x, status = flow.inverse(z, solver=at, return_status=True)
        return reconstruction_error(flow, x, at), status

    chosen = bisect_left(range(len(tolerances) - 1), True, key=lambda n: solve(n)[0] <= error)
    tolerance, (found, status) = tolerances[chosen], solve(chosen)
    counts, bounds = np.asarray(status.iterations), certificate.error_bounds(status)
    return Cost(tolerance, found, counts.mean(axis=1), counts.max(axis=1), float(bounds.max()))


def reconstruction_error(flow: ResidualFlow, x: Array, solver: Solver) -> float:
    """max |x - f^-1(f(x))|."""
    return float(jnp.max(jnp.abs(x - flow.inverse(_transform(flow, x), solver=solver, return_status=True)[0])))


def peer_error(peer: Any, z: Array) -> float:
    """max |x - f^-1(f(x))| for the samples of normflows."""
    x = peer.samples(np.asarray(z))
    return float(np.abs(x - peer.samples(peer.forward(x))).max())


def round_trips(flow: ResidualFlow, z: Array, images: Array) -> dict[str, float]:
    """Maximum errors of both round trips, in float32 and float64, with the default solver."""
    errors = {}
    graphdef, state = nnx.split(flow)
    arrays = jax.device_get((state, images, z))
    for bits in (32, 64):
        with jax.enable_x64(bits == 64):
            state, x, latent = jax.tree.map(partial(_cast, dtype=f"float{bits}"), arrays)
            cast = nnx.merge(graphdef, state)
            errors[f"x, float{bits}"] = float(jnp.max(jnp.abs(x - cast.inverse(cast(x)))))
            errors[f"z, float{bits}"] = float(jnp.max(jnp.abs(latent - _transform(cast, cast.inverse(latent)))))
    return errors


def time_sampling(
    flow: ResidualFlow, z: Array, solvers: dict[str, Solver], peer: Any, config: InverseConfig
) -> dict[str, Any]:
    """Median seconds of alternating runs, for samples alone and with their log-density, and the noise of log p."""
    parts = number_of_parts(config.samples, max(1, config.part // flow.dim))
    size, z_parts = config.samples // parts, z.reshape(parts, -1, z.shape[-1])
    keys = jax.random.split(jax.random.key(config.seed), (config.repeats + 1, parts))

    def ours(solver: Solver) -> dict[str, Callable[[int], Any]]:
        def samples(flow: ResidualFlow, z: Array) -> Array:
            return flow.inverse(z, solver=solver, return_status=True)[0]

        def with_log_prob(estimator: Estimator) -> Callable[[int], Any]:
            draw = over_parts(
                lambda flow, key: flow.sample_and_log_prob(key, size, solver=solver, estimator=estimator), flow
            )
            return lambda repeat: draw(keys[repeat])

        samples_of = over_parts(samples, flow)
        return {
            "samples": lambda _: samples_of(z_parts),
            "with log_prob": with_log_prob(Roulette()),
            "with log_prob, 20 terms": with_log_prob(LONG_SERIES),
        }

    competitors = {name: ours(solver) for name, solver in solvers.items()}
    if peer is not None:
        latent = np.asarray(z)
        competitors["normflows"] = {
            "samples": lambda _: peer.samples(latent),
            "with log_prob": lambda _: peer.samples_and_log_prob(latent),
        }
    seconds = {name: {what: [] for what in functions} for name, functions in competitors.items()}
    for repeat in range(config.repeats + 1):  # the first run compiles
        for name, functions in competitors.items():
            for what, function in functions.items():
                began = time.perf_counter()
                with warnings.catch_warnings():
                    # normflows' length distribution has infinite variance for some blocks; only the time matters here.
                    warnings.filterwarnings("ignore", "length: Geometric", RuntimeWarning)
                    jax.block_until_ready(function(repeat))
                if repeat:
                    seconds[name][what].append(time.perf_counter() - began)
    medians = {name: {what: float(np.median(t)) for what, t in all_.items()} for name, all_ in seconds.items()}
    x = flow.inverse(z, solver=solvers[BEST], return_status=True)[0]
    keys = jax.random.split(jax.random.key(config.seed), DRAWS)
    medians[BEST]["noise"] = noise([_log_prob(flow, x, key) for key in keys])
    if peer is not None:
        medians["normflows"]["noise"] = noise([peer.samples_and_log_prob(latent)[1] for _ in keys])
    return medians


def noise(draws: list[Array]) -> float:
    """Standard deviation of estimates of log p over their draws [B] each, in nats; root mean square over images."""
    return float(np.sqrt(np.var(np.asarray(draws), axis=0, ddof=1).mean()))


def report(
    name: str, certificate: Certificate, costs: dict[str, Cost], times: dict[str, Any], exactness: dict[str, float]
) -> dict[str, Any]:
    """Prints the tables of a flow; returns their content as plain values."""
    bounds = certificate.bounds
    print(f"\n{name}: {len(bounds)} blocks, evaluations of g at max |x - f^-1(f(x))| <= the error asked for")
    print(f"{'':<22}" + "".join(f"{solver:>24}" for solver in costs))
    for n, bound in enumerate(bounds):
        cells = "".join(f"{f'{c.mean[n]:.1f} (max {c.largest[n]})':>24}" for c in costs.values())
        print(f"{f'block {n}, L <= {bound:.3f}':<22}{cells}")
    totals = {}
    for part, chosen in ((f"L > {HARD}", bounds > HARD), (f"L <= {HARD}", bounds <= HARD)):
        if chosen.any():
            totals[part] = {s: [float(c.mean[chosen].sum()), int(c.largest[chosen].sum())] for s, c in costs.items()}
            cells = "".join(f"{f'{mean:.1f} (max {largest})':>24}" for mean, largest in totals[part].values())
            print(f"{f'all with {part}':<22}{cells}")
    rows = {
        solver: c._asdict() | {"mean": c.mean.tolist(), "largest": c.largest.tolist()} for solver, c in costs.items()
    }
    for what in ("tolerance", "error", "bound"):
        print(f"{what:<22}" + "".join(f"{row[what]:>24.1e}" for row in rows.values()))
    for competitor, row in times.items():
        print(f"{competitor}: " + ", ".join(f"{what} {_shown(what, value)}" for what, value in row.items()))
    print_table({f"round trip of {which}": f"{error:.1e}" for which, error in exactness.items()})
    print_table(certificate_rows(certificate))
    return {"bounds": bounds.tolist(), "costs": rows, "totals": totals, "seconds": times, "round_trips": exactness}


def _shown(what: str, value: float) -> str:
    if what in ("error", "tolerance"):
        return f"{value:.1e}"
    return f"{value:.2f} nats" if what == "noise" else f"{value * 1e3:.1f} ms"


def draw(workdir: Path, name: str, flow: ResidualFlow, images: Array) -> None:
    """Draws error against iterations, and reconstructions after few iterations."""
    z, shown = flow(images), images[:32]
    solvers = {solver: SOLVERS[solver] for solver in (PLAIN, BEST)}

    def reconstruct(solver: Solver, iterations: int) -> Array:
        # No solve meets this tolerance, so every block takes all its iterations.
        solver = replace(solver, tolerance=1e-30, max_iterations=iterations)
        return flow.inverse(z, solver=solver, return_status=True)[0]

    errors = {
        title: [float(jnp.max(jnp.abs(images - reconstruct(solver, n)))) for n in PLOTTED_ITERATIONS]
        for title, solver in solvers.items()
    }
    _save_error_curves(workdir / f"{name}_errors.png", PLOTTED_ITERATIONS, errors, f"{name}: inverse")
    panels = {"test images x": shown}
    for n in DRAWN_ITERATIONS:
        panels[f"evaluations of g a block: {n}"] = reconstruct(SOLVERS[PLAIN], n)[:32]
    panels["converged $f^{-1}(f(x))$"] = flow.inverse(z[:32])
    save_images(workdir / f"{name}_reconstructions.png", panels, columns=8)


def _cast(array: np.ndarray, dtype: str) -> Array:
    return jnp.asarray(array, dtype if np.issubdtype(array.dtype, np.floating) else None)


@jax.jit
def _log_prob(flow: ResidualFlow, x: Array, key: Array) -> Array:
    return flow.log_prob(x, key=key)


@jax.jit
def _transform(flow: ResidualFlow, x: Array) -> Array:
    """f(x) also for images outside [0, 1] within the margin of the logit's alpha, which the eager `flow` rejects."""
    return flow(x)


def _save_error_curves(path: Path, iterations: Sequence[int], errors: dict[str, list[float]], title: str) -> None:
    """Draws named curves of errors, on a logarithmic axis, against iterations."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in errors.items():
        axis.plot(iterations, values, "o-", ms=4, label=name)
    axis.set(xlabel="evaluations of g in every block", ylabel="max |x - f$^{-1}$(f(x))|", yscale="log", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
