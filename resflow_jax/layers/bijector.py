"""The interface of an invertible layer, and the chain that composes layers.

A bijector maps x to y = f(x) and knows log|det dy/dx|. Estimator, key and solver are passed
where they are used; a layer with a closed form takes and ignores them, so that every layer is
called alike. log-dets are in nats, of shape [B], of the forward direction, and added. An estimator
may hold arrays with one row a residual block (the law `Fitted`); every layer is given its own rows.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.iteration import InverseStatus, Solver
from resflow_jax.functional.logdet import Diagnostics

Array = jax.Array
Forward = tuple[Array, Array, list[Diagnostics]]


class Bijector(nnx.Module):
    """Interface of an invertible layer on [B, ...]; subclasses are final.

    Attributes:
      blocks: number of residual blocks inside.
    """

    blocks: int = 0

    def __call__(self, x: Array) -> Array:
        """y = f(x), without the log-det."""
        raise NotImplementedError

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        """(y, log_det, diagnostics): y = f(x) and log|det dy/dx| [B], exact or estimated with `key`.

        The diagnostics of all residual blocks in order, in one or more parts with leading axes.
        """
        raise NotImplementedError

    def inverse(self, y: Array, solver: Solver) -> tuple[Array, InverseStatus]:
        """(x, status) with f(x) = y."""
        raise NotImplementedError

    def initialize(self, x: Array) -> Array:
        """Sets data-dependent parameters from a batch, in place, and returns y = f(x)."""
        return self(x)


def solved(x: Array) -> InverseStatus:
    """The status of an inverse in closed form."""
    batch = x.shape[0]
    zeros = jnp.zeros(batch, x.dtype)
    return InverseStatus(jnp.zeros(batch, jnp.int32), zeros, zeros, jnp.ones(batch, bool))


def join_status(first: InverseStatus, second: InverseStatus) -> InverseStatus:
    """The status of two inverses in sequence: iterations added, the worse residual, both converged."""
    return InverseStatus(
        first.iterations + second.iterations,
        jnp.maximum(first.residual, second.residual),
        jnp.maximum(first.residual_norm, second.residual_norm),
        first.converged & second.converged,
    )


class Chain(Bijector):
    """f = f_n o ... o f_1; the log-dets add up, the inverses run backwards."""

    def __init__(self, bijectors: Sequence[Bijector]):
        self.bijectors = nnx.List(bijectors)
        self.blocks = sum(bijector.blocks for bijector in bijectors)

    def __call__(self, x: Array) -> Array:
        for bijector in self.bijectors:
            x = bijector(x)
        return x

    def forward(self, x: Array, key: Array | None, estimator: Estimator) -> Forward:
        log_det, diagnostics = jnp.zeros(x.shape[0], x.dtype), []
        keys, estimators = split_key(key, len(self.bijectors)), split_estimator(estimator, self.bijectors)
        for bijector, subkey, part in zip(self.bijectors, keys, estimators, strict=True):
            x, term, found = bijector.forward(x, subkey, part)
            log_det, diagnostics = log_det + term, diagnostics + found
        return x, log_det, diagnostics

    def inverse(self, y: Array, solver: Solver) -> tuple[Array, InverseStatus]:
        status = solved(y)
        for bijector in reversed(self.bijectors):
            y, step = bijector.inverse(y, solver)
            status = join_status(status, step)
        return y, status

    def initialize(self, x: Array) -> Array:
        for bijector in self.bijectors:
            x = bijector.initialize(x)
        return x


def split_key(key: Array | None, number: int) -> Sequence[Array | None]:
    """One key a layer, or none for estimators that take none."""
    return [None] * number if key is None else list(jax.random.split(key, number))


def join_diagnostics(parts: list[Diagnostics]) -> Diagnostics:
    """The diagnostics of consecutive residual blocks as one, with a leading axis of blocks."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def split_estimator(estimator: Estimator, bijectors: Sequence[Bijector]) -> list[Estimator]:
    """One estimator a layer: with the rows of its residual blocks, where the estimator has rows."""
    ends = list(accumulate((bijector.blocks for bijector in bijectors), initial=0))
    return [jax.tree.map(lambda leaf: leaf[a:b], estimator) for a, b in pairwise(ends)]  # noqa: B023
