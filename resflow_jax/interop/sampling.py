"""A flow as the map that samples: z -> x and back, as pure functions of a pytree, for any leading axes.

    x = f^-1(z),   log|det dx/dz| = -log|det df/dx| at x

Libraries of distributions push a simple base distribution forward: what they call forward is the
inverse of `ResidualFlow.forward`, which maps x to z. `SamplingMap` is what their interfaces are made of here.

Shapes: z [..., D], x [..., *event_shape], log-dets [...] in nats. All leading axes make one batch, whose example n gets
noise of its own, by its number. Under `jax.vmap` every example is number 0: all share one probe, and estimates of
their log-dets are each unbiased, but not independent. So two estimates at the same point agree where its number in the
batch is the same, and differ by noise elsewhere; with `Exact` they always agree.

Solves of z -> x that do not converge are reported as the solver's `on_failure` says. Eager calls warn or raise. Inside
`jax.jit` and `jax.vmap`, which some of these libraries use even in eager calls, nothing can be said: the result is then
the best guess ("warn"), or NaN for the example ("raise"). Derivatives of such a solve are NaN in any case.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx

from resflow_jax.functional.checks import check_key
from resflow_jax.functional.estimators import Estimator, Exact, Roulette, check_estimator
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.solvers import Solver
from resflow_jax.models.bases import standard_normal_log_prob
from resflow_jax.models.config import ImageFlowConfig
from resflow_jax.models.residual_flow import ResidualFlow

Array = jax.Array

_INVERSE = "the inverse of the flow"  # in messages


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "key", "estimator"),
    meta_fields=("graphdef", "solver", "dim", "event_shape", "unit_interval"),
)
@dataclass(frozen=True)
class SamplingMap:
    """z -> x of one flow, with the key and the estimator of its log-det and the solver of its inverse; see `of`.

    Deterministic: the noise of an estimate is fixed by the key. Values are not checked: where x is outside of the
    flow's domain, as for images beyond [0, 1] by more than the logit's alpha / (1 - 2 alpha), the result is NaN.

    Attributes:
      state, graphdef: of the flow, from `nnx.split`.
      key, estimator, solver: as `ResidualFlow.forward` and `ResidualFlow.inverse` take them.
      dim: D, the size of z.
      event_shape: of one x.
      unit_interval: whether x has values in [0, 1].
    """

    state: Any
    key: Array | None
    estimator: Estimator
    graphdef: Any
    solver: Solver
    dim: int
    event_shape: tuple[int, ...]
    unit_interval: bool

    @classmethod
    def of(cls, flow: ResidualFlow, key: Array | None, estimator: Estimator | None, solver: Solver) -> "SamplingMap":
        """The map of a flow as it is now: later changes of the flow do not reach it.

        Raises:
          ValueError: for what is no `ResidualFlow`, a flow that pads x, an unknown estimator, and a missing key.
        """
        if not isinstance(flow, ResidualFlow):
            raise ValueError(f"flow: expected a ResidualFlow, got {type(flow).__name__}")
        if flow.pads:
            raise ValueError("flow: expected one without padding, which makes it no bijection, got one that pads x")
        estimator = Roulette() if estimator is None else estimator
        check_estimator(estimator)
        check_solver(solver)
        check_key("key", key, optional=True)
        if key is None and not isinstance(estimator, Exact):
            raise ValueError(
                f"key: {type(estimator).__name__} expected a PRNG key, got None; estimator=Exact() needs none"
            )
        graphdef, state = nnx.split(nnx.clone(flow))  # a mere split has the flow's own variables, not their values
        unit_interval = isinstance(flow.config, ImageFlowConfig) and flow.config.data.logit_alpha is not None
        return cls(state, key, estimator, graphdef, solver, flow.dim, flow.event_shape, unit_interval)

    @property
    def flow(self) -> ResidualFlow:
        """The flow, made anew of its state."""
        return nnx.merge(self.graphdef, self.state, copy=True)

    def generate(self, z: Array) -> Array:
        """x [..., *event_shape] of z [..., D]. For a solve that does not converge see the module's head."""
        z, batch = _as_batch("z", z, 1)
        x, status = _generate(*self._with_limits(), z)
        return _split_batch(reported(x, status, _INVERSE, self.solver.on_failure), batch)

    def generate_and_log_det(self, z: Array) -> tuple[Array, Array]:
        """x and log|det dx/dz| [...] of z [..., D]; what does not converge is reported as by `generate`."""
        z, batch = _as_batch("z", z, 1)
        result, status = _generate_and_log_det(*self._with_limits(), z)
        return _split_batch(reported(result, status, _INVERSE, self.solver.on_failure), batch)

    def encode(self, x: Array) -> Array:
        """z [..., D] of x [..., *event_shape]."""
        x, batch = _as_batch("x", x, len(self.event_shape))
        return _split_batch(_encode(*self._with_limits(), x), batch)

    def encode_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """z and log|det dz/dx| [...] of x [..., *event_shape]."""
        x, batch = _as_batch("x", x, len(self.event_shape))
        return _split_batch(_encode_and_log_det(*self._with_limits(), x), batch)

    def _with_limits(self) -> tuple["SamplingMap", tuple[float | None, int]]:
        """The map without its solver's tolerance and cap, which a program is compiled for, and these, its arguments."""
        solver = self.solver
        rule = replace(solver, tolerance=None, max_iterations=1)
        return replace(self, solver=rule), (solver.tolerance, solver.max_iterations)

    def is_same(self, other: Any) -> bool:
        """Whether both are surely equal: the very same arrays and settings. Works on traced arrays."""
        (mine, structure), (theirs, other_structure) = map(jax.tree.flatten, (self, other))
        return structure == other_structure and all(a is b for a, b in zip(mine, theirs, strict=True))


def _as_batch(name: str, x: Array, event_ndims: int) -> tuple[Array, tuple[int, ...]]:
    """x with all axes in front of its event's as one, [B, *event], and these axes."""
    if x.ndim < event_ndims:
        raise ValueError(f"{name}: expected at least {event_ndims} axes, those of an event, got shape {x.shape}")
    batch, event = x.shape[: x.ndim - event_ndims], x.shape[x.ndim - event_ndims :]
    return x.reshape(math.prod(batch), *event), batch


def _split_batch(outputs: Any, batch: tuple[int, ...]) -> Any:
    """Arrays [B, ...] with the axes of `_as_batch` again."""
    return jax.tree.map(lambda output: output.reshape(*batch, *output.shape[1:]), outputs)


# Traced, for the flow to leave the values of x alone: its own samples may lie outside of [0, 1] by a little.
@jax.jit
def _generate(sampling, limits, z):
    return sampling.flow.inverse(z, solver=sampling.solver.with_limits(limits), return_status=True)


@jax.jit
def _generate_and_log_det(sampling, limits, z):
    options = {"key": sampling.key, "estimator": sampling.estimator, "solver": sampling.solver.with_limits(limits)}
    x, log_prob, status = sampling.flow.inverse_and_log_prob(z, **options, return_status=True)
    return (x, standard_normal_log_prob(z.astype(x.dtype)) - log_prob), status


@jax.jit
def _encode(sampling, limits, x):
    return sampling.flow(x)


@jax.jit
def _encode_and_log_det(sampling, limits, x):
    return sampling.flow.forward(x, key=sampling.key, estimator=sampling.estimator)
