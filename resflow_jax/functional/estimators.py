"""The estimators of log|det(I + J)| as small frozen dataclasses, and the interface of a user's own estimator."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from resflow_jax.functional.checks import check_choice, check_count, check_flag
from resflow_jax.functional.length_laws import Defensive, Fitted, Law, check_law, check_values, fit_lengths
from resflow_jax.functional.opaque import Opaque, as_tree, original
from resflow_jax.functional.probes import PROBES

Probe = Literal["rademacher", "gaussian", "orthogonal", "hadamard"]
Gradient = Literal["neumann", "autodiff"]

_GRADIENTS = ("neumann", "autodiff")
_DEFAULT_SUBSAMPLE = 2


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("chunk_size",))
@dataclass(frozen=True)
class Exact:
    """The exact log|det(I + J)|, from the dense Jacobian of each example by an LU decomposition.

    It is deterministic and takes no key. For an example of D elements it costs D vjps of g and an LU decomposition of
    [B, D, D]. Derivatives of any order and mode work; the backward pass computes the Jacobian again.

    Attributes:
      chunk_size: number of rows of the Jacobian that are computed at once. The memory is that of chunk_size * B
        evaluations of g.

    Raises:
      ValueError: for a chunk_size below 1.

    Example:
      >>> x = jnp.zeros((2, 3))
      >>> y, log_det = rf.residual(lambda w, x: jnp.sin(w * x), 0.5, x, estimator=rf.Exact())
      >>> bool(jnp.allclose(log_det, 3 * jnp.log(1.5)))   # dy/dx = 1.5 I at x = 0
      True
    """

    chunk_size: int = 64

    def __post_init__(self):
        check_count("chunk_size", self.chunk_size, 1)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("terms", "probe", "probes", "gradient"))
@dataclass(frozen=True)
class Truncated:
    """A biased estimate of log|det(I + J)|: the first n = `terms` terms of its power series.

        log|det(I + J)| ~ sum_{k=1}^{n} (-1)^(k+1) / k * v^T J^k v,   E[v v^T] = I

    (Behrmann et al. 2019, arXiv 1811.00995, section 3.2). The bias is at most D * L^(n + 1) / ((n + 1) * (1 - L)) nats
    for D dimensions and Lip(g) <= L. It costs n vjps of g for each probe and, for the gradient, one vjp of (g, J v).
    The gradient is an unbiased estimate of the gradient of the truncated value. Probes are random with the key and
    independent for each example.

    Attributes:
      terms: number of terms of the series.
      probe: distribution of the probes v, as in `Roulette`.
      gradient: "neumann" or "autodiff", as in `Roulette`.
      probes: number of probes per example, whose estimates are averaged; each costs the whole series.

    Raises:
      ValueError: for a count below 1, or an unknown probe or gradient.

    Example:
      >>> x, key = jnp.zeros((2, 3)), jax.random.key(0)
      >>> y, log_det = rf.residual(lambda w, x: jnp.sin(w * x), 0.5, x, key=key, estimator=rf.Truncated(terms=2))
      >>> log_det.tolist()   # 3 (0.5 - 0.5^2 / 2), against the exact 3 log 1.5 = 1.2164
      [1.125, 1.125]
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
    """The unbiased Russian-roulette estimate of log|det(I + J)|, by default with minimal-residual steps.

        log|det(I + J)| = E_{N,v}[ sum_{k=1}^{m+N} term_k(v) / P(N >= k - m) ],   P(N >= j) = 1 for j <= 0

    (Chen et al. 2019, arXiv 1906.02735, equation 6, for the power series.) Value and gradient are unbiased over the
    key, except for lengths with a probability below 2^-64, which are never drawn (2^-24 with gradient="autodiff"). With
    minimal-residual steps the value contains a quadrature, whose error is about 1e-12 for L <= 0.999. All examples of a
    batch share the length N; with `subsample` those that it draws. The probes v are independent for each example,
    unless they are Hadamard probes, as by default.

    It costs exact_terms + max_i N_i / r + trace_probes vjps of g for each probe, with the r of `subsample`: by default,
    for Lip(g) <= 0.94, 4.3 on average, and 5.6 for a batch of odd size. The gradient costs one vjp of (g, J v) more.
    The variance is finite if the tail of the length distribution is long enough; see `LengthLaw`.

    The setting of Chen et al. (2019) is Roulette(Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian").

    Attributes:
      length: distribution of the number N of terms after the exact ones: `Defensive`, `Geometric`, `Poisson`, `Fitted`,
        or any object with the methods of `LengthLaw`.
      exact_terms: m >= 0, the number of terms that are always taken.
      samples: number of lengths N_i. Their weights are averaged, and the series runs to the longest.
      probe: distribution of the probes v: "rademacher" (entries +-1; of independent entries they have the least
        variance), "gaussian", "orthogonal" (the probes of an example are orthogonal, and D of them give the exact
        trace), or "hadamard" (as "rademacher" for each example, but the probes of different examples are orthogonal,
        as far as the batch size allows, so that their errors cancel in means over a batch).
      gradient: "neumann" has constant memory, first-order reverse mode, and forward mode over that. "autodiff"
        differentiates the estimate itself, in any order and mode; its memory grows with the longest possible series.
        That is some hundreds of terms for `Defensive`: prefer `Geometric` there.
      minres_steps: number of minimal-residual steps (`functional.series.MinimalResidual`) before the series continues
        as the power series of their residual. None takes such steps throughout; 0 is the power series of the paper.
      probes: number of probes for each example, whose estimates are averaged; each costs the whole series.
      subsample: r >= 1. Terms after the exact ones are computed only for every r-th example, from a random first one,
        and are multiplied by r. The estimate stays unbiased. These terms cost 1/r as much, so that the series can be
        longer, and are averaged over fewer examples. r is reduced to the largest divisor of the batch size, or of a
        device's part of it, that is at most r, and to 1 for a symbolic size. g is evaluated on parts of the batch.
        None means r = 2 if at least two exact terms are minimal-residual steps, the gradient is "neumann", and tracing
        shows that g computes every row in the same way for any batch size; otherwise r = 1. Under `vmap` over keys a
        CPU computes the whole series for all examples.
      trace_probes: number of further probes u, for each probe v of the series, which estimate tr(J) alone: the mean of
        u^T J u is added to the value, and v^T J v is subtracted. Each costs one vjp of g. This is for evaluation: it
        reduces the noise of the value, and the Neumann gradient does not change. Choose 2 or 4 if they are Hadamard
        probes: their errors then cancel among neighbours. 1 gains nothing.
      second_order: whether the Neumann gradient can itself be differentiated in reverse mode (`jax.grad` of
        `jax.grad`), unbiased and with constant memory, as for Hessian-vector products in score matching or a Laplace
        approximation. It costs another series and six evaluations of g, more for a monotone map. Forward mode then
        raises an error, also over reverse mode.

    Raises:
      ValueError: for a length without the methods of `LengthLaw`, a count that is too small, an unknown probe or
        gradient, second_order or subsample > 1 with gradient="autodiff", and trace_probes without exact terms.

    Example:
      >>> estimator = rf.Roulette(rf.Geometric(0.5), exact_terms=2, probes=4)
      >>> g = lambda w, x: jnp.sin(x @ w)
      >>> w, x = 0.5 * jnp.eye(3), jnp.ones((8, 3))
      >>> loss = lambda w, key: -rf.residual(g, w, x, key=key, estimator=estimator)[1].mean()
      >>> jax.grad(loss)(w, jax.random.key(0)).shape
      (3, 3)
    """

    length: Law = Defensive(0.4)
    exact_terms: int = 3
    samples: int = 1
    probe: Probe = "hadamard"
    gradient: Gradient = "neumann"
    minres_steps: int | None = field(default=None, kw_only=True)
    probes: int = field(default=1, kw_only=True)
    subsample: int | None = field(default=None, kw_only=True)
    trace_probes: int = field(default=0, kw_only=True)
    second_order: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        check_law("length", self.length)
        check_count("exact_terms", self.exact_terms, 0)
        if self.minres_steps is not None:
            check_count("minres_steps", self.minres_steps, 0)
        check_count("samples", self.samples, 1)
        if self.subsample is not None:
            check_count("subsample", self.subsample, 1)
        check_count("trace_probes", self.trace_probes, 0)
        if self.trace_probes and not self.exact_terms:
            raise ValueError(f"trace_probes: expected 0 without exact terms, got {self.trace_probes}")
        check_flag("second_order", self.second_order)
        _check_common(self)
        if self.second_order and self.gradient != "neumann":
            raise ValueError(f'second_order: expected False with gradient="{self.gradient}", got True')
        if self.subsample not in (None, 1) and self.gradient != "neumann":
            raise ValueError(f'subsample: expected 1 with gradient="{self.gradient}", got {self.subsample}')


