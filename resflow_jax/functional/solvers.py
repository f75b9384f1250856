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
        """The memory of the rule before the first evaluation, which will be at x."""
        raise NotImplementedError

    def propose(self, turn: Array, memory: Any, change: Evaluation, new: Evaluation) -> tuple[Any, Array]:
        """(memory, x): where to evaluate next, `T(x)` at `turn` 0.

        Args:
          turn: number of evaluations before this one, int32 [].
          memory: of the turn before.
          change: of T(x) and r from the base, the best point before, to the new one; zero at turn 0.
          new: T(x) and r at the point just evaluated.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Plain iteration x <- T(x): about log(tolerance) / log(L) evaluations, no memory."""

    def initialize(self, x: Array) -> tuple[()]:
        return ()

    def propose(self, turn, memory, change, new):
        return memory, new.image


class _AndersonMemory(NamedTuple):
    images: Array  # the last changes of T(x), [memory, B, D]
    residuals: Array  # and of r, each divided by the norm of that of r


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration, type II, without mixing: GMRES's least squares over the last changes.

    Attributes:
      memory: number of changes kept: 2 * memory vectors an example.
    """

    memory: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_count("memory", self.memory, 1)

    def initialize(self, x: Array) -> _AndersonMemory:
        empty = jnp.zeros((self.memory, *x.shape), x.dtype)
        return _AndersonMemory(empty, empty)

    def propose(self, turn, memory, change, new):
        memory = _store(memory, turn, change, example_norm(change.residual))
        dtype = jnp.promote_types(new.residual.dtype, jnp.float32)
        columns = memory.residuals.astype(dtype)
        gram = jnp.einsum("mbd,nbd->bmn", columns, columns)
        slopes = jnp.einsum("mbd,bd->bm", columns, new.residual.astype(dtype))
        # The columns have norm one or zero: relative to them, this much is lost to rounding.
        ridge = _RIDGE * jnp.finfo(dtype).eps * jnp.eye(self.memory, dtype=dtype)
        coefficients = jnp.linalg.solve(gram + ridge, slopes[..., None])[..., 0].astype(new.image.dtype)
        return memory, new.image - jnp.einsum("mbd,bm->bd", memory.images, coefficients)


_RIDGE = 16


def _store(memory, turn, change: Evaluation, unit: Array):
    """The memory with the new change, divided by `unit` [B], in place of the oldest; zero where the unit is."""
    scaled = jax.tree.map(lambda v: jnp.where(unit[:, None] > 0, v / unit[:, None], 0), change)
    return jax.tree.map(lambda kept, v: kept.at[turn % kept.shape[0]].set(v), memory, type(memory)(*scaled))


class _BroydenMemory(NamedTuple):
    left: Array
    right: Array


@dataclass(frozen=True)
class Broyden(Solver):
    """Good Broyden; H = I + sum_i u_i v_i^T; forgets everything after `memory` updates."""

    memory: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_count("memory", self.memory, 1)

    def initialize(self, x: Array) -> _BroydenMemory:
        empty = jnp.zeros((self.memory, *x.shape), x.dtype)
        return _BroydenMemory(empty, empty)

    def propose(self, turn, memory, change, new):
        slot = turn % self.memory
        memory = jax.tree.map(lambda kept: jnp.where(slot == 0, 0, kept), memory)
        left, right = memory
        dx = change.image - change.residual
        dx_, dy = dx, -change.residual

        def apply(a, b, v):
            return v + jnp.einsum("mbd,mb->bd", a, jnp.einsum("mbd,bd->mb", b, v))

        hy = apply(left, right, dy)
        htx = apply(right, left, dx)
        denominator = jnp.sum(dx * hy, axis=1)
        good = jnp.abs(denominator) > 1e-3 * example_norm(dx) * example_norm(hy)
        u = jnp.where(good[:, None], (dx - hy) / jnp.where(good, denominator, 1)[:, None], 0)
        v = jnp.where(good[:, None], htx, 0)
        memory = _BroydenMemory(left.at[slot].set(u), right.at[slot].set(v))
        x = new.image - new.residual
        return memory, new.image + (apply(memory.left, memory.right, new.residual) - new.residual)
