"""Laws of the random length N of a Russian-roulette series: sample, P(N >= k), and whether they are safe.

`LengthLaw` says what a law is; those of this module are some, and a user's own object with these methods is another.

Lengths are drawn from 64 random bits, in every float dtype: those of a probability below 2^-64 never come up.

An estimate whose terms decay like L^k, L the Lipschitz constant of g, has finite variance for
certain only if

    sum_k L^(2k) / P(N >= k) < infinity,

that is if the tail of N falls more slowly than L^(2k) (Rhee & Glynn 2015, theorem 1). A geometric
law needs 1 - p > L^2; the tail of a Poisson law falls faster than any geometric series.
"""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_open_interval

Array = jax.Array

_static = partial(jax.tree_util.register_dataclass, data_fields=())
# For g of unknown Lipschitz constant: that of a single layer of the default coefficient.
_LIPSCHITZ = 0.98


class LengthLaw(Protocol):
    """What `Roulette(length=...)` takes: any object with these three methods; no base class is needed.

    An object whose class is a pytree, as of `jax.tree_util.register_dataclass` or a NamedTuple, is traced: its leaves
    may be arrays that change from call to call. Any other object is a constant of the compiled program, and must not
    change. Objects of the same value are one constant if they can be hashed.

    Three more methods are optional.

      within(lipschitz) -> law: the law for a g of that Lipschitz constant, or of an unknown one for None.
      upper_bound() -> law: one with P(N >= k) at least as large, of no traced arrays; gradient="autodiff" asks it how
        long a series can be, where the arrays of the law itself are traced.
      check(): raises ValueError if the values of the law are wrong. It is called before a law is used.
    """

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws lengths N >= 0, integers of `shape`, with a PRNG key; in jit and vmap too."""

    def survival(self, k: Array) -> Array:
        """P(N >= k) > 0, floats of the shape of the integers k >= 1. The estimate is biased if these are not right."""

    def tail_ratio(self) -> float:
        """lim P(N >= k + 1) / P(N >= k), for the warning of infinite variance: 1 for a tail of powers of k."""


def check_law(name: str, law: Any) -> None:
    """Raises ValueError unless the law has the methods of `LengthLaw`; the message says which are missing."""
    missing = [method for method in _METHODS if not callable(getattr(law, method, None))]
    if isinstance(law, type):
        raise ValueError(f"{name}: expected a law of lengths, got the class {law.__name__}; make one of it")
    if missing:
        raise ValueError(
            f"{name}: expected Defensive, Geometric, Poisson or Fitted, or an object with the methods "
            f"{', '.join(_METHODS)}; got {law!r} without {', '.join(missing)}"
        )


_METHODS = ("sample", "survival", "tail_ratio")


def check_values(law: LengthLaw) -> None:
    """Asks a law that can check itself to do so."""
    if callable(check := getattr(law, "check", None)):
        check()


@partial(_static, meta_fields=("p",))
@dataclass(frozen=True)
class Geometric:
    """P(N >= k) = (1 - p)^(k - 1) for k >= 1, mean 1 / p: at least one term is always drawn.

    The estimate's variance is finite if its terms decay faster than (1 - p)^(k/2).

    Raises:
      ValueError: unless 0 < p < 1.
    """

    p: float = 0.5

    def __post_init__(self):
        check_open_interval("p", self.p, 0, 1)

    @classmethod
    def for_lipschitz(cls, lipschitz: float) -> "Geometric":
        """The law 1 - p = L, of mean 1 / (1 - L): variance is finite for every g with Lip(g) <= L.

        `Defensive` has the same guarantee at a far smaller mean.
        """
        check_open_interval("lipschitz", lipschitz, 0, 1)
        return cls(1 - lipschitz)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws lengths, int32 of `shape`, inside or outside jit."""
        return _draw_geometric(_uniform(key, shape), math.log1p(-self.p))

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), a float of k's shape; one for k <= 1."""
        return _geometric_survival(math.log1p(-self.p), k)

    def tail_ratio(self) -> float:
        """lim P(N >= k + 1) / P(N >= k)."""
        return 1 - self.p

    def within(self, lipschitz: float | None) -> "Geometric":
        """The law to use for a g of that Lipschitz constant: this one."""
        return self