_ROULETTE_SETTINGS = (
    "exact_terms",
    "minres_steps",
    "samples",
    "probe",
    "probes",
    "subsample",
    "trace_probes",
    "gradient",
    "second_order",
)


def _flatten_roulette(roulette: Roulette) -> tuple[Any, Any]:
    """The law is a child if its class is a pytree; otherwise it is part of the static structure."""
    settings = tuple(getattr(roulette, name) for name in _ROULETTE_SETTINGS)
    law = as_tree(roulette.length)
    return ((), (law, settings)) if isinstance(law, Opaque) else ((law,), (None, settings))


def _flatten_roulette_with_keys(roulette: Roulette) -> tuple[Any, Any]:
    children, structure = _flatten_roulette(roulette)
    return tuple((GetAttrKey("length"), child) for child in children), structure


def _unflatten_roulette(structure: Any, children: Any) -> Roulette:
    law, settings = structure
    made = object.__new__(Roulette)  # not checked: JAX may replace a leaf by any object
    for name, value in zip(_ROULETTE_SETTINGS, settings, strict=True):
        object.__setattr__(made, name, value)
    object.__setattr__(made, "length", children[0] if law is None else original(law))
    return made


jax.tree_util.register_pytree_with_keys(
    Roulette, _flatten_roulette_with_keys, _unflatten_roulette, flatten_func=_flatten_roulette
)


