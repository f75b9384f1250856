"""A pass through a flow without log-dets, as a classifier needs it, and the refusal of log-dets that do not exist.

Some layers of classifiers are not bijections: zeros appended to x, blocks without a bound on their Lipschitz constant,
strided convolutions. They take part in a pass without log-dets, and raise an error in every other pass.
"""

from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from resflow_jax.functional.batch_axes import example_keys
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.opaque import original
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.bijector import Bijector, Forward, InverseAndLogDet, no_log_det

Array = jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("dropout",))
@dataclass(frozen=True)
class WithoutLogDet:
    """Used instead of an estimator: y = x + dropout(g(x)), and zeros for the log-det.

    Attributes:
      dropout: probability, in [0, 1), with which each element of g(x) is set to zero; the others are divided by
        1 - dropout (Srivastava et al. 2014, JMLR 15). Each example draws with its own key.

    Raises:
      ValueError: for a dropout outside of [0, 1).
    """

    dropout: float = 0.0

    def __post_init__(self):
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout!r}")

    @property
    def needs_key(self) -> bool:
        return self.dropout > 0

    def estimate(self, g: Any, x: Array, key: Array | None) -> tuple[Array, Array]:
        """y like x, and zeros [B]; see `CustomEstimator`."""
        return x + self.dropped(g(x), key), no_log_det(x)

    def dropped(self, g_x: Array, key: Array | None) -> Array:
        """dropout(g(x)) of g(x) [B, ...]."""
        if not self.dropout:
            return g_x
        keep = partial(jax.random.bernoulli, p=1 - self.dropout, shape=g_x.shape[1:])
        return jnp.where(jax.vmap(keep)(example_keys(key, g_x)), g_x / (1 - self.dropout), 0)


def has_dropout(estimator: Estimator) -> bool:
    """Whether an estimator stands for a pass with dropout."""
    without = original(estimator)
    return isinstance(without, WithoutLogDet) and without.dropout > 0


def refuse_dropout(layer: Bijector, estimator: Estimator) -> None:
    """Raises ValueError for a pass with dropout through a layer whose residual blocks do not add g(x) to x."""
    if has_dropout(estimator):
        expected = f"0 with {type(layer).__name__} inside, whose map is a solve, which dropout would change"
        raise ValueError(f"dropout: expected {expected}, got {original(estimator).dropout}")


class NoBijection(Bijector):
    """Interface of layers that have no log-det. A subclass defines `__call__`, `passed` and `invert` or `solve`.

    Attributes:
      reason: the reason why there is no log-det, for the error.
    """

    reason: str

    @property
    def no_density(self) -> str:
        return f"{type(self).__name__}: {self.reason}"

    def passed(self, x: Array, key: Array | None, without: WithoutLogDet) -> Array:
        """f(x) in a pass without log-dets, with its dropout."""
        return self(x)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        raise self._refusal()

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        without = original(estimator)
        if not isinstance(without, WithoutLogDet):
            raise self._refusal()
        return self.passed(x, key, without), no_log_det(x), []

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError(f"{type(self).__name__}: expected a pass without log-det or density, since {self.reason}")
