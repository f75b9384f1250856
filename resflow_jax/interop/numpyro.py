"""A flow in NumPyro: a transform, a distribution, and a variational family; needs the extra "numpyro".

    prior                numpyro.sample("x", FlowDistribution(flow, key))
    the same, NUTS on z  numpyro.handlers.reparam(model, config={"x": TransformReparam()})
    base of a flow       rf.Flow(bijector, base=base(distribution))
    guide of SVI         numpyro.sample("x", FlowDistribution(flow_module("flow", flow), key))

NUTS on x needs log p(x) and its gradient at every step, and thus a log-det. `Exact()` or one fixed key makes the
density deterministic, as Hamiltonian dynamics require. With NUTS on z, the prior is the base density (by default a
standard normal), no log-det is needed, and NUTS sees a simpler geometry; each step still needs a solve for x(z).

A conditional flow takes its condition: FlowDistribution(flow, key, condition=c) is p(x | c). Leading axes of c are the
batch shape.

NumPyro compiles its programs, and a compiled program can neither warn nor raise. If a solve of z -> x does not converge
there, x is the best guess with a solver of on_failure="warn", and NaN with "raise", which NUTS counts as a divergence.
Derivatives of such a solve are NaN. An eager call warns or raises.
"""

import inspect

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.interop.bases import numpyro_base
from resflow_jax.interop.extras import needs_extra
from resflow_jax.interop.norms import advance_norms
from resflow_jax.interop.numpyro_parts import base_distribution, support_constraint
from resflow_jax.interop.sampling import SamplingMap
from resflow_jax.models.flow import Flow

with needs_extra("numpyro"):
    import numpyro
    from numpyro.distributions import TransformedDistribution, constraints
    from numpyro.distributions.transforms import Transform
    from numpyro.distributions.util import validate_sample
    from numpyro.infer import ELBO, SVI
    from numpyro.primitives import mutable

Array = jax.Array

base = numpyro_base