class CustomEstimator(Protocol):
    """Interface of a user's estimator: any object with the method `estimate`; no base class is needed.

    JAX differentiates `estimate` by its usual rules, in any mode and order. The object is traced if its class is a
    pytree; otherwise it is a constant of the compiled program, and must not change. If it has an attribute `needs_key`
    that is False, `residual` takes no key; otherwise a missing key is an error. `chunk_size` of `residual` does not
    apply. The library checks neither its bias nor its
    cost.

    Example:
      >>> class FirstOrder:   # log|det(I + J)| ~ tr J, biased; D vjps of g
      ...     needs_key = False
      ...     def estimate(self, g, x, key):
      ...         g_x, pullback = jax.vjp(g, x)
      ...         rows = [pullback(jnp.zeros_like(x).at[:, i].set(1))[0][:, i] for i in range(x.shape[1])]
      ...         return x + g_x, sum(rows)
      >>> y, log_det = rf.residual(lambda w, x: w * x, 0.5, jnp.ones((2, 3)), estimator=FirstOrder())
      >>> log_det.tolist()
      [1.5, 1.5]
    """

    def estimate(self, g: Callable[[jax.Array], jax.Array], x: jax.Array, key: jax.Array | None) -> Any:
        """Returns (y, log_det): y = x + g(x) like x, and an estimate of log|det dy/dx| [B] in nats, in x's dtype.

        Args:
          g: the residual map, with its parameters and its condition bound. It takes only arrays of x's shape and dtype;
            use `jax.vmap` of it, of its vjp or of its jvp for several.
          x: floats [B, ...]; rows [B, D] if the events are pytrees.
          key: the key that `residual` was called with.
        """


Estimator = Exact | Truncated | Roulette | CustomEstimator


def is_custom(estimator: Any) -> bool:
    """Whether an estimator is a user's own, not one of this module."""
    return not isinstance(estimator, Exact | Truncated | Roulette)


def is_series(estimator: Any) -> bool:
    """Whether an estimator sums a series with random probes."""
    return isinstance(estimator, Truncated | Roulette)


def subsampling(estimator: Estimator) -> int:
    """The r of `Roulette.subsample` for a batch that it divides; 1 for other estimators."""
    estimator = original(estimator)
    if not isinstance(estimator, Roulette):
        return 1
    if estimator.subsample is not None:
        return estimator.subsample
    exact_terms, minres_steps = estimator.exact_terms, estimator.minres_steps
    steps = exact_terms if minres_steps is None else min(exact_terms, minres_steps)
    return _DEFAULT_SUBSAMPLE if estimator.gradient == "neumann" and steps >= 2 else 1


def fit_law(estimator: Roulette, term_norms: jax.Array, batch_size: int) -> Fitted:
    """The result of `fit_lengths` for the terms after the exact ones, from the norms [..., K] of all terms.

    Costs are counted in further terms, each of which costs 1 / r vjps of the whole batch.
    """
    cost = subsampling(estimator) * (4.0 + estimator.exact_terms + estimator.trace_probes)
    return fit_lengths(term_norms[..., estimator.exact_terms :], batch_size=batch_size, fixed_cost=cost)


def reverse_orders(estimator: Estimator) -> int:
    """The orders of reverse mode of an estimator in constant memory, 1 or 2; 0 if JAX differentiates it itself."""
    estimator = original(estimator)
    if not is_series(estimator) or estimator.gradient != "neumann":
        return 0
    return 2 if getattr(estimator, "second_order", False) else 1


def needs_key(estimator: Estimator) -> bool:
    """Whether the estimator needs a PRNG key."""
    estimator = original(estimator)
    return not isinstance(estimator, Exact) and (not is_custom(estimator) or getattr(estimator, "needs_key", True))


def check_estimator(estimator: Estimator) -> None:
    """Raises ValueError if this is not an estimator, or if its length distribution has invalid values."""
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
    """The estimator for a chain of residual blocks: a pytree whose arrays have one row for each block.

    Raises:
      ValueError: if the table of a `Fitted` law already has another number of rows.
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
