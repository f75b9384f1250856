"""Length distributions with closed-form survival probabilities: geometric, Poisson, and a defensive mixture."""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_open_interval
from resflow_jax.functional.length_laws.draws import (
    draw_geometric,
    event_and_uniform,
    random_bits,
    uniform,
)
from resflow_jax.functional.length_laws.protocol import UNKNOWN_LIPSCHITZ

Array = jax.Array

_static = partial(jax.tree_util.register_dataclass, data_fields=())


@partial(_static, meta_fields=("p",))
@dataclass(frozen=True)
class Geometric:
    """The geometric distribution on {1, 2, ...}: P(N >= k) = (1 - p)^(k - 1), with mean 1 / p.

    At least one term is drawn. The estimate's variance is finite if its terms decay faster than (1 - p)^(k/2): for
    every g with Lip(g) <= L if p < 1 - L^2. `Defensive` guarantees this with a much smaller mean.

    Attributes:
      p: probability of ending after each term, in (0, 1).

    Raises:
      ValueError: unless 0 < p < 1.

    Example:
      >>> law = rf.Geometric(0.5)
      >>> [float(law.survival(k)) for k in (1, 2, 3)]
      [1.0, 0.5, 0.25]
      >>> lengths = law.sample(jax.random.key(0), (1000,))
      >>> lengths.dtype.name, bool(abs(lengths.mean() - 2) < 0.2)
      ('int32', True)
    """

    p: float = 0.5

    def __post_init__(self):
        check_open_interval("p", self.p, 0, 1)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws independent lengths, int32 of `shape`; it works under jit and vmap."""
        return self.from_bits(random_bits(key, shape))

    def from_bits(self, bits: Array) -> Array:
        """Independent lengths, int32 [...], from random words, uint32 [2, ...]."""
        return draw_geometric(uniform(bits), math.log1p(-self.p))

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), floats of k's shape; 1 for k <= 1."""
        return _geometric_survival(math.log1p(-self.p), k)

    def tail_ratio(self) -> float:
        """The limit of P(N >= k + 1) / P(N >= k) for large k."""
        return 1 - self.p

    def within(self, lipschitz: float | None) -> "Geometric":
        """The law for a g with this Lipschitz constant: the same law."""
        return self


@partial(_static, meta_fields=("rate",))
@dataclass(frozen=True)
class Poisson:
    """The Poisson distribution on {0, 1, ...} with mean `rate`; Chen et al. (2019, arXiv 1906.02735) use rate 2.

    Its tail falls faster than every geometric series. So the estimate's variance is infinite, unless the terms of the
    series fall as fast or end; `Defensive` does not have this problem.

    Attributes:
      rate: mean of N, positive.

    Raises:
      ValueError: unless rate is positive and finite.

    Example:
      >>> law = rf.Poisson(2.0)
      >>> [round(float(law.survival(k)), 4) for k in (0, 1, 2)]   # 1, 1 - exp(-2), 1 - 3 exp(-2)
      [1.0, 0.8647, 0.594]
    """

    rate: float = 2.0

    def __post_init__(self):
        check_open_interval("rate", self.rate, 0, math.inf)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws independent lengths, int32 of `shape`; it works under jit and vmap."""
        return self.from_bits(random_bits(key, shape))

    def from_bits(self, bits: Array) -> Array:
        """Independent lengths, int32 [...], from random words, uint32 [2, ...].

        They are found by inversion: N = #{k >= 1: u < P(N >= k)} for a uniform u.
        """
        u = uniform(bits)[..., None]
        return jnp.sum(u < self._table[1:].reshape(*[1] * (u.ndim - 1), -1), axis=-1, dtype=jnp.int32)

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), floats of k's shape; 1 for k <= 0. From a table down to 1e-300; in float32 zero below 1e-38."""
        return jnp.asarray(self._table)[jnp.clip(k, 0, len(self._table) - 1)]

    @property
    def _table(self) -> np.ndarray:
        # The dtype is chosen at every use, because float64 may have been switched on or off since.
        return np.asarray(_poisson_survival(self.rate), jnp.result_type(float))

    def tail_ratio(self) -> float:
        """The limit of P(N >= k + 1) / P(N >= k) for large k."""
        return 0.0

    def within(self, lipschitz: float | None) -> "Poisson":
        """The law for a g with this Lipschitz constant: the same law."""
        return self


@lru_cache
def _poisson_survival(rate: float) -> np.ndarray:
    """P(N >= k) for k = 0, 1, ... down to 1e-300, as sums of the positive terms of the tail."""
    terms, log_term = [], -rate
    while log_term > -700 or len(terms) < rate:
        terms.append(math.exp(log_term))
        log_term += math.log(rate / len(terms))
    survival = np.cumsum(terms[::-1])[::-1]
    return np.where(np.arange(len(terms)) == 0, 1.0, survival)


@partial(_static, meta_fields=("p", "share", "lipschitz"))
@dataclass(frozen=True)
class Defensive:
    """A mixture of a short geometric distribution with a small weight of a long one: finite variance at a low cost.

        P(N >= k) = (1 - share) (1 - p)^(k-1) + share * L^(k-1),   mean (1 - share) / p + share / (1 - L)

    L is replaced by 1 - p if that is larger. The variance is finite for every g with Lip(g) <= L, since L^(2k) / L^k is
    summable, and the cost is close to that of Geometric(p). Source: defensive mixtures, Hesterberg (1995,
    Technometrics 37). With p = 0.4 it is the default of `Roulette`.

    Attributes:
      p: parameter of the short distribution, in (0, 1).
      share: mixture weight of the long distribution, in (0, 1).
      lipschitz: L, in (0, 1). None takes the bound of the residual block where the distribution is used, or 0.98 if
        none is known.

    Raises:
      ValueError: if a setting is outside of (0, 1).

    Example:
      >>> law = rf.Defensive(p=0.5, share=0.01, lipschitz=0.9)
      >>> [round(float(law.survival(k)), 3) for k in (1, 2, 3)], law.tail_ratio()
      ([1.0, 0.504, 0.256], 0.9)
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
        """Draws independent lengths, int32 of `shape`; it works under jit and vmap."""
        return self.from_bits(random_bits(key, shape))

    def from_bits(self, bits: Array) -> Array:
        """Independent lengths, int32 [...], from random words, uint32 [2, ...]."""
        is_long, u = event_and_uniform(bits, self.share)
        return draw_geometric(u, jnp.where(is_long, math.log(self.tail_ratio()), math.log1p(-self.p)))

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), floats of k's shape; 1 for k <= 1."""
        long = _geometric_survival(math.log(self.tail_ratio()), k)
        return (1 - self.share) * _geometric_survival(math.log1p(-self.p), k) + self.share * long

    def tail_ratio(self) -> float:
        """The limit of P(N >= k + 1) / P(N >= k) for large k."""
        return max(UNKNOWN_LIPSCHITZ if self.lipschitz is None else self.lipschitz, 1 - self.p)

    def within(self, lipschitz: float | None) -> "Defensive":
        """The law for a g with this Lipschitz constant, which replaces an unset `lipschitz` of the law."""
        return Defensive(self.p, self.share, lipschitz) if self.lipschitz is None else self


def _geometric_survival(log_ratio: float, k: Array | int) -> Array:
    exponent = jnp.maximum(jnp.asarray(k) - 1, 0).astype(jnp.result_type(float))
    return jnp.exp(exponent * log_ratio)
