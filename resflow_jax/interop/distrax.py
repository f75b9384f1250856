"""A flow as a bijector of distrax, and through `distrax.to_tfp` of TFP on JAX; needs the extra "distrax".

    distrax.Transformed(base, rf.interop.distrax.bijector(flow, key))

is the distribution of x that the flow models, for a base of events z like the flow's own: a standard normal of D
elements, unless the flow was given another. So the bijector's forward is the flow's inverse, z -> x, and its inverse
the flow, x -> z; `distrax.Inverse(bijector)` is the other way round. `base(distribution)` makes a distribution of
distrax the base of a flow of this library: `rf.Flow(layers, base=rf.interop.distrax.base(distribution))`.
"""

import jax

from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.interop.bases import distrax_base
from resflow_jax.interop.extras import needs_extra
from resflow_jax.interop.sampling import SamplingMap
from resflow_jax.models.flow import Flow

with needs_extra("distrax"):
    import distrax

Array = jax.Array

base = distrax_base  # a distribution as the base of a flow


def bijector(
    flow: Flow,
    key: Array | None = None,
    *,
    condition: Array | None = None,
    estimator: Estimator | None = None,
    solver: Solver = Anderson(),
) -> "FlowBijector":
    """The flow as it is now, as a `distrax.Bijector` from z [..., *latent_shape] to x [..., *event_shape].

    Any number of batch axes. Differentiable in z, x and the flow's parameters, under jit, grad and vmap: to train, make
    the bijector inside of the loss, from the flow that is differentiated.

      def loss(flow, x, key):
          base = distrax.MultivariateNormalDiag(jnp.zeros(flow.dim), jnp.ones(flow.dim))
          return -distrax.Transformed(base, rf.interop.distrax.bijector(flow, key)).log_prob(x).mean()

      value, gradient = nnx.value_and_grad(loss)(flow, x, key)

    Randomness: one key for the bijector's life, so that all its log-dets are deterministic functions (common random
    numbers), each unbiased over keys: train with a new one each step. Example n of a batch has noise of its own, by its
    number. Under `jax.vmap`, which `distrax.Transformed.sample_and_log_prob` uses, all examples share that of number 0.
    So `log_prob` of a batch of samples differs by noise from what came with them, and `jax.vmap(log_prob)` gives it
    again; with `Exact` all agree.

    Args:
      flow: one without padding, which is no bijection.
      key: PRNG key of the log-det's estimates; not needed by `Exact`.
      condition: of a conditional flow; floats [*condition_shape], one for all, or with leading axes that broadcast with
        those of z and x: the bijector is that of p(x | condition), and a batch of conditions gives samples their shape.
      estimator: as in `Flow.forward`, `Roulette()` by default.
      solver: of z -> x. Where it does not converge, an eager call warns or raises, as the solver's `on_failure` says.
        Inside jit and vmap, and so in `distrax.Transformed.sample`, x is then the best guess ("warn") or NaN ("raise").
        Derivatives of such a solve are NaN.

    Raises:
      ValueError: for a flow with padding, an unknown estimator, a missing key, and a condition that is missing or not
        expected; of its methods, for wrong shapes and dtypes. Values are not checked: images beyond [0, 1] give NaN.
    """
    return FlowBijector(SamplingMap.of(flow, key, estimator, solver, condition))


class FlowBijector(distrax.Bijector):
    """The bijector of `bijector`, a pytree. Behind a logit x may leave [0, 1] by alpha / (1 - 2 alpha)."""

    def __init__(self, sampling: SamplingMap):
        super().__init__(event_ndims_in=len(sampling.latent_shape), event_ndims_out=len(sampling.event_shape))
        self._sampling = sampling

    def forward(self, x: Array) -> Array:
        self._check_forward_input_shape(x)
        return self._sampling.generate(x)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        return self._sampling.generate_and_log_det(x)

    def inverse(self, y: Array) -> Array:
        self._check_inverse_input_shape(y)
        return self._sampling.encode(y)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        return self._sampling.encode_and_log_det(y)

    def same_as(self, other: distrax.Bijector) -> bool:
        return isinstance(other, FlowBijector) and self._sampling.is_same(other._sampling)

    @property
    def flow(self) -> Flow:
        """The flow, made anew of the state that the bijector holds."""
        return self._sampling.flow
