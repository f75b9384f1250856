"""The loop that solves x = T(x) for a contraction T, one example at a time, by any solver's update rule.

Each turn evaluates T once, at the x [B, D] that the rule proposed, and knows then its residual

    r = T(x) - x,     |x - x*| <= |r| / (1 - L)      for a contraction T of constant L  (Banach)

An example stops by itself, and changes no more, once max |r| <= tolerance * max(scale, max |T(x)|), or
once a step x <- T(x) within 64 units of rounding lowers max |r| no more: no more can be had. It stops unconverged where
T of its best point is not finite: no step can mend that.

A rule may propose anything, and no contraction in the 2-norm is lost. The loop holds on to the best
point, the base, and takes no step longer than `REACH` * |r|_2 (x* is within |r|_2 / (1 - L)), but T(x)
instead. A proposal counts as a failure unless it lowers the base's |r|_2 by the factor
`DECREASE`. After more than `patience` failures in a row x goes back to T(base) and takes plain steps
x <- T(x), each of which lowers |r|_2 by L: one the first time, then 2, 4, 8, ... So of n evaluations at
most (patience + 1) * (1 + log2(n + 1)) are spent on such lapses, however bad the rule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.checks import check_choice, check_count, check_positive

Array = jax.Array

DECREASE = 0.999
REACH = 1e4
ON_FAILURE = ("warn", "raise")
_TOLERANCES = {16: 1e-2, 32: 1e-6, 64: 1e-12}  # by bits of the dtype


class Evaluation(NamedTuple):
    """T at a point x, or a difference of two such: T(x) and r = T(x) - x, [B, D]."""

    image: Array
    residual: Array


@dataclass(frozen=True)
class Solver:
    """Interface of a solver, and the settings that all solvers share.

    Attributes:
      tolerance: bound on max |r|, relative to max(1, max |x|, max |y|) of the example; by default
        1e-6 in float32, 1e-12 in float64, 1e-2 in 16-bit floats.
      max_iterations: cap on the evaluations of g.
      on_failure: what happens where an example does not converge and no status was asked for. "warn": an eager call
        gives a RuntimeWarning, a compiled program says nothing and returns its best guess. "raise": an eager call
        raises an `InverseError`, a compiled program returns NaN for the example. See `functional.inverse`.
      patience: proposals in a row that may fail; a property of the rule, not a setting.

    Raises:
      ValueError: if the tolerance is not positive, the cap below one or `on_failure` unknown.
    """

    tolerance: float | None = None
    max_iterations: int = 1000
    on_failure: str = "warn"
    patience: ClassVar[int] = 0

    def __post_init__(self):
        # Both limits are traced where a program serves every value of them.
        if self.tolerance is not None and not isinstance(self.tolerance, Array):
            check_positive("tolerance", self.tolerance)
        if not isinstance(self.max_iterations, Array):
            check_count("max_iterations", self.max_iterations, 1)
        check_choice("on_failure", self.on_failure, ON_FAILURE)

    def tolerance_for(self, dtype: Any) -> float:
        """The tolerance in force for arrays of this float dtype."""
        return _TOLERANCES[jnp.finfo(dtype).bits] if self.tolerance is None else self.tolerance

    def split(self, dtype: Any) -> tuple["Solver", tuple[float, int]]:
        """(rule, limits): the solver without tolerance and cap, to compile a program for, and these, its arguments."""
        return replace(self, tolerance=None, max_iterations=1), (self.tolerance_for(dtype), self.max_iterations)

    def with_limits(self, limits: tuple[Array | float, Array | int]) -> "Solver":
        """The rule with the limits of `split`, which may be traced."""
        return replace(self, tolerance=limits[0], max_iterations=limits[1])

    def initialize(self, x: Array) -> Any:
        """The memory of the rule before the first evaluation, which will be at x [B, D]."""
        raise NotImplementedError

    def propose(
        self, turn: Array, memory: Any, change: Evaluation, new: Evaluation, trusted: Array
    ) -> tuple[Any, Array]:
        """(memory, x): where to evaluate next; T(x) as long as nothing is known.

        Args:
          turn: number of evaluations before this one, int32 [].
          memory: of the turn before.
          change: from the base, the best point so far, to the new one; zero at the first point.
          new: T(x) and r at the point just evaluated.
          trusted: where not, [B], proposals have failed; the x returned is not used, T(base) is.
        """
        raise NotImplementedError


class InverseStatus(NamedTuple):
    """How the solves of a batch ended; fields [B] for one block, [blocks, B] for a flow.

    Attributes:
      iterations: evaluations of g used by each example.
      residual: max |y - g(x) - x| at the best x evaluated, whose successor is returned.
      residual_norm: the same in the 2-norm, from which `error_bound` follows.
      converged: whether the residual was within the tolerance or down to rounding; False for an example that is not
        finite, of which a single evaluation tells.
    """

    iterations: Array
    residual: Array
    residual_norm: Array
    converged: Array

    def error_bound(self, lipschitz: Array | float) -> Array:
        """A bound on |x - x*|_2 of each example: residual_norm / (1 - L), infinite where L >= 1.

        It holds for the solve of one block, converged or not, up to the rounding of g.

        Args:
          lipschitz: a constant L of g in the 2-norm; broadcasts against residual_norm.
        """
        # A 16-bit L could be rounded down, and with it the bound.
        norm = self.residual_norm.astype(wide_dtype(self.residual_norm.dtype))
        lipschitz = jnp.asarray(lipschitz, norm.dtype)
        shape = jnp.broadcast_shapes(norm.shape, lipschitz.shape)
        norm, lipschitz = jnp.broadcast_to(norm, shape), jnp.broadcast_to(lipschitz, shape)
        contracts = lipschitz < 1
        return jnp.where(contracts, norm / jnp.where(contracts, 1 - lipschitz, 1), jnp.inf)


# A program that returns a status can be written to a file.
export.register_namedtuple_serialization(InverseStatus, serialized_name="resflow_jax.InverseStatus")


class _Guard(NamedTuple):
    failures: Array  # proposals in a row that did not improve on the base, int32 [B]
    plain_steps: Array  # plain steps still to take
    penalty: Array  # plain steps after the next lapse


class _State(NamedTuple):
    x: Array  # the next point to evaluate
    base: Evaluation  # at the best point so far, whose residuals the status holds
    guard: _Guard
    memory: Any
    status: InverseStatus
    lost: Array  # whether T of the best point is not finite, [B]


class _Point(NamedTuple):
    """T at the point of one turn, and what it is judged by, [B]."""

    value: Evaluation
    largest: Array  # max |r|
    norm: Array  # |r|_2
    size: Array  # what tolerances are relative to
    is_plain: Array  # whether the point is T(base), or the start
    is_finite: Array


class _Verdict(NamedTuple):
    """What a point is worth, [B]."""

    is_small: Array  # the residual is within the tolerance
    is_stalled: Array  # rounding allows no smaller one
    is_better: Array  # it becomes the base


def iterate(step: Callable[[Array], Array], start: Array, solver: Solver, scale: Array) -> tuple[Array, InverseStatus]:
    """Solves x = step(x) from `start` [B, ...]; the tolerance is relative to `scale` [B] at least.

    Returns:
      (x, status): x is the step that the solver would take next, its best guess and free; or T(base)
      where that is more than |r|_2 away. So |x - x*|_2 <= |r|_2 + L / (1 - L) * |r|_2 = |r|_2 / (1 - L).
    """
    x = start.reshape(start.shape[0], math.prod(start.shape[1:]))
    tolerance = jnp.asarray(solver.tolerance_for(x.dtype), x.dtype)

    def advance(carry):
        turn, state = carry
        image = step(state.x.reshape(start.shape)).reshape(x.shape)
        point = _evaluated(turn, state, image, scale)
        verdict = _judge(point, state.status, tolerance)
        guard, trusted = _guarded(state.guard, verdict.is_better, solver.patience)
        memory, proposal = _propose(solver, turn, state, point, trusted)
        return turn + 1, _accept(state, point, verdict, guard, memory, proposal)

    def unfinished(carry):
        turn, state = carry
        return (turn < solver.max_iterations) & ~jnp.all(state.status.converged | state.lost)

    state = vary_over(_initial(x, solver), varying_axes((x, scale)))
    _, state = lax.while_loop(unfinished, advance, (jnp.int32(0), state))
    x, base, status = state.x, state.base, state.status
    x = _select(example_norm(x - base.image) <= status.residual_norm, x, base.image)
    return x.reshape(start.shape), status


def _initial(x: Array, solver: Solver) -> _State:
    none, infinite = jnp.zeros(x.shape[0], jnp.int32), jnp.full(x.shape[0], jnp.inf, x.dtype)
    status = InverseStatus(none, infinite, infinite, none > 0)
    return _State(x, Evaluation(x, x), _Guard(none, none, none + 1), solver.initialize(x), status, none > 0)


def _evaluated(turn: Array, state: _State, image: Array, scale: Array) -> _Point:
    """The point of this turn, of T(x) [B, D] at the state's x."""
    value = Evaluation(image, image - state.x)
    norm = example_norm(value.residual)
    return _Point(
        value=value,
        largest=example_max(value.residual),
        norm=norm,
        size=jnp.maximum(scale, example_max(image)),
        is_plain=jnp.all(state.x == state.base.image, axis=1) | (turn == 0),
        is_finite=jnp.isfinite(norm),
    )


