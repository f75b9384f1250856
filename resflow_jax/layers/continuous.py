"""`ContinuousBlock`: the flow of an ordinary differential equation, solved by diffrax.

    dx/dt = f(t, x; c),   x(0) = x,   y = x(T),   log_det = integral over t of tr(df/dx)

Forward and inverse are the same equation in both directions of time. The whole batch is one equation: the step is that
of the example with the largest error. Chen et al. (2018, arXiv 1806.07366); Grathwohl et al. (2019, arXiv 1810.01367).
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.batch_axes import varying_axes
from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.checks import (
    as_float_batch,
    as_shape,
    check_choice,
    check_count,
    check_finite,
    check_key,
    check_like,
    check_positive,
)
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.bijector import (
    Bijector,
    Forward,
    Inverse,
    InverseAndLogDet,
    as_row,
    checked_estimator,
)
from resflow_jax.layers.conditions import ConditionShape, as_condition
from resflow_jax.layers.couplings.conditioners import Conditioner, MLPConditioner
from resflow_jax.layers.event_shapes import check_events
from resflow_jax.layers.module import Module
from resflow_jax.layers.traces import Trace, probes_for
from resflow_jax.layers.unchanged_calls import call_unchanged
from resflow_jax.layers.without_log_det import WithoutLogDet

Array = jax.Array
Shape = tuple[int, ...]

Adjoint = Literal["checkpointed", "backsolve", "direct"]
ADJOINTS = get_args(Adjoint)


class VelocityField(Module):
    """The right side f(t, x; c) of an ordinary differential equation, by a network that gets t as a condition.

    Args:
      shape: shape of one x.
      conditioner: settings of the network, such as `MLPConditioner`; t, and c if there is one, give every hidden layer
        gates and shifts.
      condition_dim: number of elements of a condition [condition_dim]; None for none.
      rngs: draws the network.

    Randomness: `rngs` only. Cost: one call is one pass through the network. Shapes: t [], x [B, *shape], the result
    like x.

    Raises:
      ValueError: for sizes below one, and as the settings of the network.

    Source: Grathwohl et al. (2019, arXiv 1810.01367), appendix B, whose layers have gates and shifts of t too.

    Example:
      >>> field = rf.VelocityField((2,), rf.MLPConditioner((8,), "tanh"), rngs=nnx.Rngs(0))
      >>> field(jnp.zeros(()), jnp.ones((3, 2))).tolist()      # the last layer starts at zero
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        shape: Shape,
        conditioner: Conditioner | None = None,
        condition_dim: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.shape = self.event_shape = as_shape("shape", shape)
        self.condition_dim, self.condition_shape = condition_dim, None
        if condition_dim is not None:
            check_count("condition_dim", condition_dim, 1)
            self.condition_shape = (condition_dim,)
        conditioner = MLPConditioner((64, 64, 64), "tanh") if conditioner is None else conditioner
        if isinstance(conditioner, type) or not hasattr(conditioner, "build"):
            raise ValueError(
                "conditioner: expected the settings of a network, such as rf.MLPConditioner(), got "
                f"{type(conditioner).__name__}"
            )
        self.conditioner = conditioner
        self.network = self.conditioner.build(self.shape, self.shape, (1 + (condition_dim or 0),), rngs=rngs)

    def __call__(self, t: Array, x: Array, condition: Array | None = None) -> Array:
        time = jnp.broadcast_to(jnp.asarray(t, x.dtype), (x.shape[0], 1))
        return self.network(x, time if condition is None else jnp.concatenate([time, condition], axis=-1))


