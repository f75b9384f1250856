"""The interface of an invertible layer, and the chain that composes layers.

A bijector maps x to y = f(x) and knows log|det dy/dx|. Estimator, key and solver are passed
where they are used; a layer with a closed form takes and ignores them, so that every layer is
called alike. log-dets are in nats, of shape [B], of the forward direction, and added. An estimator
may hold arrays with one row a residual block (the law `Fitted`); every layer is given its own rows.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.logdet import Diagnostics
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.module import List, Module

Array = jax.Array
Forward = tuple[Array, Array, list[Diagnostics]]
Inverse = tuple[Array, list[InverseStatus]]
Blocks = TypeVar("Blocks", Diagnostics, InverseStatus)


class Constant(nnx.Variable):
    """An array that is fixed when its layer is made or initialised: state that no training changes."""


class Bijector(Module):
    """Interface of an invertible layer on [B, ...]; subclasses are final.

    Attributes:
      blocks: number of residual blocks inside.
      takes_noise: whether `forward` draws random numbers with its key.
    """

    blocks: int = 0
    takes_noise: bool = False

    def __call__(self, x: Array) -> Array:
        """y = f(x), without the log-det."""
        raise NotImplementedError

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        """(y, log_det, diagnostics): y = f(x) and log|det dy/dx| [B], exact or estimated with `key`.

        The diagnostics of all residual blocks in order, in one or more parts with leading axes.
        """
        raise NotImplementedError

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        """(x, statuses) with f(x) = y.

        The statuses of all residual blocks in the order of `forward`, in parts with leading axes.
        """
        raise NotImplementedError

    def initialize(self, x: Array) -> Array:
        """Sets data-dependent parameters from a batch, in place, and returns y = f(x)."""
        return self(x)

    def update_statistics(self, x: Array) -> Array:
        """Moves running statistics towards those of a batch, in place, and returns y = f(x)."""
        return self(x)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """Upper bounds of the Lipschitz constants of f and of f^-1 in the 2-norm of one example.

        Taken on the host in float64, so not under jit.
        """
        raise NotImplementedError(f"{type(self).__name__} has no Lipschitz bounds")


def scaling_log_det(log_scale: Array, x: Array) -> Array:
    """[B] log-dets of x [B, ..., *shape] * exp(log_scale [*shape]): each scale counts once a position."""
    log_det = (math.prod(x.shape[1:]) // log_scale.size) * jnp.sum(log_scale)
    return jnp.broadcast_to(log_det, x.shape[:1])


def scaling_bounds(log_scale: Array | np.ndarray) -> tuple[float, float]:
    """Lipschitz constants of x * exp(log_scale) and of its inverse; infinite where float64 ends."""
    log_scale = np.asarray(log_scale, np.float64)
    with np.errstate(over="ignore"):
        return float(np.exp(log_scale.max())), float(np.exp(-log_scale.min()))


class Chain(Bijector):
    """f = f_n o ... o f_1; the log-dets add up, the inverses run backwards."""

    def __init__(self, bijectors: Sequence[Bijector]):
        self.bijectors = List(bijectors)
        self.blocks = sum(bijector.blocks for bijector in bijectors)
        self.takes_noise = any(bijector.takes_noise for bijector in bijectors)

    def _fold(self, apply: Callable[[Bijector, Array], Array], x: Array) -> Array:
        """Runs x through apply(bijector, x) of every bijector."""
        for bijector in self.bijectors:
            x = apply(bijector, x)
        return x

    def __call__(self, x: Array) -> Array:
        return self._fold(lambda bijector, x: bijector(x), x)

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        log_det, diagnostics = jnp.zeros(x.shape[0], x.dtype), []
        keys, estimators = split_key(key, self.bijectors), split_estimator(estimator, self.bijectors)
        for bijector, subkey, part in zip(self.bijectors, keys, estimators, strict=True):
            x, term, found = bijector.forward(x, subkey, part)
            log_det, diagnostics = log_det + term, diagnostics + found
        return x, log_det, diagnostics

    def inverse(self, y: Array, solver: Solver) -> Inverse:
        statuses = []
        for bijector in reversed(self.bijectors):
            y, found = bijector.inverse(y, solver)
            statuses = found + statuses
        return y, statuses

    def initialize(self, x: Array) -> Array:
        return self._fold(lambda bijector, x: bijector.initialize(x), x)

    def update_statistics(self, x: Array) -> Array:
        return self._fold(lambda bijector, x: bijector.update_statistics(x), x)


def split_key(key: Array | None, bijectors: Sequence[Bijector]) -> list[Array | None]:
    """A key for each layer that takes noise, the key itself for a single one; none for the others.

    Few splits make a small program: XLA compiles a dozen kernels for each.
    """
    number = sum(bijector.takes_noise for bijector in bijectors)
    keys = iter([key] * number if key is None or number <= 1 else jax.random.split(key, number))
    return [next(keys) if bijector.takes_noise else None for bijector in bijectors]


def join_blocks(parts: list[Blocks]) -> Blocks:
    """The diagnostics, or the statuses, of consecutive residual blocks as one, with a leading axis of blocks."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def split_estimator(estimator: Estimator, bijectors: Sequence[Bijector]) -> list[Estimator]:
    """One estimator a layer: with the rows of its residual blocks, where the estimator has rows."""
    ends = list(accumulate((bijector.blocks for bijector in bijectors), initial=0))
    return [jax.tree.map(lambda leaf: leaf[a:b], estimator) for a, b in pairwise(ends)]  # noqa: B023