def _judge(point: _Point, status: InverseStatus, tolerance: Array) -> _Verdict:
    """The verdict on a point; the status is that of the base."""
    rounding = 64 * float(jnp.finfo(point.norm.dtype).eps)
    is_small = point.is_finite & (point.largest <= tolerance * point.size)
    is_at_rounding = point.is_finite & (point.largest <= rounding * point.size)
    return _Verdict(
        is_small=is_small,
        is_stalled=point.is_plain & is_at_rounding & (point.largest >= status.residual),
        is_better=point.is_plain | is_small | (point.norm <= DECREASE * status.residual_norm),
    )


def _guarded(guard: _Guard, is_better: Array, patience: int) -> tuple[_Guard, Array]:
    """The guard after a proposal, and whether the rule may go on from there, [B]."""
    failures = jnp.where(is_better, 0, guard.failures + 1)
    trusted = failures <= patience
    on = _Guard(failures, jnp.maximum(guard.plain_steps - 1, 0), guard.penalty)
    lapse = _Guard(jnp.zeros_like(failures), guard.penalty, 2 * guard.penalty)
    return _select(trusted, on, lapse), trusted


def _propose(solver: Solver, turn: Array, state: _State, point: _Point, trusted: Array) -> tuple[Any, Array]:
    """The rule's memory and proposal, which is T(x) where the rule steps further than `REACH` allows."""
    finite = point.is_finite & jnp.isfinite(state.status.residual_norm)
    change = jax.tree.map(lambda a, b: jnp.where(finite[:, None], a - b, 0), point.value, state.base)
    memory, proposal = solver.propose(turn, state.memory, change, point.value, trusted)
    image = point.value.image
    return memory, _select(example_norm(proposal - image) <= REACH * point.norm, proposal, image)


