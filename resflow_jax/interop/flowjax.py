"""Flows and residual blocks as bijections of flowjax, trainable by its loops; needs the extra "flowjax".

    Transformed(StandardNormal(flow.event_shape), FlowBijection(flow))     a flow made by this library
    Invert(ResidualBijection(contractive(g), shape))                       a block around a network of Equinox
    Invert(ResidualBijection(g, shape, cond_shape=(2,)))                   the same with g(x, condition)

The base of a flow is no part of its bijection: for a flow with another one than `StandardNormal`, take the distribution
of flowjax that is the same.

flowjax's `transform` makes samples and its `inverse` takes data, so `FlowBijection.transform` is the inverse of
`Flow.forward`. flowjax maps one event at a time, without randomness of its own, and vmaps: with a fixed key an
estimate's noise would be the same in every example and step, and training would fit it. `Exact()` is the default here;
it takes D vjps of each g, and suits the low dimensions that flowjax is for.

Its distributions vmap even in eager calls, and nothing can be said from inside of a vmap: where a solve does not
converge, the event is then the best guess with a solver of on_failure="warn", and NaN with "raise". A method called
eagerly by itself warns or raises. Derivatives of a solve that did not converge are NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_callable, check_count, check_key, check_open_interval, check_type
from resflow_jax.functional.estimators import Estimator, Exact, check_estimator, needs_key
from resflow_jax.functional.inverse import check_solver, residual_inverse
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.interop.extras import needs_extra
from resflow_jax.interop.norms import advance_norms
from resflow_jax.interop.sampling import SamplingMap
from resflow_jax.models.flow import Flow

with needs_extra("flowjax"):
    import equinox as eqx
    import paramax
    from flowjax.bijections import AbstractBijection

Array = jax.Array

_EXACT = Exact()


class FlowBijection(AbstractBijection):
    """z -> x of a whole flow. z has the shape of x: the flow's z, in its order, reshaped.

    The flow's parameters are trainable leaves. Power-iteration vectors, running statistics and constants are
    `paramax.NonTrainable`; as nothing in flowjax's loops would advance the vectors, every evaluation does, from where
    they were when the bijection was made to the present parameters. `FlowBijection(bijection.to_flow())` starts the
    next fit from converged ones.

    Attributes:
      params: `nnx.Param` of the flow.
      non_params: its other variables.
      key, estimator: of the log-det; see the module's head.
      solver: of z -> x. For what does not converge see the module's head.
      max_iterations: cap on the power iterations of an evaluation, which ends earlier where they converge.
      shape: of x.
      cond_shape: of one condition, that of the flow; None for none.
    """

    params: nnx.State
    non_params: paramax.NonTrainable
    key: Array | None
    estimator: paramax.NonTrainable
    graphdef: Any = eqx.field(static=True)
    solver: Solver = eqx.field(static=True)
    max_iterations: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        flow: Flow,
        key: Array | None = None,
        *,
        estimator: Estimator = _EXACT,
        solver: Solver = Anderson(),
        max_iterations: int = 200,
    ):
        """Takes the flow as it is now.

        Raises:
          ValueError: for a flow with padding, which is no bijection, a conditional flow that does not know the shape of
            its condition, an unknown estimator, and a missing key.
        """
        check_type("flow", flow, Flow)
        if flow.condition_shape is ...:
            raise ValueError("flow: expected one that knows the shape of its condition, got condition_shape=...")
        example = None if flow.condition_shape is None else jnp.zeros(flow.condition_shape)
        SamplingMap.of(flow, key, estimator, solver, example)
        check_count("max_iterations", max_iterations, 1)
        self.graphdef, self.params, non_params = nnx.split(nnx.clone(flow), nnx.Param, ...)
        self.non_params = paramax.NonTrainable(non_params)
        self.key = key
        self.estimator = paramax.NonTrainable(estimator)
        self.solver = solver
        self.max_iterations = max_iterations
        self.shape = flow.event_shape
        self.cond_shape = flow.condition_shape

    def transform(self, x: Array, condition: Array | None = None) -> Array:
        bijection, x, condition = _unwrapped(self, x, condition)
        sampling = bijection._sampling(condition)
        return sampling.generate(x.reshape(sampling.latent_shape))

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        sampling = self._sampling(condition)
        return sampling.generate_and_log_det(x.reshape(sampling.latent_shape))

    def inverse(self, y: Array, condition: Array | None = None) -> Array:
        bijection, y, condition = _unwrapped(self, y, condition)
        return bijection._sampling(condition).encode(y).reshape(self.shape)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        z, log_det = self._sampling(condition).encode_and_log_det(y)
        return z.reshape(self.shape), log_det

    def _sampling(self, condition: Array | None) -> SamplingMap:
        """Of the unwrapped bijection."""
        non_params = advance_norms(self.graphdef, self.params, self.non_params, self.max_iterations)
        flow = nnx.merge(self.graphdef, self.params, non_params)
        condition = None if self.cond_shape is None else condition  # flowjax hands one to parts that take none
        return SamplingMap.of(flow, self.key, self.estimator, self.solver, condition)

    def to_flow(self) -> Flow:
        """The flow with the present parameters, its norms iterated to convergence."""
        flow = nnx.merge(self.graphdef, self.params, self.non_params.tree, copy=True)
        flow.converge_norms()
        return flow


class ResidualBijection(AbstractBijection):
    """x -> x + g(x), or x + g(x, condition), for any contraction g of one event; the inverse is solved.

    `flowjax.bijections.Invert` of it takes data without a solve, as training by maximum likelihood wants it.

    Attributes:
      g: any pytree that is a function of x [*shape] to the same shape, of Lipschitz constant below one, as of
        `contractive`; with `cond_shape`, of x and a condition, and a contraction in x for every condition. That is the
        caller's duty: where it fails, log-dets are wrong and solves do not converge.
      key, estimator, solver: as in `FlowBijection`.
      shape: of x.
      cond_shape: of one condition; None for no condition.
    """

    g: Callable[..., Array]
    key: Array | None
    estimator: paramax.NonTrainable
    solver: Solver = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        g: Callable[..., Array],
        shape: tuple[int, ...],
        key: Array | None = None,
        *,
        cond_shape: tuple[int, ...] | None = None,
        estimator: Estimator = _EXACT,
        solver: Solver = Anderson(),
    ):
        """Raises ValueError for a g that is no function, an unknown estimator or solver, and a missing key."""
        check_callable("g", g)
        check_estimator(estimator)
        check_solver(solver)
        check_key("key", key, optional=not needs_key(estimator))
        self.g = g
        self.key = key
        self.estimator = paramax.NonTrainable(estimator)
        self.solver = solver
        self.shape = shape
        self.cond_shape = cond_shape

    def transform(self, x: Array, condition: Array | None = None) -> Array:
        bijection, x, condition = _unwrapped(self, x, condition)
        return x + (bijection.g(x) if condition is None else bijection.g(x, condition))

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        y, log_det = self._residual(x[None], condition)
        return y[0], log_det[0]

    def inverse(self, y: Array, condition: Array | None = None) -> Array:
        bijection, y, condition = _unwrapped(self, y, condition)
        return bijection._solve(y[None], condition)[0]

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        x = self._solve(y[None], condition)
        _, log_det = self._residual(x, condition)
        return x[0], -log_det[0]

    def _residual(self, x: Array, condition: Array | None) -> tuple[Array, Array]:
        g, params = self._batched()
        options = {"key": self.key, "estimator": self.estimator, **self._given(condition)}
        return residual(g, params, x, **options)

    def _solve(self, y: Array, condition: Array | None) -> Array:
        g, params = self._batched()
        return residual_inverse(g, params, y, solver=self.solver, **self._given(condition))

    def _given(self, condition: Array | None) -> dict[str, Array]:
        """The condition of a batch of one; flowjax hands one to parts that take none."""
        return {} if self.cond_shape is None else {"condition": jnp.asarray(condition)[None]}

    def _batched(self) -> tuple[Callable[..., Array], Any]:
        """g as `residual` takes it: a function of its arrays and of x [B, *shape], and these arrays."""
        params, static = eqx.partition(self.g, eqx.is_array)
        return lambda params, *inputs: jax.vmap(eqx.combine(params, static))(*inputs), params


def _unwrapped(bijection: Any, x: Any, condition: Any) -> tuple[Any, Array, Array | None]:
    """The unwrapped bijection, x and condition as arrays: what flowjax does by itself for methods with a log-det.

    The methods without one spare it: `Exact` takes D vjps of each g.
    """
    x = jnp.asarray(x)
    if x.shape != bijection.shape:
        raise ValueError(f"x: expected shape {bijection.shape}, got {x.shape}")
    if bijection.cond_shape is None:
        return paramax.unwrap(bijection), x, None
    if condition is None:
        raise ValueError(f"condition: expected shape {bijection.cond_shape}, got None")
    condition = jnp.asarray(condition)
    if condition.shape != bijection.cond_shape:
        raise ValueError(f"condition: expected shape {bijection.cond_shape}, got {condition.shape}")
    return paramax.unwrap(bijection), x, condition


def contractive(module: Any, coefficient: float = 0.98) -> Any:
    """An Equinox module whose `eqx.nn.Linear` layers W are min(1, coefficient / |W|_2) W, whatever their parameters.

    With activations of Lipschitz constant one at most (relu, tanh, softplus, ...) a chain of such layers has a constant
    of at most coefficient ** layers. |W|_2 is exact, of a singular value decomposition at each evaluation: there are no
    vectors to keep up to date. The layers' weights become `paramax.Parameterize`; `paramax.unwrap` gives them back.
    """
    check_open_interval("coefficient", coefficient, 0, 1)

    def is_linear(node: Any) -> bool:
        return isinstance(node, eqx.nn.Linear)

    def bound(node: Any) -> Any:
        if not is_linear(node):
            return node
        weight = paramax.Parameterize(partial(_bounded, coefficient), node.weight)
        return eqx.tree_at(lambda linear: linear.weight, node, weight)

    return jax.tree.map(bound, module, is_leaf=is_linear)


def _bounded(coefficient: float, weight: Array) -> Array:
    return weight * jnp.minimum(1, coefficient / jnp.linalg.norm(weight, 2))
