"""The map of a flow from z to x and back, as pure functions of a pytree, for any leading axes.

    x = f^-1(z),   log|det dx/dz| = -log|det df/dx| at x

Libraries of distributions push a simple base distribution forward. What they call forward is the inverse of
`Flow.forward`, which maps x to z. The bridges to these libraries are made of `SamplingMap`.

Shapes: z [..., *latent_shape], x [..., *event_shape], log-dets [...] in nats. A condition is part of the map. It is
[*condition_shape], one for all examples, or has leading axes that broadcast with those of z or x. A flow whose
`condition_shape` is `...` takes one condition for all. All leading axes make one batch, and example n has its own noise
by its number in the batch. Under `jax.vmap` every example is number 0: all share one probe, and the estimates of their
log-dets are each unbiased but not independent. Two estimates at the same point thus agree if its number in the batch is
the same, and differ by noise otherwise; with `Exact` they always agree.

Solves of z -> x that do not converge are reported as the solver's `on_failure` says. Eager calls warn or raise.
Programs inside `jax.jit` and `jax.vmap`, which some of these libraries use even in eager calls, can do neither: the
result is then the best guess ("warn"), or NaN for the example ("raise"). Derivatives of such a solve are always NaN.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import check_key, check_type
from resflow_jax.functional.estimators import Estimator, Roulette, check_estimator, needs_key
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.opaque import as_tree
from resflow_jax.functional.solvers import Solver
from resflow_jax.layers.conditions import as_condition
from resflow_jax.models.flow import Flow

Array = jax.Array

_INVERSE = "the inverse of the flow"  # in messages


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "key", "estimator", "condition"),
    meta_fields=("graphdef", "solver", "latent_shape", "event_shape", "condition_shape"),
)
@dataclass(frozen=True)
class SamplingMap:
    """The map of one flow from z to x, with the key and estimator of its log-det and the solver of its inverse.

    It is deterministic: the key fixes the noise of the estimates. Values are not checked. For x outside of the flow's
    domain, such as images beyond [0, 1] by more than the logit's alpha / (1 - 2 alpha), the result is NaN.

    Attributes:
      state, graphdef: the flow, from `nnx.split`.
      key, estimator, solver: as `Flow.forward` and `Flow.inverse` take them.
      condition: [*condition_shape], or [..., *condition_shape]; None for a flow that takes none.
      latent_shape: shape of one z.
      event_shape: shape of one x.
      condition_shape: shape of one condition; None if the flow takes none.
    """

    state: Any
    key: Array | None
    estimator: Estimator
    condition: Array | None
    graphdef: Any
    solver: Solver
    latent_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    condition_shape: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        flow: Flow,
        key: Array | None,
        estimator: Estimator | None,
        solver: Solver,
        condition: Array | None = None,
    ) -> "SamplingMap":
        """Makes the map of a flow as it is now. Later changes of the flow do not change the map.

        Raises:
          ValueError: if flow is not a `Flow`, for a flow that pads x or has no density, an unknown estimator, a missing
            key, and a condition that is missing, not expected, or does not end in the flow's condition shape.
        """
        check_type("flow", flow, Flow)
        if flow.pads:
            raise ValueError("flow: expected a flow without padding, which is not a bijection, got one that pads x")
        if flow.no_density is not None:
            raise ValueError(f"flow: expected a flow with a density; {flow.no_density}")
        estimator = Roulette() if estimator is None else estimator
        check_estimator(estimator)
        check_solver(solver)
        check_key("key", key, optional=True)
        if key is None and needs_key(estimator):
            raise ValueError(
                f"key: {type(estimator).__name__} expected a PRNG key, got None; estimator=Exact() needs none"
            )
        estimator = as_tree(estimator)
        graphdef, state = nnx.split(nnx.clone(flow))  # a split alone would share the variables of the flow
        condition, condition_shape = _checked_condition(flow, condition)
        shapes = flow.latent_shape, flow.event_shape, condition_shape
        return cls(state, key, estimator, condition, graphdef, solver, *shapes)

    @property
    def flow(self) -> Flow:
        """A new flow from the state."""
        return nnx.merge(self.graphdef, self.state, copy=True)

    @property
    def condition_batch(self) -> tuple[int, ...]:
        """The leading axes of the condition; () if it is one for all."""
        return () if self.condition is None else self.condition.shape[: self.condition.ndim - len(self.condition_shape)]

    @property
    def support(self) -> tuple[Any, Any] | None:
        """Lower and upper ends of the x that the bijector of the flow takes; None for all reals."""
        return self.flow.bijector.support

    def clip(self, x: Array) -> Array:
        """Clips x to the support, as `Flow.sample` does."""
        ends = self.support
        return x if ends is None else jnp.clip(x, *(trailing(jnp.asarray(end, x.dtype), x) for end in ends))

    def generate(self, z: Array) -> Array:
        """x [..., *event_shape] of z [..., *latent_shape]. The module's head says what a failed solve gives."""
        z, batch = self._as_batch("z", z, self.latent_shape)
        x, status = _generate(*self._with_limits(batch), z)
        return _split_batch(reported(x, status, _INVERSE, self.solver.on_failure), batch)

    def generate_and_log_det(self, z: Array) -> tuple[Array, Array]:
        """x and log|det dx/dz| [...] of z [..., *latent_shape]; reports as `generate`."""
        z, batch = self._as_batch("z", z, self.latent_shape)
        result, status = _generate_and_log_det(*self._with_limits(batch), z)
        return _split_batch(reported(result, status, _INVERSE, self.solver.on_failure), batch)

    def encode(self, x: Array) -> Array:
        """z [..., *latent_shape] of x [..., *event_shape]."""
        x, batch = self._as_batch("x", x, self.event_shape)
        return _split_batch(_encode(*self._with_limits(batch), x), batch)

    def encode_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """z and log|det dz/dx| [...] of x [..., *event_shape]."""
        x, batch = self._as_batch("x", x, self.event_shape)
        return _split_batch(_encode_and_log_det(*self._with_limits(batch), x), batch)

    def _as_batch(self, name: str, x: Array, event: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
        """x as one batch [B, *event], and the leading axes that B stands for, those of the condition included."""
        if x.ndim < len(event):
            raise ValueError(f"{name}: expected at least {len(event)} axes, those of an event, got shape {x.shape}")
        batch, found = x.shape[: x.ndim - len(event)], x.shape[x.ndim - len(event) :]
        whole = self._broadcast(name, batch)
        if whole != batch:
            x = jnp.broadcast_to(x.reshape(*[1] * (len(whole) - len(batch)), *x.shape), (*whole, *found))
        return x.reshape(math.prod(whole), *found), whole

    def _broadcast(self, name: str, batch: tuple[int, ...]) -> tuple[int, ...]:
        """The leading axes of events and of the condition, broadcast."""
        try:
            return jnp.broadcast_shapes(batch, self.condition_batch)
        except ValueError as error:
            expected = f"leading axes that broadcast with {batch}, those of {name}"
            raise ValueError(f"condition: expected {expected}, got {self.condition_batch}") from error

    def _with_limits(self, batch: tuple[int, ...]) -> tuple["SamplingMap", tuple[float | None, int]]:
        """The map without the tolerance and the cap of its solver, and these two.

        They are arguments of compiled programs, so that other values need no other program. The condition becomes
        [B, *condition_shape].
        """
        solver, condition = self.solver, self.condition
        rule = replace(solver, tolerance=None, max_iterations=1)
        if condition is not None:
            ones = [1] * (len(batch) + len(self.condition_shape) - condition.ndim)
            condition = condition.reshape(*ones, *condition.shape)
            condition = jnp.broadcast_to(condition, (*batch, *self.condition_shape))
            condition = condition.reshape(math.prod(batch), *self.condition_shape)
        return replace(self, solver=rule, condition=condition), (solver.tolerance, solver.max_iterations)

    def is_same(self, other: Any) -> bool:
        """Whether both have the same settings and the very same arrays. It works on traced arrays."""
        (mine, structure), (theirs, other_structure) = map(jax.tree.flatten, (self, other))
        return structure == other_structure and all(a is b for a, b in zip(mine, theirs, strict=True))


def _checked_condition(flow: Flow, condition: Any) -> tuple[Array | None, tuple[int, ...] | None]:
    """The condition as an array of the flow's dtype, and the shape of one condition."""
    shape = flow.condition_shape
    if shape is None:
        return as_condition(condition, None, ()), None
    if condition is None:
        text = "..." if shape is ... else ", ".join(map(str, shape))
        raise ValueError(f"condition: expected floats [{text}], one for all, or with leading axes, got None")
    if shape is ...:  # any array is one condition for all
        shape = jnp.shape(condition)
    leading = jnp.shape(condition)[: max(0, jnp.ndim(condition) - len(shape))]
    return as_condition(condition, shape, leading, flow.dtype), tuple(shape)


def _split_batch(outputs: Any, batch: tuple[int, ...]) -> Any:
    """Arrays [B, ...] with the leading axes that `_as_batch` made one."""
    return jax.tree.map(lambda output: output.reshape(*batch, *output.shape[1:]), outputs)


# Traced, so that the flow does not check the values of x: its own samples may lie a little outside of [0, 1].
@jax.jit
def _generate(sampling, limits, z):
    options = {"solver": sampling.solver.with_limits(limits), "condition": sampling.condition}
    return sampling.flow.inverse(z, **options, return_status=True)


@jax.jit
def _generate_and_log_det(sampling, limits, z):
    options = {"key": sampling.key, "estimator": sampling.estimator, "solver": sampling.solver.with_limits(limits)}
    found = sampling.flow._solution(z, sampling.condition, **options)
    return (found.x, -found.log_det), found.status  # not from log p(x), which rounds as log p(z) does


@jax.jit
def _encode(sampling, limits, x):
    return sampling.flow(x, sampling.condition)


@jax.jit
def _encode_and_log_det(sampling, limits, x):
    options = {"key": sampling.key, "estimator": sampling.estimator, "condition": sampling.condition}
    return sampling.flow.forward(x, **options)
