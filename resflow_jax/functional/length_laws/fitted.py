"""A length distribution whose survival probabilities P(N >= k) come from a table."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_count, check_open_interval
from resflow_jax.functional.length_laws.draws import random_bits, uniform
from resflow_jax.functional.length_laws.protocol import UNKNOWN_LIPSCHITZ
from resflow_jax.functional.primitives.precision import wide_dtype

Array = jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=("table",), meta_fields=("lipschitz",))
@dataclass(frozen=True, eq=False)
class Fitted:
    """A length distribution given by a table of P(N >= k) for k <= K, with a geometric tail. `fit_lengths` makes it.

        P(N >= k) = table[k - 1] for 1 <= k <= K,     P(N >= K + j) = table[K - 1] * L^j

    The table is a pytree leaf: it may be traced, and new values do not recompile. A table with one row for each
    residual block is for a whole flow.

    The distribution is safe for every g with Lip(g) <= L: the variance of the estimate is then finite, as for
    `Defensive`.

    Attributes:
      table: P(N >= k) for k = 1..K, positive and non-increasing: floats [K] or [blocks, K].
      lipschitz: L, strictly between 0 and 1. None takes the bound of the residual block where it is used, or
        0.98 if none is known.

    Raises:
      ValueError: if `lipschitz` is not in (0, 1). `check` tests the table where it is used.

    Example:
      >>> law = rf.Fitted(jnp.array([0.5, 0.1]), lipschitz=0.5)
      >>> [round(float(law.survival(k)), 3) for k in (0, 1, 2, 3)]
      [1.0, 0.5, 0.1, 0.05]
      >>> law.sample(jax.random.key(0), (4,)).shape
      (4,)
    """

    table: Array
    lipschitz: float | None = None

    def __post_init__(self):
        if self.lipschitz is not None:
            check_open_interval("lipschitz", self.lipschitz, 0, 1)

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws independent lengths, int32 of `shape`; it works under jit and vmap."""
        return self.from_bits(random_bits(key, shape))

    def from_bits(self, bits: Array) -> Array:
        """Independent lengths, int32 [...], from random words, uint32 [2, ...]."""
        table = self._wide_table()
        u = uniform(bits).astype(table.dtype)
        inside = jnp.sum(u[..., None] < table.reshape(*[1] * u.ndim, -1), axis=-1, dtype=jnp.int32)
        # N >= K + j where u < P(N >= K) * L^j
        after = jnp.ceil(jnp.log(u / table[-1]) / math.log(self.tail_ratio())) - 1
        return inside + jnp.maximum(after, 0).astype(jnp.int32)

    def survival(self, k: Array | int) -> Array:
        """P(N >= k), floats of k's shape; 1 for k <= 0."""
        k, table, size = jnp.asarray(k), self._wide_table(), self.table.shape[-1]
        after = jnp.exp(jnp.maximum(k - size, 0).astype(table.dtype) * math.log(self.tail_ratio()))
        return jnp.where(k <= 0, 1.0, table[jnp.clip(k - 1, 0, size - 1)] * after)

    def _wide_table(self) -> Array:
        """The table in at least 32 bits: a uniform number in 16 bits would round to 1, or repeat itself."""
        table = jnp.asarray(self.table)
        return table.astype(wide_dtype(table.dtype))

    def tail_ratio(self) -> float:
        """The limit of P(N >= k + 1) / P(N >= k) for large k: L."""
        return UNKNOWN_LIPSCHITZ if self.lipschitz is None else self.lipschitz

    def check(self) -> None:
        """Raises ValueError unless the table is a float array of survival probabilities. Traced values are not read."""
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
        """The law for a g with this Lipschitz constant, which replaces an unset `lipschitz` of the law.

        Raises:
          ValueError: if the table has rows for several residual blocks.
        """
        if self.table.ndim != 1:
            raise ValueError(f"table: expected probabilities [K] of one residual block, got shape {self.table.shape}")
        return Fitted(self.table, lipschitz) if self.lipschitz is None else self

    def with_rows(self, blocks: int) -> "Fitted":
        """The law with one table row for each residual block; ValueError if it already has another number of rows."""
        check_count("blocks", blocks, 0)
        table = jnp.asarray(self.table)
        if table.ndim == 1:
            table = jnp.broadcast_to(table[None], (blocks, table.size))
        if table.shape[0] != blocks:
            raise ValueError(f"estimator: expected a table with {blocks} rows, one a block, got shape {table.shape}")
        return Fitted(table, self.lipschitz)

    def upper_bound(self) -> "Fitted":
        """A law with larger P(N >= k) and no traced array: its table has the same size and is all ones."""
        return Fitted(np.ones(self.table.shape[-1]), self.lipschitz)
