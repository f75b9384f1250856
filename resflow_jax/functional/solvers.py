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
import numpy as np

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.iteration import Solver, example_norm, wide_dtype

Array = jax.Array


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Plain iteration x <- T(x): about log(tolerance) / log(L) evaluations, no memory."""

    def initialize(self, x: Array) -> tuple[()]:
        return ()

    def propose(self, turn, memory, change, new, trusted):
        return memory, new.image


class _Changes(NamedTuple):
    images: Array  # dT, [B, memory, D]
    residuals: Array  # dr
    gram: Array  # dr^T dr, [B, memory, memory]


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

    def initialize(self, x: Array) -> _Changes:
        size = max(1, min(self.memory, x.shape[1]))
        empty = jnp.zeros((x.shape[0], size, x.shape[1]), x.dtype)
        return _Changes(empty, empty, jnp.zeros((x.shape[0], size, size), wide_dtype(x.dtype)))

    def propose(self, turn, memory, change, new, trusted):
        # Columns of norm one or zero: no Gram matrix over- or underflows, however small r has become.
        unit = example_norm(change.residual)[:, None]
        image, residual = (jnp.where(unit > 0, v / jnp.where(unit > 0, unit, 1), 0) for v in change)
        slot, dtype = turn % memory.gram.shape[-1], memory.gram.dtype
        images, residuals = memory.images.at[:, slot].set(image), memory.residuals.at[:, slot].set(residual)
        row = _products(residuals, residual, dtype)
        gram = memory.gram.at[:, slot].set(row).at[:, :, slot].set(row)

        # Nearly dependent columns cost accuracy of r, not of x: the ridge is what rounding leaves of them.
        ridge = 16 * float(jnp.finfo(dtype).eps) * jnp.eye(gram.shape[-1], dtype=dtype)
        factor = jnp.linalg.cholesky(gram + ridge[None], symmetrize_input=False), True
        slopes = _products(residuals, new.residual, dtype)
        weights = jax.scipy.linalg.cho_solve(factor, slopes[..., None])[..., 0].astype(new.image.dtype)
        weights = jnp.where(jnp.isfinite(weights), weights, 0)  # no factor: a plain step
        return _Changes(images, residuals, gram), new.image - jnp.einsum("bmd,bm->bd", images, weights)


def _products(rows: Array, vector: Array, dtype: np.dtype) -> Array:
    """Inner products of [B, memory, D] with [B, D]: [B, memory]."""
    # Accelerators multiply coarsely by default: such a Gram matrix may have negative eigenvalues.
    return jnp.einsum("bmd,bd->bm", rows.astype(dtype), vector.astype(dtype), precision="highest")


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
        known = trusted[None, :, None] & (slot > 0)
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
