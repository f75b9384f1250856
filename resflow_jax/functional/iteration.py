"""The loop that solves x = T(x) for a contraction T, with any solver's update rule and independent examples.

Each iteration evaluates T once, at the point x [B, D] that the rule proposed, which gives the residual

    r = T(x) - x,     |x - x*| <= |r| / (1 - L)      for a contraction T with constant L  (Banach)

An example stops, and its x no longer changes, when max |r| <= tolerance * max(scale, max |T(x)|). It also counts as
converged when max |r| is within 64 units of rounding and a step x <- T(x) does not lower it: rounding allows no smaller
residual. It stops unconverged if T of its best point is not finite, since no further step can help.

A safeguard makes every rule converge for every contraction in the 2-norm. The loop keeps the best point so far, the
base. A step longer than `REACH` * |r|_2 is replaced by T(x), since x* is within |r|_2 / (1 - L). A proposal fails
unless it lowers the base's |r|_2 by the factor `DECREASE`. After more than `patience` failures in a row, x returns to
T(base) and takes plain steps x <- T(x), each of which lowers |r|_2 by the factor L. There is 1 plain step the first
time, then 2, 4, 8, ... So at most (patience + 1) * (1 + log2(n + 1)) of n evaluations are lost to failures, whatever
the rule.
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
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.texts import count, fields_text, span, values_of

Array = jax.Array

DECREASE = 0.999
REACH = 1e4
ON_FAILURE = ("warn", "raise")
_TOLERANCES = {16: 1e-2, 32: 1e-6, 64: 1e-12}  # by bits of the dtype


class Evaluation(NamedTuple):
    """T(x) and r = T(x) - x at a point x, [B, D], or the differences of these between two points."""

    image: Array
    residual: Array


@dataclass(frozen=True)
class Solver:
    """Interface of the solvers of x = T(x), and the settings that all of them share.

    A subclass defines the update rule by `initialize` and `propose`. The loop in `functional.iteration` evaluates T,
    stops each example, and guarantees convergence for every contraction T, whatever the rule proposes.

    Attributes:
      tolerance: bound on max |r|, relative to max(1, max |x|, max |y|) of the example. None takes 1e-6 in float32,
        1e-12 in float64 and 1e-2 in 16-bit floats.
      max_iterations: cap on the evaluations of g.
      on_failure: what to do if an example does not converge and no status is requested. With "warn", an eager call
        gives a RuntimeWarning, and a compiled program returns its best guess. With "raise", an eager call raises an
        `InverseError`, and a compiled program returns NaN for the example. See `functional.inverse`.
      patience: number of proposals in a row that may fail. Each subclass has its own; it is not a setting.

    Raises:
      ValueError: if the tolerance is not positive, the cap is below one, or `on_failure` is unknown.

    Example:
      >>> solver = rf.Anderson(tolerance=1e-4, max_iterations=50, on_failure="raise")
      >>> isinstance(solver, rf.Solver), solver.tolerance_for(jnp.float32), rf.Broyden().tolerance_for(jnp.float32)
      (True, 0.0001, 1e-06)
    """

    tolerance: float | None = None
    max_iterations: int = 1000
    on_failure: str = "warn"
    patience: ClassVar[int] = 0

    def __post_init__(self):
        # Both limits may be traced: one compiled program serves all their values.
        if self.tolerance is not None and not isinstance(self.tolerance, Array):
            check_positive("tolerance", self.tolerance)
        if not isinstance(self.max_iterations, Array):
            check_count("max_iterations", self.max_iterations, 1)
        check_choice("on_failure", self.on_failure, ON_FAILURE)

    def tolerance_for(self, dtype: Any) -> float:
        """The tolerance for arrays of this float dtype."""
        return _TOLERANCES[jnp.finfo(dtype).bits] if self.tolerance is None else self.tolerance

    def split(self, dtype: Any) -> tuple["Solver", tuple[float, int]]:
        """(rule, limits): the solver's static part, and its tolerance and cap as arguments of a compiled program."""
        return replace(self, tolerance=None, max_iterations=1), (self.tolerance_for(dtype), self.max_iterations)

    def with_limits(self, limits: tuple[Array | float, Array | int]) -> "Solver":
        """The solver of this rule and the limits of `split`, which may be traced."""
        return replace(self, tolerance=limits[0], max_iterations=limits[1])

    def initialize(self, x: Array) -> Any:
        """The memory of the rule before the first evaluation, at x [B, D]."""
        raise NotImplementedError

    def propose(
        self, turn: Array, memory: Any, change: Evaluation, new: Evaluation, trusted: Array
    ) -> tuple[Any, Array]:
        """Proposes the point [B, D] to evaluate T at next. Returns (memory, point); the first proposal is T(x).

        Args:
          turn: number of earlier evaluations, int32 [].
          memory: the memory that the previous iteration returned.
          change: difference between the new point and the base, the best point so far; zero at the first point.
          new: T(x) and r at the point just evaluated.
          trusted: bool [B]. Where it is False, too many proposals have failed: the loop uses T(base), not the proposal.
        """
        raise NotImplementedError


