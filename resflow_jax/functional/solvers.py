"""Solvers of x = T(x) for a contraction T: plain iteration, Anderson acceleration, Broyden's method.

A solver is settings and an update rule: from what is known of T, where it is to be evaluated next.
`functional.iteration` does the rest and sees to it that every rule converges for every contraction.
With r = T(x) - x, and dx, dr, dT = dx + dr the changes between points evaluated:

    FixedPoint    x <- T(x)                                       Behrmann et al. 2019 (1811.00995), algorithm 1
    Anderson      x <- T(x) - dT c,  c = argmin |r - dR c|_2      Walker & Ni 2011 (10.1137/10078356X), section 2
    Broyden       x <- x + H r,  H dr = -dx for the last change   Broyden 1965, method 1

Every example is solved by itself. Cost beside T: 2 * memory vectors, and products with each of them.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.iteration import Evaluation, Solver, example_norm

Array = jax.Array


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Plain iteration x <- T(x): about log(tolerance) / log(L) evaluations, no memory."""

    def initialize(self, x: Array) -> tuple[()]:
        return ()

    def propose(self, turn, memory, change, new, trusted):
        return memory, new.image


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration of type II without mixing; on a linear T close to GMRES(memory).

    Attributes:
      memory: number of changes kept, 2 * memory vectors an example; at most D of them are.
    """

    memory: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_count("memory", self.memory, 1)

    def initialize(self, x: Array) -> Evaluation:
        size = max(1, min(self.memory, x.shape[1]))
        empty = jnp.zeros((size, *x.shape), x.dtype)
        return Evaluation(empty, empty)

    def propose(self, turn, memory, change, new, trusted):
        # Columns of norm one or zero: no Gram matrix over- or underflows, however small r has become.
        unit = example_norm(change.residual)[:, None]
        columns = jax.tree.map(lambda v: jnp.where(unit > 0, v / unit, 0), change)
        slot = turn % memory.residual.shape[0]
        memory = jax.tree.map(lambda kept, column: kept.at[slot].set(column), memory, columns)

        dtype = jnp.promote_types(new.residual.dtype, jnp.float32)
        residuals = memory.residual.astype(dtype)
        gram = jnp.einsum("mbd,nbd->bmn", residuals, residuals)
        slopes = jnp.einsum("mbd,bd->bm", residuals, new.residual.astype(dtype))
        # Nearly dependent columns cost accuracy of r, not of x: the ridge is what rounding leaves of them.
        ridge = 16 * jnp.finfo(dtype).eps * jnp.eye(gram.shape[-1], dtype=dtype)
        weights = jnp.linalg.solve(gram + ridge, slopes[..., None])[..., 0].astype(new.image.dtype)
        return memory, new.image - jnp.einsum("mbd,bm->bd", memory.image, weights)


class _RankOne(NamedTuple):
    left: Array  # [memory, B, D]
    right: Array


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's first ("good") method on r(x) = 0, from H = I: an inverse H = I + sum_i u_i v_i^T.

    H is the approximation of (I + J)^-1; it starts anew when the memory is full or proposals keep failing.

    Attributes:
      memory: number of updates u v^T kept, 2 * memory vectors an example.
    """

    memory: int = 16
    patience: ClassVar[int] = 8  # |r|_2 is not what it minimises

    def __post_init__(self):
        super().__post_init__()
        check_count("memory", self.memory, 1)

    def initialize(self, x: Array) -> _RankOne:
        empty = jnp.zeros((self.memory, *x.shape), x.dtype)
        return _RankOne(empty, empty)

    def propose(self, turn, memory, change, new, trusted):
        slot = turn % self.memory
        known = trusted[:, None] & (slot > 0)
        memory = jax.tree.map(lambda kept: jnp.where(known, kept, 0), memory)
        # H <- H + (s - H t) s^T H / (s^T H t) makes H t = s, for s = dx and t = -dr.
        s = change.image - change.residual
        h_t = _plus_rank_one(*memory, -change.residual)
        pivot = jnp.sum(s * h_t, axis=1, keepdims=True)
        sound = trusted[:, None] & (jnp.abs(pivot) > 1e-3 * (example_norm(s) * example_norm(h_t))[:, None])
        left = jnp.where(sound, (s - h_t) / jnp.where(sound, pivot, 1), 0)
        right = jnp.where(sound, _plus_rank_one(memory.right, memory.left, s), 0)
        memory = _RankOne(memory.left.at[slot].set(left), memory.right.at[slot].set(right))
        step = _plus_rank_one(*memory, new.residual)
        return memory, new.image + (step - new.residual)


def _plus_rank_one(left: Array, right: Array, v: Array) -> Array:
    """(I + sum_i left_i right_i^T) v of every example."""
    return v + jnp.einsum("mbd,mb->bd", left, jnp.einsum("mbd,bd->mb", right, v))
