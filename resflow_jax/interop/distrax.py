"""A flow as a bijector of distrax, and through `distrax.to_tfp` of TFP on JAX; needs the extra "distrax".

    distrax.Transformed(base, rf.interop.distrax.bijector(flow, key))

is the distribution of x that the flow models. The base is the distribution of distrax that equals the flow's own: a
standard normal of D elements, unless the flow was given another one. The bijector's forward is the flow's inverse,
z -> x, and its inverse is the flow, x -> z; `distrax.Inverse(bijector)` has the opposite direction.

`base(distribution)` goes the other way. It makes a distribution of distrax the base of a flow of this library, as in
`rf.Flow(layers, base=rf.interop.distrax.base(distribution))`.
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

base = distrax_base


def bijector(
    flow: Flow,
    key: Array | None = None,
    *,
    condition: Array | None = None,
    estimator: Estimator | None = None,
    solver: Solver = Anderson(),
) -> "FlowBijector":
    """Makes a `distrax.Bijector` of a flow as it is now, from z [..., *latent_shape] to x [..., *event_shape].

    There may be any number of batch axes. The bijector is differentiable in z, x and the flow's parameters, under jit,
    grad and vmap. To train, make the bijector inside the loss, from the flow that is differentiated, with a new key at
    each step.

    Randomness: the bijector keeps one key, so that its log-dets are deterministic functions (common random numbers).
    Each is unbiased over keys. Example n of a batch has its own noise, by its number. Under `jax.vmap`, which
    `distrax.Transformed.sample_and_log_prob` uses, all examples have the noise of number 0. The `log_prob` of a batch
    of samples thus differs by noise from the log-density that came with them; `jax.vmap(log_prob)` gives the same. With
    `Exact` all agree.

    Cost: `forward` takes a solve; `inverse` takes one evaluation of every g; the log-det costs as in `Flow.forward`.

    Args:
      flow: a flow without padding; with padding it would not be a bijection.
      key: PRNG key of the estimates of the log-det; `Exact` needs none.
      condition: for a conditional flow, floats [*condition_shape], one for all, or with leading axes that broadcast
        with those of z and x. The bijector is then that of p(x | condition), and a batch of conditions is a batch of
        distributions.
      estimator: estimator of the log-det, as in `Flow.forward`; by default `Roulette()`.
      solver: solver of z -> x. If it does not converge, an eager call warns or raises, as its `on_failure` says. Inside
        jit and vmap, and so in `distrax.Transformed.sample`, x is then the best guess ("warn") or NaN ("raise").
        Derivatives of such a solve are NaN.

    Returns:
      A bijector in nats, a pytree.

    Raises:
      ValueError: for a flow with padding, an unknown estimator, a missing key, and a condition that is missing or not
        expected. Methods of the bijector raise it for wrong shapes and dtypes. Values are not checked: images outside
        of [0, 1] give NaN.

    Example:
      >>> import distrax
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> base = distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))
      >>> x = jax.random.normal(jax.random.key(0), (16, 2))
      >>> def loss(flow, key):
      ...     return -distrax.Transformed(base, rf.interop.distrax.bijector(flow, key)).log_prob(x).mean()
      >>> value, gradient = nnx.value_and_grad(loss)(flow, jax.random.key(1))
      >>> bool(jnp.isfinite(value))
      True
    """
    return FlowBijector(SamplingMap.of(flow, key, estimator, solver, condition))


class FlowBijector(distrax.Bijector):
    """The bijector that `bijector` makes, a pytree.

    The x of a flow with a logit may leave [0, 1] by alpha / (1 - 2 alpha).

    Example:
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> bijector = rf.interop.distrax.bijector(flow, estimator=rf.Exact())
      >>> isinstance(bijector, rf.interop.distrax.FlowBijector), bijector.inverse(jnp.ones((3, 2))).shape
      (True, (3, 2))
    """

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
        """A new flow from the state that the bijector holds."""
        return self._sampling.flow
