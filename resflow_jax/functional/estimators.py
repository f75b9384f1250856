"""The estimators of log|det(I + J)|: small frozen values, passed where they are used; and what a user's own one is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.length_laws import Defensive, Fitted, Law, check_law, check_values
from resflow_jax.functional.opaque import Opaque, as_tree, original
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
      probe: law of the probes v, as in `Roulette`.
      gradient: "neumann" or "autodiff", as in `Roulette`.
      probes: probes an example, averaged; each costs the whole series.
    """

    terms: int = 10
    probe: Probe = "rademacher"
    gradient: Gradient = "neumann"
    probes: int = field(default=1, kw_only=True)

    def __post_init__(self):
        check_count("terms", self.terms, 1)
        _check_common(self)


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
      length: law of the random number N of further terms: `Defensive`, `Geometric`, `Poisson`,
        `Fitted`, or any object as of `LengthLaw`.
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
        check_law("length", self.length)
        check_count("exact_terms", self.exact_terms, 0)
        if self.krylov is not None:
            check_count("krylov", self.krylov, 0)
        check_count("samples", self.samples, 1)
        _check_common(self)


_ROULETTE_SETTINGS = ("exact_terms", "krylov", "samples", "probe", "probes", "gradient")


def _flatten_roulette(roulette: Roulette) -> tuple[Any, Any]:
    """The law is a child where its class is a pytree; otherwise it belongs to the structure."""
    settings = tuple(getattr(roulette, name) for name in _ROULETTE_SETTINGS)
    law = as_tree(roulette.length)
    return ((), (law, settings)) if isinstance(law, Opaque) else ((law,), (None, settings))


def _flatten_roulette_with_keys(roulette: Roulette) -> tuple[Any, Any]:
    children, structure = _flatten_roulette(roulette)
    return tuple((GetAttrKey("length"), child) for child in children), structure


def _unflatten_roulette(structure: Any, children: Any) -> Roulette:
    law, settings = structure
    made = object.__new__(Roulette)  # unchecked: JAX puts anything in the place of leaves
    for name, value in zip(_ROULETTE_SETTINGS, settings, strict=True):
        object.__setattr__(made, name, value)
    object.__setattr__(made, "length", children[0] if law is None else original(law))
    return made


jax.tree_util.register_pytree_with_keys(
    Roulette, _flatten_roulette_with_keys, _unflatten_roulette, flatten_func=_flatten_roulette
)


class CustomEstimator(Protocol):
    """An estimator of the user's own: any object with this method; no base class is needed.

    What `estimate` computes is differentiated by JAX itself, in any mode and order. The object is traced or a constant
    of the compiled program as a `LengthLaw` is. It may have an attribute `needs_key`, True unless it is there: without
    a key `residual` then raises. `chunk_size` does not apply.
    """

    def estimate(self, g: Callable[[jax.Array], jax.Array], x: jax.Array, key: jax.Array | None) -> Any:
        """(y, log_det): y = x + g(x) like x, and an estimate of log|det dy/dx| of each example, [B], in x's dtype.

        Args:
          g: the residual map with its parameters and its condition. It takes arrays of x's shape and dtype alone;
            `jax.vmap` of it, of its vjp or of its jvp takes several.
          x: floats [B, ...]; rows [B, D] of an event that is a tree.
          key: as `residual` was given.
        """


Estimator = Exact | Truncated | Roulette | CustomEstimator


def is_custom(estimator: Any) -> bool:
    """Whether an estimator is none of this module."""
    return not isinstance(estimator, Exact | Truncated | Roulette)


def is_series(estimator: Any) -> bool:
    """Whether an estimator adds up a series with random probes."""
    return isinstance(estimator, Truncated | Roulette)


def needs_key(estimator: Estimator) -> bool:
    """Whether an estimate takes a PRNG key."""
    estimator = original(estimator)
    return not isinstance(estimator, Exact) and (not is_custom(estimator) or getattr(estimator, "needs_key", True))


def check_estimator(estimator: Estimator) -> None:
    """Raises ValueError for what is no estimator, and for a law of lengths that says that its values are wrong."""
    estimator = original(estimator)
    if is_custom(estimator):
        if isinstance(estimator, type) or not callable(getattr(estimator, "estimate", None)):
            raise ValueError(
                "estimator: expected Exact, Truncated or Roulette, or an object with the method estimate(g, x, key), "
                f"got {estimator!r}"
            )
    elif isinstance(estimator, Roulette):
        check_values(estimator.length)


def with_rows(estimator: Estimator, blocks: int) -> Estimator:
    """The estimator of a chain of residual blocks, as a pytree whose arrays have one row a block.

    Raises:
      ValueError: if the table of a `Fitted` law has rows already, and not so many.
    """
    estimator = as_tree(estimator)
    if isinstance(estimator, Roulette) and isinstance(estimator.length, Fitted):
        return replace(estimator, length=estimator.length.with_rows(blocks))

    def rows(leaf):
        leaf = jnp.asarray(leaf)
        return jnp.broadcast_to(leaf[None], (blocks, *leaf.shape))

    return jax.tree.map(rows, estimator)


def _check_common(estimator: Truncated | Roulette) -> None:
    check_choice("probe", estimator.probe, PROBES)
    check_count("probes", estimator.probes, 1)
    check_choice("gradient", estimator.gradient, _GRADIENTS)