class InverseStatus(NamedTuple):
    """How the solves of a batch ended. The fields are [B] for one block and [blocks, B] for a flow.

    A block inside of an `Invert` is inverted by its own map. Its row then has 0 iterations, and `converged` only says
    whether x is finite. If this map is itself a solve, as in a `MonotoneBlock`, its residual is unknown: the residual
    and every bound are infinite.

    Attributes:
      iterations: int32, number of evaluations of g for each example.
      residual: max |y - g(x) - x| at the best evaluated point x. The solution returned is the step from there.
      residual_norm: |y - g(x) - x|_2 at the same x; `error_bound` uses it.
      converged: bool, whether the residual is within the tolerance or at the level of rounding. It is False for an
        example with numbers that are not finite.

    Example:
      >>> g, y = lambda w, x: w * x, jnp.ones((1, 2))
      >>> x, status = rf.residual_inverse(g, 0.5, y, solver=rf.FixedPoint(tolerance=1e-3), return_status=True)
      >>> error = jnp.linalg.norm(x - 2 / 3, axis=1)
      >>> status.converged.tolist(), bool(error <= status.error_bound(0.5)), bool(status.error_bound(0.5) < 0.01)
      ([True], True, True)
    """

    iterations: Array
    residual: Array
    residual_norm: Array
    converged: Array

    def __repr__(self) -> str:
        fields = [values_of(field) for field in self]
        if any(field is None or field.shape != fields[0].shape for field in fields):
            return fields_text(self)
        iterations, residual, _, converged = map(np.atleast_1d, fields)
        *blocks, examples = residual.shape
        of = " x ".join([*(count(number, "block") for number in blocks), count(examples, "example")])
        if not residual.size:
            return f"InverseStatus of {of}: no solve"
        rest = np.flatnonzero(~converged.astype(bool).reshape(-1, examples).all(axis=0))
        which = f" (not {', '.join(map(str, rest[:5]))}{', ...' if rest.size > 5 else ''})" if rest.size else ""
        return (
            f"InverseStatus of {of}: {examples - rest.size} of {examples} converged{which}, "
            f"largest residual {residual.max():.1e}, iterations {span(iterations)}"
        )

    def error_bound(self, lipschitz: Array | float) -> Array:
        """A bound on the error |x - x*|_2 of each example: residual_norm / (1 - L), infinite where L >= 1.

        It holds for the solve of one block, converged or not, up to rounding errors in g.

        Args:
          lipschitz: a Lipschitz constant L of g in the 2-norm; it broadcasts against residual_norm.

        Returns:
          floats of the broadcast shape.
        """
        # In 16-bit floats L could be rounded down, and the bound would be too small.
        norm = self.residual_norm.astype(wide_dtype(self.residual_norm.dtype))
        lipschitz = jnp.asarray(lipschitz, norm.dtype)
        shape = jnp.broadcast_shapes(norm.shape, lipschitz.shape)
        norm, lipschitz = jnp.broadcast_to(norm, shape), jnp.broadcast_to(lipschitz, shape)
        contracts = lipschitz < 1
        return jnp.where(contracts, norm / jnp.where(contracts, 1 - lipschitz, 1), jnp.inf)


