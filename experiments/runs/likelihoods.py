"""What commands compute from scores of examples: AUROC, typicality, and the error of reconstructions."""

import csv
import io
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs.devices import devices_for
from experiments.runs.parts import over_parts
from resflow_jax import Typicality
from resflow_jax.models.flow import Flow

Array = jax.Array

RECONSTRUCTED = 64  # test examples
EXACT_BATCH_SIZE = 4  # examples whose dense Jacobians are in memory at once
PERMUTED = "permuted"


def named(other: str) -> str:
    """The words for a set of other examples."""
    return "the test split in disorder" if other == PERMUTED else f"{other}, test split"


def auroc(test: np.ndarray, other: np.ndarray) -> float:
    """The probability that an example of the other data has a larger loss than a test example; ties count half.

    It is NaN without examples, or if a loss is NaN. Losses may be infinite.
    """
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score  # half a second to import, which most commands need not wait

    losses = np.concatenate([test, other])
    if not (len(test) and len(other)) or np.isnan(losses).any():
        return math.nan
    labels = np.repeat([0, 1], [len(test), len(other)])
    return float(roc_auc_score(labels, rankdata(losses)))


def typicality_of(
    sign: int, dim: int, references: list[np.ndarray], means: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Score, p-value and quantile of every example of each set, from metrics of training and of validation examples.

    The metric may have any unit, and may fall or rise with the log-density, like bits/dim or nats. Scores have its
    unit.

    Args:
      sign: 1 if a lower metric is a higher likelihood, -1 if a higher one is.
      dim: number of elements of an example.
      references: metrics of training and of validation examples.
      means: metrics of the examples of each set.
    """

    def likelihoods(values: np.ndarray) -> Array:
        return jnp.asarray(-sign * values, jnp.result_type(float))

    typicality = Typicality.from_log_probs(*map(likelihoods, references), dim=dim)
    judged = {}
    for name, values in means.items():
        found = {what: getattr(typicality, what)(likelihoods(values)) for what in ("score", "p_value", "quantile")}
        judged[name] = {what: np.asarray(array) for what, array in found.items()}
    return judged


def typicality_summary(judged: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """The share of each set that the test rejects, and the AUROC of its scores."""
    return {
        name: {
            "rejected_at_0.05": float((found["p_value"] <= 0.05).mean()),
            "auroc": auroc(judged["test"]["score"], found["score"]),
        }
        for name, found in judged.items()
    }


def typicality_csv(means: dict[str, np.ndarray], judged: dict[str, dict[str, np.ndarray]]) -> str:
    """The text of typicality.csv, one line for each example."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["set", "example", "likelihood", "score", "p_value", "quantile"])
    for name, found in judged.items():
        columns = zip(means[name], *found.values(), strict=True)
        lines.writerows([name, n, *(f"{value:.9g}" for value in row)] for n, row in enumerate(columns))
    return text.getvalue()


def typicality_rows(summary: dict[str, dict[str, float]]) -> dict[str, str]:
    """The lines of a closing table on typicality."""
    table = {}
    for name, found in summary.items():
        share = f"p <= 0.05 for {found['rejected_at_0.05']:.1%} of the examples"
        table[f"typicality, {name}"] = share if name == "test" else f"{share}; AUROC {found['auroc']:.4f}"
    return table


def reconstruction(flow: Flow, examples: Array) -> tuple[float, int]:
    """max |x - f^-1(f(x))| over examples x, and the number of examples whose inverse did not converge."""

    def round_trip(flow: Flow, x: Array) -> tuple[Array, Array]:
        reconstructed, status = flow.inverse(flow(x), return_status=True)
        return reconstructed, status.converged.all(axis=0)

    parts = examples.reshape(devices_for(len(examples)), -1, *examples.shape[1:])
    reconstructed, converged = over_parts(round_trip, flow)(parts)
    return float(np.abs(np.asarray(examples) - np.asarray(reconstructed)).max()), int(jnp.sum(~converged))


def reconstruction_row(found: dict[str, float]) -> str:
    """The text of a closing table on reconstructions."""
    failed = f"; {found['unconverged']} DID NOT CONVERGE" if found["unconverged"] else ""
    return f"{found['error']:.1e}, max |x - f^-1(f(x))| of {found['examples']} test examples{failed}"
