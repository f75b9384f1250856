"""Flows and residual blocks as bijections of flowjax, trainable by its loops; needs the extra "flowjax".

    Transformed(StandardNormal(flow.event_shape), FlowBijection(flow))     a flow made by this library
    Invert(ResidualBijection(contractive(g), shape))                       a block around a network of Equinox
    Invert(ResidualBijection(g, shape, cond_shape=(2,)))                   the same with g(x, condition)

The base of a flow is not part of its bijection. For a flow with another base than `StandardNormal`, take the
distribution of flowjax that equals it.

flowjax's `transform` makes samples and its `inverse` takes data, so `FlowBijection.transform` is the inverse of
`Flow.forward`. flowjax maps one event at a time, has no randomness of its own, and vmaps. With a fixed key the noise of
an estimate would be the same in every example and step, and training would fit it. `Exact()` is therefore the default
here. It takes D vjps of each g, which suits the low dimensions that flowjax is for.

The distributions of flowjax use vmap even in eager calls, and a program inside vmap can neither warn nor raise. If a
solve does not converge there, the event is the best guess with a solver of on_failure="warn", and NaN with "raise". A
method that is called eagerly by itself warns or raises. Derivatives of a solve that did not converge are NaN.
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
    """The map z -> x of a whole flow. z has the shape of x: it is the flow's z, in its order, reshaped.

    The parameters of the flow are trainable leaves. Power-iteration vectors, running statistics and constants are
    `paramax.NonTrainable`. Since flowjax's loops do not advance the vectors, every evaluation advances them to the
    present parameters, from where they were when the bijection was made, and does not keep them.
    `FlowBijection(bijection.to_flow())` starts the next fit from converged vectors.

    Cost of an evaluation: that of `Flow.forward` or `Flow.inverse`, and at most `max_iterations` power iterations.

    Attributes:
      params: the `nnx.Param` variables of the flow.
      non_params: its other variables.
      key: PRNG key of the estimates of the log-det; `Exact` needs none.
      estimator: estimator of the log-det; see the module's head.
      graphdef: structure of the flow.
      solver: solver of z -> x. The module's head says what happens if it does not converge.
      max_iterations: cap on the power iterations of an evaluation; convergence ends them earlier.
      shape: shape of x.
      cond_shape: shape of one condition, that of the flow; None if it takes none.

    Example:
      >>> from flowjax.distributions import StandardNormal, Transformed
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> distribution = Transformed(StandardNormal((2,)), rf.interop.flowjax.FlowBijection(flow))
      >>> distribution.log_prob(jnp.ones((3, 2))).shape
      (3,)
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
          ValueError: for a flow with padding, which is not a bijection; for a conditional flow that does not know
            the shape of its condition; for an unknown estimator, and for a missing key.
        """
        check_type("flow", flow, Flow)
        if flow.condition_shape is ...:
            raise ValueError("flow: expected a flow with a known condition shape, got condition_shape=...")
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
        """The map of the flow with advanced vectors; `self` is the unwrapped bijection."""
        non_params = advance_norms(self.graphdef, self.params, self.non_params, self.max_iterations)
        flow = nnx.merge(self.graphdef, self.params, non_params)
        condition = None if self.cond_shape is None else condition  # flowjax gives one to bijections that take none
        return SamplingMap.of(flow, self.key, self.estimator, self.solver, condition)

    def to_flow(self) -> Flow:
        """Returns the flow with the present parameters; its power iterations are run to convergence."""
        flow = nnx.merge(self.graphdef, self.params, self.non_params.tree, copy=True)
        flow.converge_norms()
        return flow


class ResidualBijection(AbstractBijection):
    """The map x -> x + g(x), or x + g(x, condition), for a contraction g of one event; the inverse is solved.

    `flowjax.bijections.Invert` of it takes data without a solve, which suits training by maximum likelihood.

    Cost: `transform` takes one evaluation of g, and the log-det D vjps with `Exact`; `inverse` takes a solve.

    Attributes:
      g: a pytree that is a function from x [*shape] to the same shape, or from (x, condition) with `cond_shape`. Its
        Lipschitz constant in x must be below one, as `contractive` makes it. The caller must guarantee this; otherwise
        log-dets are wrong and solves do not converge.
      key: PRNG key of the estimates of the log-det; `Exact` needs none.
      estimator: estimator of the log-det, `Exact()` by default.
      solver: solver of the inverse.
      shape: shape of x.
      cond_shape: shape of one condition; None if g takes none.

    Source: Behrmann et al. (2019), arXiv 1811.00995.

    Example:
      >>> import equinox as eqx
      >>> g = eqx.nn.MLP(2, 2, 8, depth=1, activation=jnp.tanh, key=jax.random.key(0))
      >>> block = rf.interop.flowjax.ResidualBijection(rf.interop.flowjax.contractive(g), (2,))
      >>> x = jnp.array([0.5, -1.0])
      >>> bool(jnp.allclose(block.inverse(block.transform(x)), x, atol=1e-3))
      True
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
        """Raises ValueError if g is not a function, for an unknown estimator or solver, and for a missing key."""
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
        """The condition of a batch of one. flowjax gives a condition also to bijections that take none."""
        return {} if self.cond_shape is None else {"condition": jnp.asarray(condition)[None]}

    def _batched(self) -> tuple[Callable[..., Array], Any]:
        """g as `residual` takes it, a function of its arrays and of x [B, *shape]; and these arrays."""
        params, static = eqx.partition(self.g, eqx.is_array)
        return lambda params, *inputs: jax.vmap(eqx.combine(params, static))(*inputs), params


def _unwrapped(bijection: Any, x: Any, condition: Any) -> tuple[Any, Array, Array | None]:
    """The unwrapped bijection, and x and the condition as arrays.

    flowjax does this itself for methods with a log-det. The methods here spare the log-det, for which `Exact` takes D
    vjps of each g.
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
    """Bounds the weights of all `eqx.nn.Linear` layers of an Equinox module: W becomes min(1, coefficient / |W|_2) W.

    A chain of such layers, with activations whose Lipschitz constants are at most one (relu, tanh, softplus, ...), has
    a Lipschitz constant of at most coefficient ** layers. The norm |W|_2 is exact: each evaluation takes a singular
    value decomposition, and there are no vectors to keep up to date.

    Args:
      module: an Equinox module.
      coefficient: bound on the norm of each layer, in (0, 1).

    Returns:
      The module with `paramax.Parameterize` instead of the weights; `paramax.unwrap` gives the bounded weights.

    Raises:
      ValueError: for a coefficient outside of (0, 1).

    Example:
      >>> import equinox as eqx, paramax
      >>> linear = eqx.nn.Linear(3, 3, key=jax.random.key(0))
      >>> bounded = paramax.unwrap(rf.interop.flowjax.contractive(linear, 0.5))
      >>> bool(jnp.linalg.norm(bounded.weight, 2) <= 0.5001)
      True
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
    # Not min(1, coefficient / norm), whose derivative is NaN at a kernel of zeros.
    return weight * (coefficient / jnp.maximum(jnp.linalg.norm(weight, 2), coefficient))
