"""Solvers of x = T(x) for a contraction T: plain iteration, Anderson acceleration, Broyden's method.

A solver consists of settings and an update rule, which proposes the next point to evaluate T at. The loop in
`functional.iteration` does the rest, and its safeguard makes every rule converge for every contraction.
With r = T(x) - x, and with the differences dx, dr and dT = dx + dr between evaluated points:

    FixedPoint    x <- T(x)                                       Behrmann et al. 2019 (1811.00995), algorithm 1
    Anderson      x <- T(x) - dT c,  c = argmin |r - dR c|_2      Walker & Ni 2011 (10.1137/10078356X), section 2
    Broyden       x <- x + H r,  H dr = -dx for the last change   Broyden 1965, method 1

Each example is solved independently. Beyond the evaluations of T, a step costs products with 2 * memory vectors.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.iteration import Solver, example_norm
from resflow_jax.functional.primitives.precision import wide_dtype

Array = jax.Array


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Plain fixed-point iteration x <- T(x) (Behrmann et al. 2019, arXiv 1811.00995, algorithm 1).

    It takes about log(tolerance) / log(L) evaluations of g for a Lipschitz constant L, and no memory. The settings
    `tolerance`, `max_iterations` and `on_failure` are those of `Solver`.

    Example:
      >>> solver = rf.FixedPoint(tolerance=1e-3)
      >>> x, status = rf.residual_inverse(lambda w, x: w * x, 0.5, jnp.ones((1, 2)), solver=solver, return_status=True)
      >>> status.iterations.tolist(), status.converged.tolist()
      ([10], [True])
    """

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
    """Anderson acceleration of type II without mixing (Walker & Ni 2011, doi 10.1137/10078356X, section 2).

        x <- T(x) - dT c,    c = argmin |r - dR c|_2 over the last `memory` differences

    For a linear T it is close to restarted GMRES, so it often takes far fewer evaluations of g than `FixedPoint`. The
    safeguard of `functional.iteration` makes it converge for every contraction. The settings `tolerance`,
    `max_iterations` and `on_failure` are those of `Solver`.

    Attributes:
      memory: number of differences kept, at most the dimension D: 2 * memory vectors for each example.

    Raises:
      ValueError: for a memory below 1, or as for `Solver`.

    Example:
      >>> w = 0.9 * jnp.array([[0.6, 0.8], [-0.8, 0.6]])   # a rotation: FixedPoint takes about 100 evaluations
      >>> solver = rf.Anderson(tolerance=1e-5)
      >>> x, status = rf.residual_inverse(lambda w, x: x @ w, w, jnp.ones((1, 2)), solver=solver, return_status=True)
      >>> status.converged.item(), status.iterations.item() <= 5
      (True, True)
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
        # Columns are scaled to norm one (or are zero), so the Gram matrix neither over- nor underflows for a small r.
        unit = example_norm(change.residual)[:, None]
        image, residual = (jnp.where(unit > 0, v / jnp.where(unit > 0, unit, 1), 0) for v in change)
        slot, dtype = turn % memory.gram.shape[-1], memory.gram.dtype
        images, residuals = memory.images.at[:, slot].set(image), memory.residuals.at[:, slot].set(residual)
        row = _products(residuals, residual, dtype)
        gram = memory.gram.at[:, slot].set(row).at[:, :, slot].set(row)

        # The ridge is of the size of the rounding errors. It keeps nearly dependent columns from spoiling the step.
        ridge = 16 * float(jnp.finfo(dtype).eps) * jnp.eye(gram.shape[-1], dtype=dtype)
        slopes = _products(residuals, new.residual, dtype)
        weights = _solve_positive(gram + ridge[None], slopes).astype(new.image.dtype)
        weights = jnp.where(jnp.isfinite(weights), weights, 0)  # if the elimination failed: a plain step
        return _Changes(images, residuals, gram), new.image - jnp.einsum("bmd,bm->bd", images, weights)


def _products(rows: Array, vector: Array, dtype: np.dtype) -> Array:
    """Inner products of [B, memory, D] with [B, D]: [B, memory]."""
    # Accelerators multiply with reduced precision by default, which can give a Gram matrix negative eigenvalues.
    return jnp.einsum("bmd,bd->bm", rows.astype(dtype), vector.astype(dtype), precision="highest")


def _solve_positive(matrix: Array, vector: Array) -> Array:
    """Solves small positive definite systems [B, m, m] for [B, m] by Gauss-Jordan elimination.

    A system has NaN where a pivot is not positive. JAX's own solvers call LAPACK on a CPU, which hangs for large
    batches on several devices of one process (JAX 0.10.2). Positive definite systems need no pivoting.
    """
    rows = jnp.concatenate([matrix, vector[..., None]], axis=-1)
    for k in range(vector.shape[-1]):
        pivot = rows[:, k, k]
        row = rows[:, k] / jnp.where(pivot > 0, pivot, jnp.nan)[:, None]
        rows = (rows - rows[:, :, k, None] * row[:, None]).at[:, k].set(row)
    return rows[..., -1]


class _RankOne(NamedTuple):
    left: Array  # [memory, B, D]
    right: Array


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's first ("good") method for r(x) = 0 (Broyden 1965, method 1).

        x <- x + H r,    H = I + sum_i u_i v_i^T, with H dr = -dx for the last change

    H approximates (I + J)^-1, starting from H = I. It is reset when the memory is full, or when several proposals in a
    row have failed. The settings `tolerance`, `max_iterations` and `on_failure` are those of `Solver`.

    Attributes:
      memory: number of rank-one updates kept: 2 * memory vectors for each example.

    Raises:
      ValueError: for a memory below 1, or as for `Solver`.

    Example:
      >>> x = rf.residual_inverse(lambda w, x: w * x, 0.5, jnp.ones((1, 2)), solver=rf.Broyden(memory=4))
      >>> x.round(4).tolist() == jnp.full((1, 2), 2 / 3).round(4).tolist()
      True
    """

    memory: int = 16
    patience: ClassVar[int] = 8  # the method does not decrease |r|_2 in every step

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
    """(I + sum_i left_i right_i^T) v for every example, [B, D]."""
    return v + jnp.einsum("mbd,mb->bd", left, jnp.einsum("mbd,bd->mb", right, v))
