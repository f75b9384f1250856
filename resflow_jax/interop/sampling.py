"""A flow as the map that samples: z -> x and back, as pure functions of a pytree, for any leading axes.

    x = f^-1(z),   log|det dx/dz| = -log|det df/dx| at x

Libraries of distributions push a simple base distribution forward: what they call forward is the
inverse of `ResidualFlow.forward`, which maps x to z. `SamplingMap` is what their interfaces are made of here.

Shapes: z [..., D], x [..., *event_shape], log-dets [...] in nats. All leading axes make one batch, whose example n gets
noise of its own, by its number. Under `jax.vmap` every example is number 0: all share one probe, and estimates of
their log-dets are each unbiased, but not independent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx

from resflow_jax.functional.estimators import Estimator, Exact, Roulette, check_estimator
from resflow_jax.functional.solvers import Solver
from resflow_jax.models.config import ImageFlowConfig
from resflow_jax.models.flow import ResidualFlow, standard_normal_log_prob

Array = jax.Array


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
        if flow.config.padding:
            raise ValueError(
                f"flow: expected one without padding, which makes it no bijection, got padding={flow.config.padding}"
            )
        estimator = Roulette() if estimator is None else estimator
        check_estimator(estimator)
        if key is None and not isinstance(estimator, Exact):
            raise ValueError(
                f"key: {type(estimator).__name__} expected a PRNG key, got None; estimator=Exact() needs none"
            )
        graphdef, state = nnx.split(flow)
        unit_interval = isinstance(flow.config, ImageFlowConfig) and flow.config.logit_alpha is not None
        return cls(state, key, estimator, graphdef, solver, flow.dim, flow.event_shape, unit_interval)

    @property
    def flow(self) -> ResidualFlow:
        """The flow, made anew of its state."""
        return nnx.merge(self.graphdef, self.state)

    def generate(self, z: Array) -> Array:
        """x [..., *event_shape] of z [..., D]. A solve that does not converge warns or raises as the solver says."""
        return _over_batch(partial(_generate, self), z, 1)[0]

    def generate_and_log_det(self, z: Array) -> tuple[Array, Array]:
        """x and log|det dx/dz| [...] of z [..., D]; what does not converge is reported as by `generate`."""
        return _over_batch(partial(_generate_and_log_det, self), z, 1)

    def encode(self, x: Array) -> Array:
        """z [..., D] of x [..., *event_shape]."""
        return _over_batch(partial(_encode, self), x, len(self.event_shape))[0]

    def encode_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """z and log|det dz/dx| [...] of x [..., *event_shape]."""
        return _over_batch(partial(_encode_and_log_det, self), x, len(self.event_shape))

    def is_same(self, other: Any) -> bool:
        """Whether both are surely equal: the very same arrays and settings. Works on traced arrays."""
        (mine, structure), (theirs, other_structure) = map(jax.tree.flatten, (self, other))
        return structure == other_structure and all(a is b for a, b in zip(mine, theirs, strict=True))


def _over_batch(function: Callable[[Array], tuple[Array, ...]], x: Array, event_ndims: int) -> tuple[Array, ...]:
    """A function of [B, ...] to arrays [B, ...], for x with any number of axes in front of its event's."""
    if x.ndim < event_ndims:
        raise ValueError(f"expected an array with {event_ndims} axes of an event at least, got shape {x.shape}")
    batch, event = x.shape[: x.ndim - event_ndims], x.shape[x.ndim - event_ndims :]
    outputs = function(x.reshape(math.prod(batch), *event))
    return tuple(output.reshape(*batch, *output.shape[1:]) for output in outputs)


# Traced, for the flow to leave the values of x alone: its own samples may lie outside of [0, 1] by a little.
@jax.jit
def _generate(sampling, z):
    return (sampling.flow.inverse(z, solver=sampling.solver),)


@jax.jit
def _generate_and_log_det(sampling, z):
    options = {"key": sampling.key, "estimator": sampling.estimator, "solver": sampling.solver}
    x, log_prob = sampling.flow.inverse_and_log_prob(z, **options)
    return x, standard_normal_log_prob(z.astype(x.dtype)) - log_prob


@jax.jit
def _encode(sampling, x):
    return (sampling.flow(x),)


@jax.jit
def _encode_and_log_det(sampling, x):
    return sampling.flow.forward(x, key=sampling.key, estimator=sampling.estimator)