def _accept(state: _State, point: _Point, verdict: _Verdict, guard: _Guard, memory: Any, proposal: Array) -> _State:
    """The state after a turn: examples that have stopped keep their x, base and status."""
    status = state.status
    active = ~(status.converged | state.lost)
    base, residual, residual_norm = _select(
        active & verdict.is_better,
        (point.value, point.largest, point.norm),
        (state.base, status.residual, status.residual_norm),
    )
    return _State(
        x=_select(active, _select(guard.plain_steps > 0, base.image, proposal), state.x),
        base=base,
        guard=guard,
        memory=memory,
        status=InverseStatus(
            iterations=status.iterations + active.astype(jnp.int32),
            residual=residual,
            residual_norm=residual_norm,
            converged=status.converged | (active & (verdict.is_small | verdict.is_stalled)),
        ),
        lost=state.lost | (active & point.is_plain & ~point.is_finite),
    )


def _select(condition: Array, true: Any, false: Any) -> Any:
    """One tree or the other, example by example."""
    return jax.tree.map(lambda a, b: jnp.where(per_example(condition, a), a, b), true, false)


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype, or float32 for 16-bit floats."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def example_max(x: Array) -> Array:
    """max |x| of every example, [B]."""
    return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)


def example_norm(x: Array) -> Array:
    """The 2-norm of every example of x [B, D], [B]; neither over- nor underflows where its square would."""
    largest = example_max(x)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.sum((x / unit[:, None]) ** 2, axis=1))
