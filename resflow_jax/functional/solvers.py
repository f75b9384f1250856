"""Solvers of x = T(x) for a contraction T: plain iteration, Anderson acceleration, Broyden's method.

A solver is settings and an update rule: from the points evaluated so far, where T is to be evaluated
next. `functional.iteration` does the rest, and sees to it that each of them converges for every
contraction. With r = T(x) - x and the last changes dx, dr, dT = dx + dr of the points evaluated:

    FixedPoint    x <- T(x)                                         Behrmann et al. 2019 (1811.00995), algorithm 1
    Anderson      x <- T(x) - dT c,  c = argmin |r - dR c|_2        Walker & Ni 2011, equations (2.2) and (2.3)
    Broyden       x <- x + H r,  H dr = -dx for the last change     Broyden 1965, method 1

All rules work on each example by itself; points are [B, D]. Cost besides T: products of vectors.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_choice, check_count, check_positive
from resflow_jax.functional.iteration import Evaluation, example_norm

Array = jax.Array

ON_FAILURE = ("warn", "raise")
_TOLERANCES = {16: 1e-2, 32: 1e-6, 64: 1e-12}  # by bits of the dtype


@dataclass(frozen=True)
class Solver:
    """Interface of a solver, and the settings that all solvers share.

    Attributes:
      tolerance: bound on max |r|, relative to max(1, max |x|, max |y|) of the example; by default
        1e-6 in float32, 1e-12 in float64, 1e-2 in 16-bit floats.
      max_iterations: cap on the evaluations of T.
      on_failure: whether an example that does not converge gives a RuntimeWarning ("warn") or an
        `InverseError` ("raise").

    Raises:
      ValueError: if the tolerance is not positive, the cap below one or `on_failure` unknown.
    """

    tolerance: float | None = None
    max_iterations: int = 1000
    on_failure: str = "warn"

    def __post_init__(self):
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        check_count("max_iterations", self.max_iterations, 1)
        check_choice("on_failure", self.on_failure, ON_FAILURE)

    def tolerance_for(self, dtype: Any) -> float:
        """The tolerance in force for arrays of this float dtype."""
        return _TOLERANCES[jnp.finfo(dtype).bits] if self.tolerance is None else self.tolerance

    def initialize(self, x: Array) -> Any:
        """The memory of the rule before the first evaluation, which will be at x [B, D]."""
        raise NotImplementedError

    def propose(
        self, turn: Array, memory: Any, change: Evaluation, new: Evaluation, accepted: Array
    ) -> tuple[Any, Array]:
        """(memory, x): where to evaluate next, T(x) as long as nothing is known.

        Args:
          turn: number of evaluations before this one, int32 [].
          memory: of the turn before.
          change: of T(x) and r from the best point so far to the new one; zero at the first point.
          new: T(x) and r at the point just evaluated.
          accepted: whether the new point is the best one now, [B]. Where not, the x returned is not used.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Plain iteration x <- T(x): about log(tolerance) / log(L) evaluations, no memory."""

    def initialize(self, x: Array) -> tuple[()]:
        return ()

    def propose(self, turn, memory, change, new, accepted):
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

    def propose(self, turn, memory, change, new, accepted):
        import os
        if os.environ.get("RESET"):
            memory = jax.tree.map(lambda kept: jnp.where(accepted[:, None], kept, 0), memory)
            change = jax.tree.map(lambda c: jnp.where(accepted[:, None], c, 0), change)
        # Columns of norm one or zero: no Gram matrix over- or underflows, however small r has become.
        unit = example_norm(change.residual)[:, None]
        columns = jax.tree.map(lambda v: jnp.where(unit > 0, v / unit, 0), change)
        slot = turn % memory.residual.shape[0]
        memory = jax.tree.map(lambda kept, column: kept.at[slot].set(column), memory, columns)

        dtype = jnp.promote_types(new.residual.dtype, jnp.float32)
        residuals = memory.residual.astype(dtype)
        gram = jnp.einsum("mbd,nbd->bmn", residuals, residuals)
        slopes = jnp.einsum("mbd,bd->bm", residuals, new.residual.astype(dtype))
        ridge = _RIDGE * jnp.finfo(dtype).eps * jnp.eye(gram.shape[-1], dtype=dtype)
        weights = jnp.linalg.solve(gram + ridge, slopes[..., None])[..., 0].astype(new.image.dtype)
        return memory, new.image - jnp.einsum("mbd,bm->bd", memory.image, weights)


class _RankOne(NamedTuple):
    left: Array  # [memory, B, D]
    right: Array


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's first ("good") method on r(x) = 0, from H = I: an inverse H = I + sum_i u_i v_i^T.

    H is the approximation of (I + J)^-1; it starts anew when the memory is full, or a point rejected.

    Attributes:
      memory: number of updates u v^T kept, 2 * memory vectors an example.
    """

    memory: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_count("memory", self.memory, 1)

    def initialize(self, x: Array) -> _RankOne:
        empty = jnp.zeros((self.memory, *x.shape), x.dtype)
        return _RankOne(empty, empty)

    def propose(self, turn, memory, change, new, accepted):
        slot = turn % self.memory
        known = accepted[:, None] & (slot > 0)
        memory = jax.tree.map(lambda kept: jnp.where(known, kept, 0), memory)
        # H <- H + (s - H t) s^T H / (s^T H t) makes H t = s, for s = dx and t = -dr.
        s = change.image - change.residual
        h_t = _plus_rank_one(*memory, -change.residual)
        pivot = jnp.sum(s * h_t, axis=1, keepdims=True)
        sound = accepted[:, None] & (jnp.abs(pivot) > 1e-3 * (example_norm(s) * example_norm(h_t))[:, None])
        left = jnp.where(sound, (s - h_t) / jnp.where(sound, pivot, 1), 0)
        right = jnp.where(sound, _plus_rank_one(memory.right, memory.left, s), 0)
        memory = _RankOne(memory.left.at[slot].set(left), memory.right.at[slot].set(right))
        step = _plus_rank_one(*memory, new.residual)
        return memory, new.image + (step - new.residual)


def _plus_rank_one(left: Array, right: Array, v: Array) -> Array:
    """(I + sum_i left_i right_i^T) v of every example."""
    return v + jnp.einsum("mbd,mb->bd", left, jnp.einsum("mbd,bd->mb", right, v))


_RIDGE = 16
