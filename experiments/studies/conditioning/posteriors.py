"""Compares the posteriors of flows with the exact one, by densities of new pairs and samples at observations."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np

from experiments.runs.pictures import save_figure
from experiments.studies.conditioning.amortised import Learner, Standardised
from experiments.studies.conditioning.c2st import c2st
from experiments.studies.conditioning.simulators import GaussianLinear, Simulator
from resflow_jax import Certificate

TRUTH = "exact posterior"


class Fit(NamedTuple):
    """The quality of a flow on a task.

    Attributes:
      nll: mean of -log q(theta | x) over new pairs, in nats of theta.
      nll_stderr: standard error of `nll`.
      excess: mean of log p(theta | x) - log q(theta | x) over the same pairs: the mean over x of KL(p || q).
      excess_stderr: standard error of `excess`.
      c2st: score of the classifier two-sample test at each observation.
      normal_kl: for a normal posterior, mean over observations of KL(q || p) with a normal distribution fitted to
        samples of q; None for other posteriors.
      steps: number of training steps; 0 for the posterior itself.
      seconds: seconds of training, without the first step.
      first_step: seconds of the first step, compilation included.
    """

    nll: float
    nll_stderr: float
    excess: float
    excess_stderr: float
    c2st: list[float]
    normal_kl: float | None
    steps: int = 0
    seconds: float = 0.0
    first_step: float = 0.0


class Comparison(NamedTuple):
    """The results of the exact posterior, named `TRUTH`, and of the flows.

    Attributes:
      fits: figures by name.
      samples: theta [N, D] at each observation, by name.
      observed: the observations, [K, X].
    """

    fits: dict[str, Fit]
    samples: dict[str, list[np.ndarray]]
    observed: np.ndarray


def compare(
    learners: list[Learner],
    task: Standardised,
    rng: np.random.Generator,
    *,
    observations: int,
    samples: int,
    pairs: int,
) -> Comparison:
    """Measures trained learners.

    Args:
      learners: the learners.
      task: the simulator.
      rng: random generator of pairs, observations and exact samples; the samples of learners have keys of their own.
      observations: number of values of x, from prior and simulator, at which samples are compared.
      samples: number of samples of every posterior at every observation.
      pairs: number of new pairs for the log-densities.
    """
    simulator = task.simulator
    theta = simulator.prior(rng, pairs)
    x = simulator.simulate(rng, theta)
    observed = simulator.simulate(rng, simulator.prior(rng, observations))
    reference, exact = ([simulator.posterior(rng, samples, one) for one in observed] for _ in range(2))
    truth = simulator.posterior_log_prob(theta, x)

    def fit(found: list[np.ndarray], log_prob: np.ndarray) -> Fit:
        scores = [c2st(*pair) for pair in zip(reference, found, strict=True)]
        nll, excess = -log_prob, truth - log_prob
        means = float(nll.mean()), _stderr(nll), float(excess.mean()), _stderr(excess)
        return Fit(*means, scores, normal_kl(simulator, found, observed))

    found, fits = {TRUTH: exact}, {TRUTH: fit(exact, truth)}
    for learner in learners:
        drawn = [draw(learner, task, one, samples, n) for n, one in enumerate(observed)]
        log_prob = learner.log_prob(*task.standardise(theta, x)).astype(np.float64) + task.log_det
        cost = {"steps": learner.steps, "seconds": learner.seconds, "first_step": learner.first_step}
        found[learner.name], fits[learner.name] = drawn, fit(drawn, log_prob)._replace(**cost)
    return Comparison(fits, found, observed)


def draw(learner: Learner, task: Standardised, x: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Draws theta [number, D] from q(theta | x), in its own units."""
    _, x = task.standardise(task.moments[0][0], x)
    return task.theta(learner.sample(jax.random.key(seed), number, x))