@partial(_static, meta_fields=("rate",))
@dataclass(frozen=True)
class Poisson:
    """P(N >= k) of the Poisson law of mean `rate` on {0, 1, ...}: the papers' choice, with rate 2.

    Its tail falls faster than that of any geometric series, so the estimate's variance is
    infinite unless the series ends; see `Defensive`.

    Raises:
      ValueError: unless rate is positive and finite.
    """

    rate: float = 2.0

    def __post_init__(self):
        check_open_interval("rate", self.rate, 0, math.inf)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws lengths, int32 of `shape`, inside or outside jit: N = #{k >= 1: u < P(N >= k)} for a uniform u."""
        table = self._table[1:].reshape(*[1] * len(shape), -1)
        return jnp.sum(_uniform(key, shape)[..., None] < table, axis=-1, dtype=jnp.int32)

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), a float of k's shape; one for k <= 0. From a table down to 1e-300, in float32 zero below 1e-38."""
        return jnp.asarray(self._table)[jnp.clip(k, 0, len(self._table) - 1)]

    @property
    def _table(self) -> np.ndarray:
        # JAX keeps an array that it has met, also where float64 has been switched off since.
        return np.asarray(_poisson_survival(self.rate), jnp.result_type(float))

    def tail_ratio(self) -> float:
        """lim P(N >= k + 1) / P(N >= k)."""
        return 0.0

    def within(self, lipschitz: float | None) -> "Poisson":
        """The law to use for a g of that Lipschitz constant: this one."""
        return self


@lru_cache
def _poisson_survival(rate: float) -> np.ndarray:
    """P(N >= k) for k = 0, 1, ... down to 1e-300: sums of the tail's terms, which do not cancel."""
    terms, log_term = [], -rate
    while log_term > -700 or len(terms) < rate:
        terms.append(math.exp(log_term))
        log_term += math.log(rate / len(terms))
    survival = np.cumsum(terms[::-1])[::-1]
    return np.where(np.arange(len(terms)) == 0, 1.0, survival)


@partial(_static, meta_fields=("p", "share", "lipschitz"))
@dataclass(frozen=True)
class Defensive:
    """A short geometric law mixed with a little of one that is long enough for the Lipschitz bound L.

        P(N >= k) = (1 - share) (1 - p)^(k-1) + share * L^(k-1),   mean (1 - share) / p + share / (1 - L)

    (with 1 - p in the place of L where that is larger). The variance is finite for every g with
    Lip(g) <= L, since L^(2k) / L^k is summable, while the cost is close to that of Geometric(p).
    Defensive mixtures: Hesterberg (1995, Technometrics 37).

    Attributes:
      p: of the short law.
      share: mixture weight of the long law.
      lipschitz: L; by default the bound of the residual block where the law is used, or 0.98 where
        none is known.
    """

    p: float = 0.5
    share: float = 0.01
    lipschitz: float | None = None

    def __post_init__(self):
        check_open_interval("p", self.p, 0, 1)
        check_open_interval("share", self.share, 0, 1)
        if self.lipschitz is not None:
            check_open_interval("lipschitz", self.lipschitz, 0, 1)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws lengths, int32 of `shape`, inside or outside jit."""
        choice, length = _uniform(key, (2, *shape))
        return _draw_geometric(length, jnp.where(choice < self.share, math.log(self.tail_ratio()), math.log1p(-self.p)))

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), a float of k's shape; one for k <= 1."""
        long = _geometric_survival(math.log(self.tail_ratio()), k)
        return (1 - self.share) * _geometric_survival(math.log1p(-self.p), k) + self.share * long

    def tail_ratio(self) -> float:
        """lim P(N >= k + 1) / P(N >= k)."""
        return max(_LIPSCHITZ if self.lipschitz is None else self.lipschitz, 1 - self.p)

    def within(self, lipschitz: float | None) -> "Defensive":
        """The law to use for a g of that Lipschitz constant: with its own, if it has one."""
        return Defensive(self.p, self.share, lipschitz) if self.lipschitz is None else self