# With this, jax.export can serialise a program that returns a status.
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
    lost: Array  # whether T of the best point is not finite, bool [B]


class _Point(NamedTuple):
    """T at the point of one iteration, with the quantities for its verdict, [B]."""

    value: Evaluation
    largest: Array  # max |r|
    norm: Array  # |r|_2
    size: Array  # the scale of relative tolerances
    is_plain: Array  # whether the point is T(base), or the start
    is_finite: Array


class _Verdict(NamedTuple):
    """The verdict on a point, bool [B]."""

    is_small: Array  # the residual is within the tolerance
    is_stalled: Array  # rounding allows no smaller residual
    is_better: Array  # it becomes the base


def iterate(step: Callable[[Array], Array], start: Array, solver: Solver, scale: Array) -> tuple[Array, InverseStatus]:
    """Solves x = step(x) from `start` [B, ...]. The tolerance is relative to max(scale, max |step(x)|), scale [B].

    Returns:
      (x, status). x is the point that the solver would evaluate next, its best guess. If that is more than |r|_2 away
      from T(base), x is T(base). So |x - x*|_2 <= |r|_2 + L / (1 - L) * |r|_2 = |r|_2 / (1 - L).
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
    """The point of this iteration, from image = T(x) [B, D] at the state's x."""
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
    """The verdict on a point, given the status of the base."""
    rounding = 64 * float(jnp.finfo(point.norm.dtype).eps)
    is_small = point.is_finite & (point.largest <= tolerance * point.size)
    is_at_rounding = point.is_finite & (point.largest <= rounding * point.size)
    return _Verdict(
        is_small=is_small,
        is_stalled=point.is_plain & is_at_rounding & (point.largest >= status.residual),
        is_better=point.is_plain | is_small | (point.norm <= DECREASE * status.residual_norm),
    )


def _guarded(guard: _Guard, is_better: Array, patience: int) -> tuple[_Guard, Array]:
    """The guard after a proposal, and whether the rule may continue from this point, bool [B]."""
    failures = jnp.where(is_better, 0, guard.failures + 1)
    trusted = failures <= patience
    on = _Guard(failures, jnp.maximum(guard.plain_steps - 1, 0), guard.penalty)
    lapse = _Guard(jnp.zeros_like(failures), guard.penalty, 2 * guard.penalty)
    return _select(trusted, on, lapse), trusted


def _propose(solver: Solver, turn: Array, state: _State, point: _Point, trusted: Array) -> tuple[Any, Array]:
    """The rule's memory and its proposal, replaced by T(x) where the step is longer than `REACH` * |r|_2."""
    finite = point.is_finite & jnp.isfinite(state.status.residual_norm)
    change = jax.tree.map(lambda a, b: jnp.where(finite[:, None], a - b, 0), point.value, state.base)
    memory, proposal = solver.propose(turn, state.memory, change, point.value, trusted)
    image = point.value.image
    return memory, _select(example_norm(proposal - image) <= REACH * point.norm, proposal, image)


def _accept(state: _State, point: _Point, verdict: _Verdict, guard: _Guard, memory: Any, proposal: Array) -> _State:
    """The state after an iteration. Examples that have stopped keep their x, base and status."""
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
    """Leaves of one tree or the other, selected for each example."""
    return jax.tree.map(lambda a, b: jnp.where(per_example(condition, a), a, b), true, false)


def example_max(x: Array) -> Array:
    """max |x| of each example, [B]."""
    return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)


def example_norm(x: Array) -> Array:
    """The 2-norm of each example of x [B, D], [B], without overflow or underflow of squares."""
    largest = example_max(x)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.sum((x / unit[:, None]) ** 2, axis=1))