def normal_kl(simulator: Simulator, samples: list[np.ndarray], observed: np.ndarray) -> float | None:
    """Mean over observations of KL(N(m, S) || posterior) in nats, m and S the moments of samples [N, D].

    KL = 1/2 (tr S / s - D + |m - mean|^2 / s + D log s - log|S|) for the posterior N(mean, s I). With N exact samples
    it is about D (D + 3) / 4N. None for a posterior that is not normal.
    """
    if not isinstance(simulator, GaussianLinear):
        return None
    s, dim = simulator.posterior_variance, simulator.dim
    divergences = []
    for theta, x in zip(samples, observed, strict=True):
        covariance = np.cov(theta, rowvar=False)
        away = np.sum((theta.mean(axis=0) - simulator.posterior_mean(x)) ** 2)
        log_det = np.linalg.slogdet(covariance)[1]
        divergences.append(0.5 * ((np.trace(covariance) + away) / s - dim + dim * math.log(s) - log_det))
    return float(np.mean(divergences))


def circle_of(simulator: Simulator) -> Callable[[np.ndarray], tuple[np.ndarray, float]] | None:
    """A function from x to centre and radius of the 95 % circle of two elements of theta; None if it is not known."""
    if not isinstance(simulator, GaussianLinear):
        return None
    radius = math.sqrt(-2 * math.log(0.05) * simulator.posterior_variance)
    return lambda x: (simulator.posterior_mean(x)[:2], radius)


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def print_fits(title: str, fits: dict[str, Fit], certificate: Certificate) -> None:
    """Prints a table with one column per flow; `certificate` is that of the residual flow."""
    rows = {
        title: list(fits),
        "-log q(theta | x)": [f"{fit.nll:.3f} +- {fit.nll_stderr:.3f} nats" for fit in fits.values()],
        "above the posterior": [f"{fit.excess:.3f} +- {fit.excess_stderr:.3f} nats" for fit in fits.values()],
        "C2ST": [f"{np.mean(fit.c2st):.3f} +- {_stderr(np.array(fit.c2st)):.3f}" for fit in fits.values()],
        "KL of a normal fit": ["" if fit.normal_kl is None else f"{fit.normal_kl:.3f} nats" for fit in fits.values()],
        "steps": [str(fit.steps or "") for fit in fits.values()],
        "training": [f"{fit.seconds:.0f} s" if fit.steps else "" for fit in fits.values()],
        "the first step": [f"{fit.first_step:.0f} s" if fit.steps else "" for fit in fits.values()],
    }
    for name, cells in rows.items():
        if any(cells):
            print(f"{name:<24}" + "".join(f"{cell:<26}" for cell in cells).rstrip())
    print(f"{'certified':<24}Lip(g) <= {certificate.bounds.max():.4f} for every x\n")


def save_posteriors(
    path: Path,
    samples: dict[str, list[np.ndarray]],
    observed: np.ndarray,
    title: str,
    circle: Callable[[np.ndarray], tuple[np.ndarray, float]] | None = None,
) -> None:
    """Draws the first two elements of samples [N, D], with a row for each name and a column for each x of `observed`.

    Axis limits of a column are set by its first row. circle(x) gives the centre and radius of a circle to draw.
    """
    shape = len(samples), len(observed)
    figure, axes = plt.subplots(*shape, figsize=(2.2 * shape[1] + 0.4, 2.2 * shape[0] + 0.4), layout="constrained")
    reference = next(iter(samples.values()))
    for n, (row, (name, posteriors)) in enumerate(zip(axes, samples.items(), strict=True)):
        for axis, theta, truth, x in zip(row, posteriors, reference, observed, strict=True):
            axis.plot(theta[:, 0], theta[:, 1], ".", ms=1.5, alpha=0.5, color=f"C{n}")
            if circle is not None:
                axis.add_patch(plt.Circle(*circle(x), fill=False, color="black", lw=1))
            middle = (truth[:, :2].max(axis=0) + truth[:, :2].min(axis=0)) / 2
            half = 0.65 * np.ptp(truth[:, :2], axis=0).max()
            axis.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
            axis.set_aspect("equal")
            axis.tick_params(labelsize=6)
            if n == 0:
                axis.set_title("x = " + ", ".join(f"{value:.2f}" for value in x[:2]), fontsize=8)
        row[0].set_ylabel(name)
    figure.suptitle(f"{title}: posterior samples at {len(observed)} observations")
    save_figure(figure, path)