@partial(jax.tree_util.register_dataclass, data_fields=("table",), meta_fields=("lipschitz",))
@dataclass(frozen=True, eq=False)
class Fitted:
    """P(N >= k) from a table for k <= K, and falling like L^k behind it. Made by `fit_lengths`.

    A pytree with the table as its leaf: it may be traced, and change without recompiling. With a
    leading axis, one row a residual block, it is the law of a whole flow.

    Attributes:
      table: P(N >= k) for k = 1..K, positive, not increasing: floats [K] or [blocks, K].
      lipschitz: L, as in `Defensive`.
    """

    table: Array
    lipschitz: float | None = None

    def __post_init__(self):
        if self.lipschitz is not None:
            check_open_interval("lipschitz", self.lipschitz, 0, 1)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws lengths, int32 of `shape`, inside or outside jit."""
        table = jnp.asarray(self.table)
        u = _uniform(key, shape).astype(table.dtype)
        inside = jnp.sum(u[..., None] < table.reshape(*[1] * len(shape), -1), axis=-1, dtype=jnp.int32)
        # N >= K + j where u < P(N >= K) * L^j
        after = jnp.ceil(jnp.log(u / table[-1]) / math.log(self.tail_ratio())) - 1
        return inside + jnp.maximum(after, 0).astype(jnp.int32)

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), a float of k's shape; one for k <= 0."""
        k, table, size = jnp.asarray(k), jnp.asarray(self.table), self.table.shape[-1]
        after = jnp.exp(jnp.maximum(k - size, 0).astype(table.dtype) * math.log(self.tail_ratio()))
        return jnp.where(k <= 0, 1.0, table[jnp.clip(k - 1, 0, size - 1)] * after)

    def tail_ratio(self) -> float:
        """lim P(N >= k + 1) / P(N >= k)."""
        return _LIPSCHITZ if self.lipschitz is None else self.lipschitz

    def check(self) -> None:
        """Raises ValueError unless the table is a float array of survival probabilities (if it is not traced)."""
        table, expected = self.table, "table: expected probabilities P(N >= 1..K) in (0, 1] that do not increase"
        if not isinstance(table, jax.Array | np.ndarray) or not jnp.issubdtype(table.dtype, jnp.floating):
            raise ValueError(f"{expected}, a float array, got {table!r}")
        if table.ndim not in (1, 2) or not table.size:
            raise ValueError(f"{expected}, of shape [K] or [blocks, K], got shape {table.shape}")
        if isinstance(table, jax.core.Tracer):
            return
        if not (np.asarray(table) > 0).all() or not (np.diff(table, prepend=1.0) <= 0).all():
            raise ValueError(f"{expected}, got {table}")

    def within(self, lipschitz: float | None) -> "Fitted":
        """The law to use for a g of that Lipschitz constant: with its own, if it has one.

        Raises:
          ValueError: for a table of several residual blocks, which is no law of one.
        """
        if self.table.ndim != 1:
            raise ValueError(f"table: expected probabilities [K] of one residual block, got shape {self.table.shape}")
        return Fitted(self.table, lipschitz) if self.lipschitz is None else self

    def with_rows(self, blocks: int) -> "Fitted":
        """With one row a residual block; ValueError for a table of another number of rows."""
        table = jnp.asarray(self.table)
        if table.ndim == 1:
            table = jnp.broadcast_to(table[None], (blocks, table.size))
        if table.shape[0] != blocks:
            raise ValueError(f"estimator: expected a table with {blocks} rows, one a block, got shape {table.shape}")
        return Fitted(table, self.lipschitz)

    def upper_bound(self) -> "Fitted":
        """The law of a table of ones, of the same size."""
        return Fitted(np.ones(self.table.shape[-1]), self.lipschitz)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform floats in (0, 1) of 64 random bits: events of probability 2^-64 come up as often as they should.

    With the 23 bits of `jax.random.uniform` in float32 no Geometric(0.5) would be longer than 24.
    """
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32).astype(jnp.result_type(float))
    u = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


def _draw_geometric(u: Array, log_ratio: Array | float) -> Array:
    """The N with P(N >= k) = ratio^(k - 1) at uniform numbers u: N >= k where u < ratio^(k - 1).

    From the logarithm, since a ratio near one is rounded to it in float32. Lengths end at 2^30.
    """
    return jnp.clip(jnp.ceil(jnp.log(u) / jnp.asarray(log_ratio, u.dtype)), 1, 2.0**30).astype(jnp.int32)


def _geometric_survival(log_ratio: float, k: Array | int) -> Array:
    exponent = jnp.maximum(jnp.asarray(k) - 1, 0).astype(jnp.result_type(float))
    return jnp.exp(exponent * log_ratio)


# The laws by name beside the protocol: command lines have an option for each of their settings.
Law = Geometric | Poisson | Defensive | Fitted | LengthLaw


def law_within(law: LengthLaw, lipschitz: float | None) -> LengthLaw:
    """The law for a g of that Lipschitz constant, with a warning where it is not safe for it."""
    if callable(getattr(law, "within", None)):
        law = law.within(lipschitz)
    if lipschitz is not None:
        check_variance(law, lipschitz)
    return law


def check_variance(law: LengthLaw, lipschitz: float) -> None:
    """A RuntimeWarning if the variance may be infinite for some g with Lip(g) <= lipschitz."""
    ratio = law.tail_ratio()
    if not isinstance(ratio, jax.core.Tracer) and not ratio > lipschitz**2:
        warnings.warn(
            f"length: {law} gives the estimate infinite variance for some g of Lipschitz constant up to "
            f"{lipschitz:.4g}: its tail falls like {float(ratio):.4g}^k, and {lipschitz**2:.4g}^k or slower is "
            "safe; Defensive() is",
            RuntimeWarning,
            stacklevel=2,
        )
