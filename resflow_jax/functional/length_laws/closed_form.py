"""Laws of lengths with P(N >= k) in closed form: geometric, Poisson, and a defensive mixture."""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_open_interval
from resflow_jax.functional.length_laws.draws import UNKNOWN_LIPSCHITZ, draw_geometric, uniform

Array = jax.Array

_static = partial(jax.tree_util.register_dataclass, data_fields=())


@partial(_static, meta_fields=("p",))
@dataclass(frozen=True)
class Geometric:
    """P(N >= k) = (1 - p)^(k - 1) for k >= 1, mean 1 / p: at least one term is always drawn.

    The estimate's variance is finite if its terms decay faster than (1 - p)^(k/2): for every g with Lip(g) <= L if
    p < 1 - L^2. `Defensive` guarantees it at a far smaller mean.

    Raises:
      ValueError: unless 0 < p < 1.
    """

    p: float = 0.5

    def __post_init__(self):
        check_open_interval("p", self.p, 0, 1)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws lengths, int32 of `shape`, inside or outside jit."""
        return draw_geometric(uniform(key, shape), math.log1p(-self.p))

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
        return jnp.sum(uniform(key, shape)[..., None] < table, axis=-1, dtype=jnp.int32)

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
        choice, length = uniform(key, (2, *shape))
        return draw_geometric(length, jnp.where(choice < self.share, math.log(self.tail_ratio()), math.log1p(-self.p)))

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), a float of k's shape; one for k <= 1."""
        long = _geometric_survival(math.log(self.tail_ratio()), k)
        return (1 - self.share) * _geometric_survival(math.log1p(-self.p), k) + self.share * long

    def tail_ratio(self) -> float:
        """lim P(N >= k + 1) / P(N >= k)."""
        return max(UNKNOWN_LIPSCHITZ if self.lipschitz is None else self.lipschitz, 1 - self.p)

    def within(self, lipschitz: float | None) -> "Defensive":
        """The law to use for a g of that Lipschitz constant: with its own, if it has one."""
        return Defensive(self.p, self.share, lipschitz) if self.lipschitz is None else self


def _geometric_survival(log_ratio: float, k: Array | int) -> Array:
    exponent = jnp.maximum(jnp.asarray(k) - 1, 0).astype(jnp.result_type(float))
    return jnp.exp(exponent * log_ratio)
