"""A flow as the map that samples: z -> x and back, as pure functions of a pytree, for any leading axes.

    x = f^-1(z),   log|det dx/dz| = -log|det df/dx| at x

Libraries of distributions push a simple base distribution forward: what they call forward is the
inverse of `Flow.forward`, which maps x to z. `SamplingMap` is what their interfaces are made of here.

Shapes: z [..., *latent_shape], x [..., *event_shape], log-dets [...] in nats. A condition c is part of the map: of
shape [*condition_shape], one for all examples, or with leading axes that broadcast with those of z or x. For a flow
whose `condition_shape` is `...` it is one for all. All leading axes make one batch, whose example n gets noise of its
own, by its number. Under `jax.vmap` every example is number 0: all share one probe, and estimates of their log-dets are
each unbiased, but not independent. So two estimates at the same point agree where its number in the batch is the same,
and differ by noise elsewhere; with `Exact` they always agree.

Solves of z -> x that do not converge are reported as the solver's `on_failure` says. Eager calls warn or raise. Inside
`jax.jit` and `jax.vmap`, which some of these libraries use even in eager calls, nothing can be said: the result is then
the best guess ("warn"), or NaN for the example ("raise"). Derivatives of such a solve are NaN in any case.
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
    """z -> x of one flow, with the key and the estimator of its log-det and the solver of its inverse; see `of`.

    Deterministic: the noise of an estimate is fixed by the key. Values are not checked: where x is outside of the
    flow's domain, as for images beyond [0, 1] by more than the logit's alpha / (1 - 2 alpha), the result is NaN.

    Attributes:
      state, graphdef: of the flow, from `nnx.split`.
      key, estimator, solver: as `Flow.forward` and `Flow.inverse` take them.
      condition: [*condition_shape], or [..., *condition_shape]; None for a flow that takes none.
      latent_shape: of one z.
      event_shape: of one x.
      condition_shape: of one condition; None for no condition.
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
        """The map of a flow as it is now: later changes of the flow do not reach it.

        Raises:
          ValueError: for what is no `Flow`, a flow that pads x, an unknown estimator, a missing key, and a condition
            that is missing, not expected, or does not end in the flow's condition shape.
        """
        check_type("flow", flow, Flow)
        if flow.pads:
            raise ValueError("flow: expected one without padding, which makes it no bijection, got one that pads x")
        estimator = Roulette() if estimator is None else estimator
        check_estimator(estimator)
        check_solver(solver)
        check_key("key", key, optional=True)
        if key is None and needs_key(estimator):
            raise ValueError(
                f"key: {type(estimator).__name__} expected a PRNG key, got None; estimator=Exact() needs none"
            )
        graphdef, state = nnx.split(nnx.clone(flow))  # a mere split has the flow's own variables, not their values
        condition, condition_shape = _checked_condition(flow, condition)
        shapes = flow.latent_shape, flow.event_shape, condition_shape
        return cls(state, key, estimator, condition, graphdef, solver, *shapes)

    @property
    def flow(self) -> Flow:
        """The flow, made anew of its state."""
        return nnx.merge(self.graphdef, self.state, copy=True)

    @property
    def condition_batch(self) -> tuple[int, ...]:
        """The leading axes of the condition; none where it is one for all."""
        return () if self.condition is None else self.condition.shape[: self.condition.ndim - len(self.condition_shape)]

    @property
    def support(self) -> tuple[Any, Any] | None:
        """Lower and upper ends of x, or None: what the flow's bijector takes."""
        return self.flow.bijector.support

    def clip(self, x: Array) -> Array:
        """x, clipped to the support as by `Flow.sample`."""
        ends = self.support
        return x if ends is None else jnp.clip(x, *(trailing(jnp.asarray(end, x.dtype), x) for end in ends))

    def generate(self, z: Array) -> Array:
        """x [..., *event_shape] of z [..., *latent_shape]. For a solve that does not converge see the module's head."""
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
        """x with all axes in front of its event's as one, [B, *event], and these axes, those of the condition too."""
        if x.ndim < len(event):
            raise ValueError(f"{name}: expected at least {len(event)} axes, those of an event, got shape {x.shape}")
        batch, found = x.shape[: x.ndim - len(event)], x.shape[x.ndim - len(event) :]
        whole = self._broadcast(name, batch)
        if whole != batch:
            x = jnp.broadcast_to(x.reshape(*[1] * (len(whole) - len(batch)), *x.shape), (*whole, *found))
        return x.reshape(math.prod(whole), *found), whole

    def _broadcast(self, name: str, batch: tuple[int, ...]) -> tuple[int, ...]:
        """The axes in front of an event, and of the condition."""
        try:
            return jnp.broadcast_shapes(batch, self.condition_batch)
        except ValueError as error:
            expected = f"leading axes that broadcast with {batch}, those of {name}"
            raise ValueError(f"condition: expected {expected}, got {self.condition_batch}") from error

    def _with_limits(self, batch: tuple[int, ...]) -> tuple["SamplingMap", tuple[float | None, int]]:
        """The map without its solver's tolerance and cap, which a program is compiled for, and these, its arguments.

        The condition is that of the batch, [B, *condition_shape].
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
        """Whether both are surely equal: the very same arrays and settings. Works on traced arrays."""
        (mine, structure), (theirs, other_structure) = map(jax.tree.flatten, (self, other))
        return structure == other_structure and all(a is b for a, b in zip(mine, theirs, strict=True))


def _checked_condition(flow: Flow, condition: Any) -> tuple[Array | None, tuple[int, ...] | None]:
    """The condition as an array of the flow's dtype, and the shape of one."""
    shape = flow.condition_shape
    if shape is None:
        return as_condition(condition, None, ()), None
    if condition is None:
        text = "..." if shape is ... else ", ".join(map(str, shape))
        raise ValueError(f"condition: expected floats [{text}], one for all, or with leading axes, got None")
    if shape is ...:  # whatever is given is one condition for all
        shape = jnp.shape(condition)
    leading = jnp.shape(condition)[: max(0, jnp.ndim(condition) - len(shape))]
    return as_condition(condition, shape, leading).astype(flow.dtype), tuple(shape)


def _split_batch(outputs: Any, batch: tuple[int, ...]) -> Any:
    """Arrays [B, ...] with the axes of `_as_batch` again."""
    return jax.tree.map(lambda output: output.reshape(*batch, *output.shape[1:]), outputs)


# Traced, for the flow to leave the values of x alone: its own samples may lie outside of [0, 1] by a little.
@jax.jit
def _generate(sampling, limits, z):
    options = {"solver": sampling.solver.with_limits(limits), "condition": sampling.condition}
    return sampling.flow.inverse(z, **options, return_status=True)


@jax.jit
def _generate_and_log_det(sampling, limits, z):
    options = {"key": sampling.key, "estimator": sampling.estimator, "solver": sampling.solver.with_limits(limits)}
    flow, condition = sampling.flow, sampling.condition
    x, log_prob, status = flow.inverse_and_log_prob(z, **options, condition=condition, return_status=True)
    return (x, flow.base_log_prob(z.astype(x.dtype), condition) - log_prob), status


@jax.jit
def _encode(sampling, limits, x):
    return sampling.flow(x, sampling.condition)


@jax.jit
def _encode_and_log_det(sampling, limits, x):
    options = {"key": sampling.key, "estimator": sampling.estimator, "condition": sampling.condition}
    return sampling.flow.forward(x, **options)