class ContinuousBlock(Bijector):
    """The flow of dx/dt = f(t, x; c) from time 0 to `time`, by an adaptive Runge-Kutta method (Tsitouras 5(4)).

        y = x(time) from x(0) = x,   log_det = integral of tr(df/dx) dt

    It needs the package diffrax, which the extra `diffrax` installs. It is invertible for every f with a Lipschitz
    constant, which need not be known: forward and inverse agree up to the tolerance.

    The batch shares its steps, so an example depends on the others, up to the tolerance. If the solve takes more than
    `max_steps`, all examples become NaN in `forward`, and so do all derivatives; an eager call of a `Flow` warns. An
    example that is not finite, or whose condition is not, becomes NaN; the others do not. `inverse` reports both cases
    as any solve: `return_status=True` returns a row of the status, whose iterations are the steps of the solver, and
    whose residual is 0, or infinite if there is no solution. `forward_with_status` returns the same for the forward
    direction.

    Args:
      field: f, a module of Flax NNX that is called as f(t, x) or f(t, x, condition) for t [] and x [B, ...], and
        treats each example independently, for example a `VelocityField`. A non-finite example is replaced by the first
        finite one before f is called.
      event_shape: shape of one x, if the field does not know it.
      condition_shape: shape of one condition, if the field takes one and does not know it.
      time: length of the interval.
      tolerance: relative and absolute tolerance on the local error of each step, for each example.
      max_steps: cap on the steps of the solver.
      adjoint: how gradients are computed: "checkpointed" differentiates the steps themselves and stores about
        sqrt(max_steps) states; "backsolve" solves the adjoint equation backwards in constant memory, with an error of
        the order of the tolerance; "direct" allows forward mode and higher derivatives, and stores all steps.

    Randomness: the log-det [B], in nats, is exact with `Exact`, up to the tolerance: D Jacobian-vector products for
    each evaluation of f. With `Roulette` and `Truncated` it is Hutchinson's estimate with their `probe` and `probes`,
    unbiased up to the tolerance; the probes are fixed during the solve, and nothing else of these estimators is used.

    Cost: about six evaluations of f for each step of the solver, with one product for each probe; the number of steps
    depends on f.

    Raises:
      ImportError: without diffrax.
      ValueError: for a field that is not a module, numbers that are not positive, an unknown adjoint, and an
        event_shape or condition_shape that is not that of the field; from `forward` for another estimator, a missing
        key, a field whose output is not like x or whose state a call changes, and in a `jax.shard_map`, whose types
        diffrax does not support.

    Source: Grathwohl et al. (2019, arXiv 1810.01367), section 3 (FFJORD).

    Example:
      >>> class Decay(nnx.Module):
      ...     def __call__(self, t, x):
      ...         return -x
      >>> block = rf.ContinuousBlock(Decay())
      >>> y, log_det = block.forward(jnp.ones((2, 3)), estimator=rf.Exact())
      >>> np.allclose(y, np.exp(-1), atol=1e-4), np.allclose(log_det, -3, atol=1e-4)
      (True, True)
    """

    takes_noise = True
    runs_in_shard_map = False
    no_bound = "the Lipschitz constant of a vector field is not known"

    def __init__(
        self,
        field: nnx.Module,
        *,
        event_shape: Shape | None = None,
        condition_shape: ConditionShape = None,
        time: float = 1.0,
        tolerance: float = 1e-5,
        max_steps: int = 1000,
        adjoint: Adjoint = "checkpointed",
    ):
        diffrax()
        if not isinstance(field, nnx.Module):
            raise ValueError(f"field: expected a module of Flax NNX, called as field(t, x), got {type(field).__name__}")
        check_times(time, tolerance)
        check_count("max_steps", max_steps, 1)
        check_choice("adjoint", adjoint, ADJOINTS)
        own = {"event_shape": event_shape, "condition_shape": condition_shape}
        for name, given in own.items():
            given = given if given is None or given is ... else as_shape(name, given)
            known = getattr(field, name, None)
            if known is not None and given is not None and tuple(known) != tuple(given):
                raise ValueError(f"{name}: expected {known}, that of the field, got {given}")
            setattr(self, name, known if given is None else given)
        self.field, self.time, self.tolerance = field, time, tolerance
        self.max_steps, self.adjoint = max_steps, adjoint

    def _run(
        self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None, *, backwards: bool
    ) -> "_Solution":
        """The state at the other end, the log-det of the forward map, and the status."""
        solver, wide = diffrax(), wide_dtype(x.dtype)
        if axes := varying_axes(x):
            raise ValueError(
                f"ContinuousBlock: expected x outside of a jax.shard_map, in which diffrax cannot loop, got x that "
                f"varies over {axes}; with jit the compiler divides a batch"
            )
        is_given = _are_finite(x) if condition is None else _are_finite(x) & _are_finite(condition)
        x = _with_finite(x, is_given)
        condition = None if condition is None else _with_finite(condition, is_given)
        graphdef, weights = nnx.split(self.field)
        probes = probes_for(estimator, key, x)

        right_side = _right_side(graphdef, x.dtype, wide, Trace.of(estimator))
        ends = jnp.asarray(0.0, wide), jnp.asarray(self.time, wide)
        start, end = ends[::-1] if backwards else ends
        limits = {"rtol": self.tolerance, "atol": self.tolerance}
        found = solver.diffeqsolve(
            solver.ODETerm(right_side),
            solver.Tsit5(),
            start,
            end,
            None,
            (x.astype(wide), jnp.zeros(x.shape[0], wide)),
            (weights, condition, probes),
            stepsize_controller=solver.PIDController(**limits, norm=_largest_error),
            adjoint=_adjoint(solver, self.adjoint, limits),
            max_steps=self.max_steps,
            throw=False,
        )
        has_ended = found.result == solver.RESULTS.successful
        is_done = is_given & has_ended
        void = _nothing_of((weights, x, condition), jnp.where(has_ended, 0, jnp.nan).astype(wide))
        y, total = (jnp.where(per_example(is_given, leaf[-1]), leaf[-1] + void, jnp.nan) for leaf in found.ys)
        log_det = -total if backwards else total
        residual = jnp.where(is_done, 0, jnp.inf).astype(x.dtype)
        steps = jnp.broadcast_to(found.stats["num_steps"].astype(jnp.int32), x.shape[:1])
        return _Solution(y.astype(x.dtype), log_det.astype(x.dtype), InverseStatus(steps, residual, residual, is_done))

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        return self._run(x, None, WithoutLogDet(), condition, backwards=False).end

    def forward_with_status(
        self,
        x: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
    ) -> tuple[Array, Array, InverseStatus]:
        """(y, log_det, status): as `forward`, and how the solve ended; the fields of the status are [B]."""
        x = as_float_batch("x", x, self.event_shape)
        check_key("key", key, optional=True)
        check_events(self, x)
        condition = as_condition(condition, self.condition_shape, x.shape[:1], x.dtype)
        return self._run(x, key, checked_estimator(estimator, 0), condition, backwards=False)

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        found = self._run(x, key, estimator, condition, backwards=False)
        return found.end, found.log_det, []

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        found = self._run(y, None, WithoutLogDet(), condition, backwards=True)
        return found.end, [as_row(found.status)]

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        found = self._run(y, key, estimator, condition, backwards=True)
        return found.end, found.log_det, [], [as_row(found.status)]


