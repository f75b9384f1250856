"""A mixture of normal distributions with learnable weights, means and standard deviations.

    p(z | c) = sum_k w_k(c) N(z; mean_k(c), diag(std_k(c)^2))

Izmailov et al. (2020, arXiv 1912.13025) take one component for each class.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.checks import as_shape, check_batch, check_count, check_type
from resflow_jax.layers.conditioned_params import ConditionedParams, bounded
from resflow_jax.models.bases.base import Base, Shape, check_draw

Array = jax.Array


class MixtureOfNormals(Base):
    """Mixture of K normals with learnable parameters; it starts with random means and standard deviations of one.

        p(z | c) = sum_k w_k(c) N(z; mean_k(c), diag(std_k(c)^2)),   log p [B] in nats

    Three kinds:
      - without a condition, all parameters are numbers;
      - with `condition_dim` a network of c, which starts at zero, is added to means and logits, and, bounded to [-4,
        4], to the logs of the standard deviations (see `layers.conditioned_params`);
      - class-conditional: the condition [B, K] holds non-negative weights of the components, normalised to sum 1:
        w_k = c_k / sum_j c_j. A one-hot condition chooses one component, so that components are classes, and
        log p(z | c) = log N_k(z). A row of the classes' frequencies gives the marginal density p(z). Negative weights,
        and only zeros, give NaN. log p is differentiable in c, also where c_k is zero.

    Args:
      components: K.
      event_shape: shape of one z.
      class_conditional: whether the condition is [K] weights.
      condition_dim: number of elements of a condition that changes all parameters; None for none.
      rngs: draws the means at the start, N(0, 1) each, and the network.

    Randomness: `sample` draws component and noise with its key. Cost: K normals for the log-density, one for a sample.

    Raises:
      ValueError: for sizes below one, both kinds of condition, and missing rngs.

    Source: Izmailov et al. (2020, arXiv 1912.13025) for the class-conditional kind.

    Example:
      >>> base = rf.MixtureOfNormals(3, (2,), class_conditional=True, rngs=nnx.Rngs(0))
      >>> labels = jax.nn.one_hot(jnp.array([0, 2, 1, 1]), 3)
      >>> base.log_prob(jnp.zeros((4, 2)), labels).shape, base.sample(jax.random.key(0), 4, labels).shape
      ((4,), (4, 2))
    """

    def __init__(
        self,
        components: int,
        event_shape: Shape,
        *,
        class_conditional: bool = False,
        condition_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        check_count("components", components, 1)
        check_type("rngs", rngs, nnx.Rngs)
        check_type("class_conditional", class_conditional, bool)
        if class_conditional and condition_dim is not None:
            raise ValueError(
                f"condition_dim: expected None together with class_conditional, whose condition is the weights of the "
                f"components, got {condition_dim!r}"
            )
        self.components = components
        self.event_shape = as_shape("event_shape", event_shape)
        self.class_conditional = class_conditional
        self.condition_dim = condition_dim
        shape = (components, *self.event_shape)
        self.means = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.result_type(float)))
        self.log_stds = nnx.Param(jnp.zeros(shape))
        self.logits = None if class_conditional else nnx.Param(jnp.zeros(components))
        self.network = ConditionedParams.make(condition_dim, (shape, shape, (components,)), rngs=rngs)
        size = components if class_conditional else condition_dim
        self.condition_shape = None if size is None else (size,)

    def _parameters(self, condition: Array | None) -> tuple[Array, Array, Array]:
        """Means and logs of standard deviations [1 or B, K, *event_shape]; weights, or log-weights, [1 or B, K]."""
        means, log_stds = self.means[...][None], self.log_stds[...][None]
        if self.class_conditional:
            weights = jnp.where(condition >= 0, condition, jnp.nan)
            return means, log_stds, weights / jnp.sum(weights, axis=-1, keepdims=True)
        logits = self.logits[...][None]
        if self.network is not None:
            a, b, c = self.network(condition)
            means, log_stds, logits = means + a, log_stds + bounded(b), logits + c
        return means, log_stds, jax.nn.log_softmax(logits, axis=-1)

    def log_prob(self, z: Array, condition: Array | None = None) -> Array:
        if self.class_conditional:
            weights, log_normals = self._log_normals(z, condition)
            return _log_weighted_sum(weights, log_normals)
        return jax.nn.logsumexp(self.log_joint(z, condition), axis=-1)

    def log_joint(self, z: Array, condition: Array | None = None) -> Array:
        """log p(z, k) [B, components] in nats, of z [B, *event_shape] and each component k.

        Raises:
          ValueError: for a class-conditional mixture, whose weights are the condition.
        """
        if self.class_conditional:
            raise ValueError("class_conditional: expected a mixture with weights of its own, got True")
        log_weights, log_normals = self._log_normals(z, condition)
        return log_weights + log_normals

    def _log_normals(self, z: Array, condition: Array | None) -> tuple[Array, Array]:
        """Weights, or log-weights, [1 or B, K], and log p(z | k) [B, K]."""
        check_batch("z", z, self.event_shape)
        means, log_stds, weights = self._parameters(condition)
        axes = tuple(range(2, means.ndim))
        squares = ((z[:, None] - means) * jnp.exp(-log_stds)) ** 2
        log_normals = -jnp.sum(0.5 * squares + log_stds + 0.5 * jnp.log(2 * jnp.pi).astype(z.dtype), axis=axes)
        return weights, log_normals

    def sample(
        self, key: Array, num_samples: int, condition: Array | None = None, temperature: float | Array = 1.0
    ) -> Array:
        check_draw(key, num_samples, temperature)
        means, log_stds, weights = self._parameters(condition)
        component_key, noise_key = jax.random.split(key)
        log_weights = jnp.log(weights) if self.class_conditional else weights
        chosen = jax.random.categorical(component_key, log_weights, shape=(num_samples,))
        index = per_example(chosen, means)

        def of_chosen(values: Array) -> Array:
            values = jnp.broadcast_to(values, (num_samples, *values.shape[1:]))
            return jnp.take_along_axis(values, index, axis=1)[:, 0]

        noise = jax.random.normal(noise_key, (num_samples, *self.event_shape), means.dtype)
        # NaN weights, for example from negative ones, choose no component; adding NaN makes the sample NaN too.
        unknown = jnp.where(jnp.isnan(jnp.sum(weights, axis=-1)), jnp.nan, 0).astype(means.dtype)
        unknown = per_example(jnp.broadcast_to(unknown, (num_samples,)), noise)
        return of_chosen(means) + temperature * jnp.exp(of_chosen(log_stds)) * noise + unknown


def _log_weighted_sum(weights: Array, logs: Array) -> Array:
    """log sum_k weights_k exp(logs_k) over the last axis, with finite derivatives also where a weight is zero."""
    is_positive = weights > 0
    terms = jnp.where(is_positive, jnp.log(jnp.where(is_positive, weights, 1)) + logs, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(terms, axis=-1, keepdims=True))
    # A weight of zero adds nothing, but its derivative is exp(logs - largest), clipped before it overflows.
    largest_exponent = min(60.0, 0.9 * math.log(jnp.finfo(logs.dtype).max))
    of_zero = weights * jnp.exp(jnp.minimum(logs - largest, largest_exponent))
    return jnp.log(jnp.sum(jnp.where(is_positive, jnp.exp(terms - largest), of_zero), axis=-1)) + largest[..., 0]
