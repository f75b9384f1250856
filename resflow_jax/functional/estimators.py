"""The estimators of log|det(I + J)|: small frozen values, passed where they are used."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax

from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.laws import Defensive, Fitted, Law
from resflow_jax.functional.probes import PROBES

Probe = Literal["rademacher", "gaussian", "orthogonal"]
Gradient = Literal["neumann", "autodiff"]

_GRADIENTS = ("neumann", "autodiff")


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("chunk_size",))
@dataclass(frozen=True)
class Exact:
    """slogdet of the dense Jacobian of every example. Deterministic; takes no key.

    Cost: D vjps of g (D = number of elements of one example), an LU of [B, D, D]. Derivatives of
    any order and mode; the Jacobian is recomputed in the backward pass.

    Attributes:
      chunk_size: rows of the Jacobian computed at once; bounds the memory to chunk_size * B
        evaluations of g.
    """

    chunk_size: int = 64

    def __post_init__(self):
        check_count("chunk_size", self.chunk_size, 1)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("terms", "probe", "probes", "gradient"))
@dataclass(frozen=True)
class Truncated:
    """The first `terms` terms of the power series. Biased (Behrmann et al. 2019).

    The bias of the value is at most D * L^(terms + 1) / ((terms + 1) * (1 - L)). Cost: `terms`
    vjps of g a probe and, for the gradient, one vjp of (g, J v). The gradient is that of the
    truncated value, in expectation over the probe.

    Attributes:
      terms: number of terms of the series.
      probe, gradient, probes: as in `Roulette`.
    """

    terms: int = 10
    probe: Probe = "rademacher"
    gradient: Gradient = "neumann"
    probes: int = field(default=1, kw_only=True)

    def __post_init__(self):
        check_count("terms", self.terms, 1)
        _check_common(self)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("length",),
    meta_fields=("exact_terms", "krylov", "samples", "probe", "probes", "gradient"),
)
@dataclass(frozen=True)
class Roulette:
    """The unbiased Russian-roulette estimate, by default of a minimal-residual iteration.

    Unbiased in value and gradient over the key, up to lengths of a probability below 2^-64, which are never drawn
    (2^-24 with gradient="autodiff"). The value of minimal-residual steps holds a quadrature, right to 1e-12 for
    Lipschitz constants up to 0.999. One length for the whole batch.
    Cost: exact_terms + max_i N_i vjps of g a probe (2.15 on average by default for a block of
    Lipschitz bound 0.94) and, for the gradient, one vjp of (g, J v).

    The papers' setting is Roulette(Poisson(2.0), exact_terms=2, krylov=0, probe="gaussian").

    Attributes:
      length: law of the random number N of further terms: `Defensive`, `Geometric`, `Poisson`, or
        `Fitted`.
      exact_terms: terms that are always taken, m >= 0.
      samples: number of lengths averaged; the series is as long as the longest.
      probe: law of the probes v: "rademacher" (entries +-1, least variance), "gaussian", or
        "orthogonal" (those of an example at right angles: as many as dimensions give the exact trace).
      gradient: "neumann" (constant memory, first-order reverse mode) or "autodiff" (differentiates
        the estimate itself: memory grows with the longest possible series, any order and mode; it
        leaves out lengths of probability below 2^-24, which for `Defensive` are those above some
        hundreds: prefer `Geometric`).
      krylov: number of minimal-residual steps (`functional.series.MinimalResidual`, a two-term
        recurrence) before the power series goes on from their residual; None for all steps, 0 for
        the power series of the papers.
      probes: probes an example, averaged; each costs the whole series.
    """

    length: Law = Defensive()
    exact_terms: int = 0
    samples: int = 1
    probe: Probe = "rademacher"
    gradient: Gradient = "neumann"
    krylov: int | None = field(default=None, kw_only=True)
    probes: int = field(default=1, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.length, Law):
            raise ValueError(f"length: expected Defensive, Geometric, Poisson or Fitted, got {self.length!r}")
        check_count("exact_terms", self.exact_terms, 0)
        if self.krylov is not None:
            check_count("krylov", self.krylov, 0)
        check_count("samples", self.samples, 1)
        _check_common(self)


Estimator = Exact | Truncated | Roulette


def check_estimator(estimator: Estimator) -> None:
    """Raises ValueError for anything else, and for a table of lengths that is none."""
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator: expected Exact, Truncated or Roulette, got {estimator!r}")
    if isinstance(estimator, Roulette) and isinstance(estimator.length, Fitted):
        estimator.length.check()


def _check_common(estimator: Truncated | Roulette) -> None:
    check_choice("probe", estimator.probe, PROBES)
    check_count("probes", estimator.probes, 1)
    check_choice("gradient", estimator.gradient, _GRADIENTS)
