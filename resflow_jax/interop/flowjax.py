"""Flows and residual blocks as bijections of flowjax, trainable by its loops; needs the extra "flowjax".

    Transformed(StandardNormal(flow.event_shape), FlowBijection(flow))     a flow made by this library
    Invert(ResidualBijection(contractive(g), shape))                       a block around a network of Equinox

flowjax's `transform` makes samples and its `inverse` takes data, so `FlowBijection.transform` is the inverse of
`ResidualFlow.forward`. flowjax maps one event at a time, without randomness of its own, and vmaps: with a fixed key an
estimate's noise would be the same in every example and step, and training would fit it. `Exact()` is the default here;
it takes D vjps of each g, and suits the low dimensions that flowjax is for.

Its distributions vmap even in eager calls, and nothing can be said from inside of a vmap: where a solve does not
converge, the event is then the best guess with a solver of on_failure="warn", and NaN with "raise". A method called
eagerly by itself warns or raises. Derivatives of a solve that did not converge are NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_callable, check_count, check_key, check_open_interval
from resflow_jax.functional.estimators import Estimator, Exact, check_estimator
from resflow_jax.functional.inverse import check_solver, residual_inverse
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.interop.extras import needs_extra
from resflow_jax.interop.norms import advance_norms
from resflow_jax.interop.sampling import SamplingMap
from resflow_jax.models.residual_flow import ResidualFlow

with needs_extra("flowjax"):
    import equinox as eqx
    import paramax
    from flowjax.bijections import AbstractBijection

Array = jax.Array

_EXACT = Exact()


class FlowBijection(AbstractBijection):
    """z -> x of a whole flow. z has the shape of x: the flow's z [D], in its order, reshaped.

    The flow's parameters are trainable leaves. Power-iteration vectors, running statistics and constants are
    `paramax.NonTrainable`; as nothing in flowjax's loops would advance the vectors, every evaluation does, from where
    they were when the bijection was made to the present parameters. `FlowBijection(bijection.to_flow())` starts the
    next fit from converged ones.

    Attributes:
      params: `nnx.Param` of the flow.
      rest: its other variables.
      key, estimator: of the log-det; see the module's head.
      solver: of z -> x. For what does not converge see the module's head.
      max_iterations: cap on the power iterations of an evaluation, which ends earlier where they converge.
      shape: of x.
    """

    params: nnx.State
    rest: paramax.NonTrainable
    key: Array | None
    estimator: paramax.NonTrainable
    graphdef: Any = eqx.field(static=True)
    solver: Solver = eqx.field(static=True)
    max_iterations: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        flow: ResidualFlow,
        key: Array | None = None,
        *,
        estimator: Estimator = _EXACT,
        solver: Solver = Anderson(),
        max_iterations: int = 200,
    ):
        """Takes the flow as it is now.

        Raises:
          ValueError: for a flow with padding, which is no bijection, an unknown estimator, and a missing key.
        """
        SamplingMap.of(flow, key, estimator, solver)
        check_count("max_iterations", max_iterations, 1)
        self.graphdef, self.params, rest = nnx.split(nnx.clone(flow), nnx.Param, ...)
        self.rest = paramax.NonTrainable(rest)
        self.key = key
        self.estimator = paramax.NonTrainable(estimator)
        self.solver = solver
        self.max_iterations = max_iterations
        self.shape = flow.event_shape

    def transform(self, x: Array, condition: Array | None = None) -> Array:
        bijection, x = _unwrapped(self, x)
        return bijection._sampling().generate(x.reshape(-1))

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return self._sampling().generate_and_log_det(x.reshape(-1))

    def inverse(self, y: Array, condition: Array | None = None) -> Array:
        bijection, y = _unwrapped(self, y)
        return bijection._sampling().encode(y).reshape(self.shape)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        z, log_det = self._sampling().encode_and_log_det(y)
        return z.reshape(self.shape), log_det

    def _sampling(self) -> SamplingMap:
        """Of the unwrapped bijection."""
        rest = advance_norms(self.graphdef, self.params, self.rest, self.max_iterations)
        return SamplingMap.of(nnx.merge(self.graphdef, self.params, rest), self.key, self.estimator, self.solver)

    def to_flow(self) -> ResidualFlow:
        """The flow with the present parameters, its norms iterated to convergence."""
        flow = nnx.merge(self.graphdef, self.params, self.rest.tree, copy=True)
        flow.converge_norms()
        return flow


class ResidualBijection(AbstractBijection):
    """x -> x + g(x) for any contraction g of one event; the inverse is solved.

    `flowjax.bijections.Invert` of it takes data without a solve, as training by maximum likelihood wants it.

    Attributes:
      g: any pytree that is a function of x [*shape] to the same shape, of Lipschitz constant below one, as of
        `contractive`. That is the caller's duty: where it fails, log-dets are wrong and solves do not converge.
      key, estimator, solver: as in `FlowBijection`.
      shape: of x.
    """

    g: Callable[[Array], Array]
    key: Array | None
    estimator: paramax.NonTrainable
    solver: Solver = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        g: Callable[[Array], Array],
        shape: tuple[int, ...],
        key: Array | None = None,
        *,
        estimator: Estimator = _EXACT,
        solver: Solver = Anderson(),
    ):
        """Raises ValueError for a g that is no function, an unknown estimator or solver, and a missing key."""
        check_callable("g", g)
        check_estimator(estimator)
        check_solver(solver)
        check_key("key", key, optional=isinstance(estimator, Exact))
        self.g = g
        self.key = key
        self.estimator = paramax.NonTrainable(estimator)
        self.solver = solver
        self.shape = shape

    def transform(self, x: Array, condition: Array | None = None) -> Array:
        bijection, x = _unwrapped(self, x)
        return x + bijection.g(x)

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        g, params = self._batched()
        y, log_det = residual(g, params, x[None], key=self.key, estimator=self.estimator)
        return y[0], log_det[0]

    def inverse(self, y: Array, condition: Array | None = None) -> Array:
        bijection, y = _unwrapped(self, y)
        return bijection._solve(y[None])[0]

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        x = self._solve(y[None])
        g, params = self._batched()
        _, log_det = residual(g, params, x, key=self.key, estimator=self.estimator)
        return x[0], -log_det[0]

    def _solve(self, y: Array) -> Array:
        g, params = self._batched()
        return residual_inverse(g, params, y, solver=self.solver)

    def _batched(self) -> tuple[Callable[[Any, Array], Array], Any]:
        """g as `residual` takes it: a function of its arrays and of x [B, *shape], and these arrays."""
        params, static = eqx.partition(self.g, eqx.is_array)
        return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


def _unwrapped(bijection: Any, x: Any) -> tuple[Any, Array]:
    """The unwrapped bijection and x as an array: what flowjax does by itself for methods with a log-det.

    The methods without one spare it: `Exact` takes D vjps of each g.
    """
    x = jnp.asarray(x)
    if x.shape != bijection.shape:
        raise ValueError(f"x: expected shape {bijection.shape}, got {x.shape}")
    return paramax.unwrap(bijection), x


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
