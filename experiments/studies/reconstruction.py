"""Can an image be recovered from a classifier's features?

    python -m experiments.studies.reconstruction [--data digits | fashion_mnist] [--steps N] [--workdir DIR] ...

trains i-ResNets with several bounds, the same network without a bound ("vanilla") and a standard residual network, by
the settings of `experiments.classify`, under DIR/DATA/; finished runs are only read. Then it maps test images x to the
last features and back, block by block from the last, by n steps of

    x_k+1 = y - g(x_k),   x_0 = y       (Behrmann et al. 2019, arXiv 1811.00995, algorithm 1)

The error of an image is max |x - x_n|. Under DIR/DATA/ it writes reconstructions.png (images from the features of each
network), iterations.png and a table (error against n, for convolutions of norm at most c, so that Lip(g) <= c^3), and
reconstruction.json. It prints how the others fail: the largest |g(a) - g(b)| / |a - b| over pairs of test images in
each block, a lower bound of Lip(g), beside that of the i-ResNet and its certified upper bound.

On digits and 2 CPU cores a run takes about a minute, everything eight. Expected at c = 0.9: an error of at most 2e-3
after 5 steps and 2e-5 after 10; without a bound the iteration diverges for every image.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from scipy.spatial.distance import pdist

from experiments.configs.classes import CLASS_CONFIGS
from experiments.runs.command import Command, Output
from experiments.runs.devices import cores_for, use_all_cores, use_compilation_cache, use_xla_flags
from experiments.runs.metrics_file import without_nan
from experiments.runs.pictures import Row, save_rows
from experiments.runs.saved import saved_flow
from experiments.runs.tables import markdown_table
from experiments.runs.workdir import write_atomically
from experiments.studies.parts.class_pictures import save_iterations
from experiments.studies.parts.class_runs import (
    DATASETS,
    Common,
    finish,
    test_error,
    with_coefficient,
)
from resflow_jax import Anderson, Chain, FixedPoint, Flow, ResidualBlock, ResidualStack, Solver, certify
from resflow_jax.functional.checks import check_choice, check_count, check_open_interval
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.unconstrained import UnconstrainedBlock

Array = jax.Array

ITERATIONS = (1, 2, 3, 5, 7, 10, 15, 20)
LOST = 1e-2  # with a larger error an image counts as lost, else as recovered
SHOWN = 12  # images in the picture
VANILLA, STANDARD = "vanilla", "standard"


@dataclass(frozen=True)
class ReconstructionConfig:
    """One run of `python -m experiments.studies.reconstruction`.

    Attributes:
      data: name of the images.
      coefficients: bounds c on the norm of every convolution, in increasing order; the last is that of the picture.
      images: maximum number of test images that are reconstructed.
      workdir: directory that everything is written to, under the name of the images.
      steps: number of training steps of every run; by default that of the config of the data.
      seed: random seed of the runs.
      data_dir: directory of TensorFlow data sets, as `--data.dir` of `experiments.classify`.
      small: whether to use the small runs of `--tiny`.
    """

    data: Literal[DATASETS] = "digits"
    coefficients: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    images: int = 300
    workdir: Path = Path("runs/reconstruction")
    steps: int | None = None
    seed: int = 0
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
    small: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def __post_init__(self):
        check_choice("data", self.data, DATASETS)
        for coefficient in self.coefficients:
            check_open_interval("coefficients", coefficient, 0, 1)
        if not self.coefficients or list(self.coefficients) != sorted(set(self.coefficients)):
            raise ValueError(f"coefficients: expected some in increasing order, got {self.coefficients}")
        check_count("images", self.images, 2)
        check_count("seed", self.seed, 0)
        if self.steps is not None:
            check_count("steps", self.steps, 1)

    @property
    def common(self) -> Common:
        """What all runs have in common."""
        return Common(self.data, self.workdir / self.data, self.steps, self.data_dir, self.small)


def tiny(config: ReconstructionConfig) -> ReconstructionConfig:
    """Two updates of tiny networks with one bound, and eight images."""
    return replace(config, coefficients=(0.9,), images=8, workdir=Path("runs/reconstruction_tiny"), small=True)


def output(config: ReconstructionConfig) -> Output:
    """The pictures, the table, and a directory for each run."""
    runs = (f"{name}/" for name in (*map(_name, config.coefficients), VANILLA, STANDARD))
    return Output(config.workdir / config.data, ("reconstructions.png", "iterations.png", "reconstruction.json", *runs))


COMMAND = Command("experiments.studies.reconstruction", __doc__, ReconstructionConfig(), tiny, output)


class Network(NamedTuple):
    """A trained network.

    Attributes:
      flow: the network, tightened.
      error: test error in %, and its standard error.
    """

    flow: Flow
    error: list[float]


class Recovered(NamedTuple):
    """Images from the features of a network.

    Attributes:
      images: x_n, [N, H, W, C]; it may not be finite.
      errors: max |x - x_n| of every image [N]; infinite where x_n is not finite.
      unconverged: number of images of which a block's iteration did not meet its tolerance.
    """

    images: np.ndarray
    errors: np.ndarray
    unconverged: int

    @property
    def figures(self) -> dict[str, Any]:
        """The errors and counts as plain values."""
        return {
            "max": float(self.errors.max()),
            "median": float(np.median(self.errors)),
            "lost": int((self.errors > LOST).sum()),
            "unconverged": self.unconverged,
            "images": len(self.errors),
        }


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    use_xla_flags()
    COMMAND.call(start, arguments)


def start(config: ReconstructionConfig) -> None:
    """Runs on as many devices as can take equal shares of a batch."""
    use_all_cores(cores_for(config.common.run(config.common.base, "").batch_size))
    run(config)


def run(config: ReconstructionConfig) -> dict[str, Any]:
    """Trains the missing runs, measures, draws and prints; returns the content of reconstruction.json."""
    use_compilation_cache()
    directory = config.common.directory
    networks, x, labels = trained(config)
    best = _name(config.coefficients[-1])

    solved = {name: recovered(networks[name].flow, x, FixedPoint()) for name in (best, VANILLA, STANDARD)}
    accelerated = recovered(networks[VANILLA].flow, x, Anderson()).figures
    bounds = certify(networks[best].flow).bounds.tolist()
    grown = {name: largest_growth(networks[name].flow, x) for name in (best, VANILLA)}
    invertible = [name for name in networks if name not in (VANILLA, STANDARD)]
    curves = {name: errors_by_iterations(networks[name].flow, x) for name in invertible}

    result = {
        "test_error": {name: network.error for name, network in networks.items()},
        "bounds": {name: float(certify(networks[name].flow).bounds.max()) for name in invertible},
        "fixed_point": {name: found.figures for name, found in solved.items()},
        "anderson": {VANILLA: accelerated},
        "iterations": {"n": list(ITERATIONS), **curves},
        "growth": {"certified": bounds, **grown},
    }
    write_atomically(directory / "reconstruction.json", json.dumps(without_nan(result), indent=2) + "\n")
    chosen = one_of_each(labels)
    rows = [Row("test images x; below, x' by fixed-point iteration from their features", np.asarray(x)[chosen])]
    for name, found in solved.items():
        rows.append(Row(f"{_title(name)}: {_said(found.figures)}", found.images[chosen]))
    save_rows(directory / "reconstructions.png", rows)
    titles = {f"c = {name[1:]}, Lip(g) $\\leq$ {result['bounds'][name]:.3f}": curves[name] for name in invertible}
    save_iterations(directory / "iterations.png", ITERATIONS, titles, f"{config.data}: from features to images")
    report(result, best)
    return result


def trained(config: ReconstructionConfig) -> tuple[dict[str, Network], Array, np.ndarray]:
    """The networks by name, trained where they are missing; test images [N, H, W, C] in [0, 1] and their labels [N]."""
    common, base = config.common, config.common.base
    bases = {_name(c): with_coefficient(base, c) for c in config.coefficients}
    bases |= {name: CLASS_CONFIGS[f"{config.data}_{name}"] for name in (VANILLA, STANDARD)}
    networks = {}
    for name, settings in bases.items():
        of_run = common.run(settings, name, config.seed)
        finish(of_run)
        saved = saved_flow(of_run.workdir)
        networks[name] = Network(saved.flow, test_error(of_run.workdir))
    test = saved.task.splits.test[: config.images]
    return networks, saved.task.inputs(test), test.labels


def recovered(flow: Flow, x: Array, solver: Solver) -> Recovered:
    """The images that a solver finds from the features of x [N, H, W, C]."""
    found, status = flow.inverse(flow(x), solver=solver, return_status=True)
    found = np.asarray(found)
    errors = np.abs(found - np.asarray(x)).reshape(len(x), -1).max(axis=1)
    unconverged = int((~status.converged.all(axis=0)).sum())
    return Recovered(found, np.where(np.isfinite(errors), errors, np.inf), unconverged)


def errors_by_iterations(flow: Flow, x: Array) -> dict[str, list[float]]:
    """The maximum and median error over images after `ITERATIONS` evaluations of g in every block."""
    # No solve meets this tolerance, so that every block takes all its iterations.
    found = [recovered(flow, x, FixedPoint(tolerance=1e-30, max_iterations=n)).figures for n in ITERATIONS]
    return {what: [figures[what] for figures in found] for what in ("max", "median")}


def largest_growth(flow: Flow, x: Array) -> list[float]:
    """The largest |g(a) - g(b)| / |a - b| in the 2-norm of every block, for a and b from different images of x [N]."""
    ratios = []
    for layer in _layers(flow.bijector):
        if isinstance(layer, ResidualBlock | UnconstrainedBlock):
            g = layer.g if isinstance(layer, ResidualBlock) else layer.branch
            after, before = (pdist(np.asarray(rows, np.float64).reshape(len(x), -1)) for rows in (g(x), x))
            ratios.append(float((after / np.where(before > 0, before, np.inf)).max()))
        x = layer(x)
    return ratios


def _layers(bijector: Bijector) -> Iterator[Bijector]:
    """The layers of a network in order, without chains and stacks."""
    if isinstance(bijector, Chain | ResidualStack):
        inside = bijector.bijectors if isinstance(bijector, Chain) else bijector.unstacked()
        for layer in inside:
            yield from _layers(layer)
    else:
        yield bijector


def one_of_each(labels: Sequence[int], number: int = SHOWN) -> np.ndarray:
    """Up to `number` places of images: the first of each class in the order of classes, then the first others."""
    firsts = np.unique(labels, return_index=True)[1]
    others = np.setdiff1d(np.arange(len(labels)), firsts)
    return np.concatenate([firsts, others])[:number]


def report(result: dict[str, Any], best: str) -> None:
    """Prints the tables, in Markdown."""
    print("\nImages from the last features, block by block (the strides of the standard network drop pixels):\n")
    solves = [(name, "fixed point", figures) for name, figures in result["fixed_point"].items()]
    solves.insert(2, (VANILLA, "Anderson", result["anderson"][VANILLA]))
    rows = [
        [
            _title(name),
            solver,
            f"{figures['max']:.1e}",
            f"{figures['median']:.1e}",
            f"{figures['lost']} of {figures['images']}",
            str(figures["unconverged"]),
            _percent(result["test_error"][name]),
        ]
        for name, solver, figures in solves
    ]
    head = ["network", "solver", "max error", "median", f"error > {LOST:g}", "not converged", "test error in %"]
    print(markdown_table(head, rows))

    counts = result["iterations"]["n"]
    for what in ("max", "median"):
        print(f"\n{what} over images of max |x - x_n| after n evaluations of g in every block:\n")
        rows = [
            [
                _title(name),
                f"{bound:.3f}",
                *(f"{error:.0e}" for error in result["iterations"][name][what]),
                _percent(result["test_error"][name]),
            ]
            for name, bound in result["bounds"].items()
        ]
        print(markdown_table(["", "Lip(g) <=", *(f"n = {n}" for n in counts), "test error in %"], rows))

    growth = result["growth"]
    print("\nLargest |g(a) - g(b)| / |a - b| over pairs of test images; Lip(g) < 1 guarantees an inverse:\n")
    blocks = zip(growth[VANILLA], growth[best], growth["certified"], strict=True)
    rows = [[str(n), *(f"{value:.3f}" for value in block)] for n, block in enumerate(blocks)]
    print(markdown_table(["block", "vanilla, seen", f"{_title(best)}, seen", "certified"], rows))


def _name(coefficient: float) -> str:
    return f"c{coefficient:g}"


def _title(name: str) -> str:
    return {VANILLA: "no bound (vanilla)", STANDARD: "standard ResNet"}.get(name, f"i-ResNet, c = {name[1:]}")


def _said(figures: dict[str, Any]) -> str:
    """The title of a row of the picture."""
    number = figures["images"]
    failed = f", {figures['unconverged']} did not converge" if figures["unconverged"] else ""
    return (
        f"{number - figures['lost']} of {number} recovered{failed}; max |x - x'| at most {figures['max']:.1e}, "
        f"median {figures['median']:.1e}"
    )


def _percent(error: list[float]) -> str:
    return f"{error[0]:.2f} ± {error[1]:.2f}"


if __name__ == "__main__":
    main()