def _right_side(graphdef: Any, dtype: Any, wide: Any, trace: Trace) -> Any:
    """The equation for (x, log_det). It closes over no array, since diffrax keeps it in its caches."""

    def right_side(t, state, args):
        weights, condition, probes = args
        module, t = nnx.merge(graphdef, weights), t.astype(dtype)

        def field(x):
            f_x = call_unchanged("field", module, t, x, *(() if condition is None else (condition,)))
            check_like("field", f_x, x)
            return f_x

        value, divergence = trace.with_value(field, state[0].astype(dtype), probes)
        return value.astype(wide), divergence.astype(wide)

    return right_side


def _nothing_of(inputs: Any, zero: Array) -> Array:
    """0, or NaN if `zero` is NaN, with derivatives of 0 or NaN in all floats of a pytree.

    A constant NaN would have derivatives of zero, and the adjoint equation of a solve that failed may give zeros too.
    """
    floats = [leaf for leaf in jax.tree.leaves(inputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.sum(_finite(leaf).astype(zero.dtype) * zero) for leaf in floats), zero)


def _finite(x: Array) -> Array:
    """x with 0 in the place of numbers that are not finite, such as those of an attention mask."""
    return jnp.where(jnp.isfinite(x), x, 0)


class _Solution(NamedTuple):
    end: Array
    log_det: Array
    status: InverseStatus


def diffrax() -> Any:
    """The module diffrax.

    Raises:
      ImportError: if it is not installed; the message says how to install it.
    """
    try:
        import diffrax
    except ImportError as error:
        message = f"rf.ContinuousBlock needs the extra diffrax: pip install 'resflow_jax[diffrax]' ({error})"
        raise ImportError(message) from error
    return diffrax


def _largest_error(tree: Any) -> Array:
    """The largest of the root mean square errors of the examples."""
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(jnp.square(leaf).reshape(leaf.shape[0], -1), axis=1) for leaf in leaves)
    mean = jnp.max(total) / sum(leaf[0].size for leaf in leaves)
    # The derivative of a norm is not defined at zero. A step to values that are not finite has to be repeated.
    is_regular = (mean > 0) & jnp.isfinite(mean)
    return jnp.where(is_regular, jnp.sqrt(jnp.where(is_regular, mean, 1)), jnp.where(mean == 0, 0, jnp.inf))


def check_times(time: float, tolerance: float) -> None:
    """Raises ValueError unless both are positive and finite."""
    for name, value in (("time", time), ("tolerance", tolerance)):
        check_positive(name, value)
        check_finite(name, value)


def _with_finite(batch: Array, is_given: Array) -> Array:
    """The batch, in which the first example that is given replaces those that are not given."""
    first = batch[jnp.argmax(is_given)]
    return jnp.where(per_example(is_given, batch), batch, jnp.where(jnp.isfinite(first), first, 0))


def _are_finite(batch: Array) -> Array:
    """Whether all elements of each example are finite, [B]."""
    return jnp.isfinite(batch).reshape(batch.shape[0], -1).all(axis=1)


def _adjoint(solver: Any, name: str, limits: dict[str, float]) -> Any:
    if name == "checkpointed":
        return solver.RecursiveCheckpointAdjoint()
    if name == "direct":
        return solver.DirectAdjoint()
    controller = solver.PIDController(**limits, norm=solver.adjoint_rms_seminorm)
    return solver.BacksolveAdjoint(solver=solver.Tsit5(), stepsize_controller=controller)