class FlowTransform(Transform):
    """The transform x = f^-1(z), from z [..., *latent_shape] to x [..., *event_shape], and back; a pytree.

    Its codomain is the support of the flow's bijector: the unit interval for images with a logit, the bounds of each
    column for a table, the reals otherwise. x is clipped to it. The transform is differentiable in z, x and the flow's
    parameters. Log-dets are in nats; the key and an example's number in its batch fix their noise.

    Cost: a call takes a solve; the inverse takes one evaluation of every g; the log-det costs as in `Flow.forward`.

    Example:
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> transform = rf.interop.numpyro.FlowTransform(flow, estimator=rf.Exact())
      >>> transform.inv(jnp.ones((3, 2))).shape
      (3, 2)
    """

    def __init__(
        self,
        flow: Flow,
        key: Array | None = None,
        *,
        condition: Array | None = None,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
    ):
        """Takes the flow as it is now.

        Args:
          flow: a flow without padding; with padding it would not be a bijection.
          key: PRNG key of the estimates of the log-det; `Exact` needs none.
          condition: for a conditional flow, floats [*condition_shape], one for all, or with leading axes that broadcast
            with those of z and x.
          estimator: estimator of the log-det, as in `Flow.forward`; by default `Roulette()`.
          solver: solver of z -> x. The module's head says what happens if it does not converge.

        Raises:
          ValueError: for a flow with padding, an unknown estimator, a missing key, and a condition that is missing or
            not expected.
        """
        self._sampling = SamplingMap.of(flow, key, estimator, solver, condition)

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self._sampling.latent_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        return support_constraint(self._sampling.support, len(self._sampling.event_shape))

    def __call__(self, x: Array) -> Array:
        return self._sampling.clip(self._sampling.generate(jnp.asarray(x)))

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Returns x and the log-det, which `log_abs_det_jacobian` takes as `intermediates`."""
        y, log_det = self._sampling.generate_and_log_det(jnp.asarray(x))
        return self._sampling.clip(y), log_det

    def _inverse(self, y: Array) -> Array:
        return self._sampling.encode(jnp.asarray(y))

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Returns z [..., *latent_shape] and log|det dz/dy| [...] of y [..., *event_shape], in one pass."""
        return self._sampling.encode_and_log_det(jnp.asarray(y))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Array | None = None) -> Array:
        return -self.inverse_and_log_det(y)[1] if intermediates is None else intermediates

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._exchange(shape, self._sampling.latent_shape, self._sampling.event_shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._exchange(shape, self._sampling.event_shape, self._sampling.latent_shape)

    def _exchange(self, shape: tuple[int, ...], event: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
        """[..., *event] -> [..., *other], with the leading axes of the condition."""
        batch = shape[: len(shape) - len(event)]
        if shape != (*batch, *event):
            raise ValueError(f"shape: expected a shape that ends in {event}, got {shape}")
        return *jnp.broadcast_shapes(batch, self._sampling.condition_batch), *other

    def tree_flatten(self):
        return (self._sampling,), (("_sampling",), {})

    def eq(self, other: object, static: bool = False) -> bool:
        return isinstance(other, FlowTransform) and self._sampling.is_same(other._sampling)

    @property
    def flow(self) -> Flow:
        """A new flow from the state that the transform holds."""
        return self._sampling.flow


class FlowDistribution(TransformedDistribution):
    """The distribution of x [*event_shape] that a flow models: the `FlowTransform` of z from the flow's base.

    It is a `TransformedDistribution`, which `TransformReparam` can take apart. Its `log_prob` takes one pass, as that
    of the flow, and is in nats. `sample` is differentiable in the parameters, and `log_prob` of samples with their
    intermediates takes no further pass.

    Example:
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> distribution = rf.interop.numpyro.FlowDistribution(flow, estimator=rf.Exact())
      >>> distribution.log_prob(jnp.ones((3, 2))).shape
      (3,)
    """

    def __init__(
        self,
        flow: Flow,
        key: Array | None = None,
        *,
        condition: Array | None = None,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
        validate_args: bool | None = None,
    ):
        """Arguments and errors are those of `FlowTransform`; `validate_args` is that of NumPyro's distributions."""
        transform = FlowTransform(flow, key, condition=condition, estimator=estimator, solver=solver)
        sampling = transform._sampling
        base = base_distribution(flow.base, flow.dtype, sampling.condition, sampling.condition_batch)
        super().__init__(base, transform, validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: Array, intermediates: list | None = None) -> Array:
        if intermediates is not None:
            return super().log_prob(value, intermediates)
        z, log_det = self.transforms[0].inverse_and_log_det(value)
        return self.base_dist.log_prob(z) + log_det

    @property
    def flow(self) -> Flow:
        """A new flow from the state that the distribution holds."""
        return self.transforms[0].flow


def flow_module(name: str, flow: Flow, *, max_iterations: int = 200, warm_start: bool = False) -> Flow:
    """Registers the parameters of a flow with NumPyro, inside a model or guide, as NumPyro's `nnx_module` does.

    The parameters are the param site NAME$params. Every call advances the power-iteration vectors to the present
    parameters, from where they are in `flow`. This keeps the blocks contractions while SVI trains them. It works with
    every ELBO and any number of particles, since the vectors depend on the parameters alone.

    Args:
      name: name of the sites.
      flow: gives the structure and the initial values; it is not changed.
      max_iterations: cap on the power iterations of a call. Each takes two products with every kernel; convergence ends
        them earlier.
      warm_start: whether the vectors start from those of the call before, which the mutable site NAME$state keeps. It
        saves iterations where kernels are large and change little. NumPyro has mutable sites only in a `Trace_ELBO` or
        a `TraceMeanField_ELBO` of one particle.

    Returns:
      The flow with the parameters of the site.

    Raises:
      ValueError: for a max_iterations below one, and for warm_start in an ELBO that loses mutable sites.

    Example:
      >>> import numpyro
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> def guide():
      ...     trained = rf.interop.numpyro.flow_module("flow", flow)
      ...     numpyro.sample("x", rf.interop.numpyro.FlowDistribution(trained, estimator=rf.Exact()))
      >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
      >>> sorted(sites), sites["x"]["value"].shape
      (['flow$params', 'x'], (2,))
    """
    check_count("max_iterations", max_iterations, 1)
    graphdef, params, non_params = nnx.split(nnx.clone(flow), nnx.Param, ...)
    params = numpyro.param(f"{name}$params", params)
    holder = {"non_params": non_params}
    if warm_start:
        _check_keeps_state(_running_elbo())
        holder = mutable(f"{name}$state", holder)
    holder["non_params"] = advance_norms(graphdef, params, holder["non_params"], max_iterations)
    return nnx.merge(graphdef, params, holder["non_params"], copy=True)


def _running_elbo() -> ELBO | None:
    """The ELBO that calls the model or guide, or whose SVI does; NumPyro itself gives them no way to ask."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        caller = caller.loss if isinstance(caller, SVI) else caller
        if isinstance(caller, ELBO):
            return caller
        frame = frame.f_back
    return None


def _check_keeps_state(elbo: ELBO | None) -> None:
    """Raises ValueError for an ELBO after which the values of mutable sites are lost."""
    if elbo is None:
        return
    has_state = type(elbo).loss_with_mutable_state is not ELBO.loss_with_mutable_state
    if elbo.num_particles > 1 or not has_state:
        raise ValueError(
            "warm_start: expected False, which works with every ELBO, or a Trace_ELBO or TraceMeanField_ELBO of one "
            f"particle, since NumPyro loses mutable sites elsewhere; got True in {type(elbo).__name__} with "
            f"num_particles={elbo.num_particles}"
        )
