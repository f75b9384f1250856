"""`Classifier`: a flow whose output also gives the class of x.

    h = f(x),   logits = head(h),   p(y | x) = softmax(logits)_y

With a bijector f, the same network is a density model: log p(x, y) = log p(y | x) + log p(x) (Chen et al. 2019, arXiv
1906.02735, section 5.4). With zeros appended to x, or with blocks that are not bijections, it only classifies.
"""

from typing import Any

import jax
from flax import nnx

from resflow_jax.functional.checks import as_float_batch, check_flag, check_key, check_type
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.primitives.tracing import run
from resflow_jax.layers.bijector import Bijector, Shape, own_condition
from resflow_jax.layers.without_log_det import WithoutLogDet
from resflow_jax.models.bases import MixtureOfNormals
from resflow_jax.models.flow import Flow
from resflow_jax.models.heads import PooledHead

Array = jax.Array


class Classifier(Flow):
    """A flow with class probabilities p(y | x) from its output h = f(x).

        logits = head(h);   without a head, logits_k = log p_base(h, k) of a mixture with one component for each class

    In the second case p(y | x) follows from p(x | y) by Bayes' rule.

    Args:
      bijector: f, from x to h.
      head: maps h to logits, for example a `PooledHead`; None takes the base, a `MixtureOfNormals` without a condition.
      base: the distribution of h; by default `StandardNormal`.
      event_shape: shape of one x, if neither f nor the base knows it.

    Attributes:
      classes: K, the number of classes.

    Randomness: none without dropout; log-densities as in `Flow`. Cost: one evaluation of every g for the logits.

    Raises:
      ValueError: if the shapes do not fit, and for neither a head nor a mixture.

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1; Chen et al. (2019, arXiv 1906.02735), section 5.4;
    Izmailov et al. (2020, arXiv 1912.13025) for classes as components of the base.

    Example:
      >>> g = rf.LipschitzMLP(2, (4,), rngs=nnx.Rngs(0))
      >>> flow = rf.Classifier(rf.ResidualBlock(g), rf.PooledHead((2,), 3, rngs=nnx.Rngs(1)))
      >>> x = jnp.ones((5, 2))
      >>> flow.logits(x).shape, flow.log_prob(x, estimator=rf.Exact()).shape
      ((5, 3), (5,))
    """

    def __init__(
        self,
        bijector: Bijector,
        head: PooledHead | None = None,
        base: Any = None,
        *,
        event_shape: Shape | None = None,
    ):
        super().__init__(bijector, base, event_shape=event_shape)
        if head is None:
            if not isinstance(self.base, MixtureOfNormals) or self.base.condition_shape is not None:
                raise ValueError(
                    "head: expected a head, or None with a base MixtureOfNormals without a condition, got None with "
                    f"{type(self.base).__name__}"
                )
            classes = self.base.components
        else:
            check_type("head", head, PooledHead)
            if head.shape != self.latent_shape:
                raise ValueError(f"head: expected shape {self.latent_shape}, which f returns, got shape {head.shape}")
            classes = head.classes
        self.head = head
        self.classes = classes

    def logits(
        self, x: Array, *, condition: Array | None = None, key: Array | None = None, dropout: float = 0.0
    ) -> Array:
        """The logits [B, classes] of p(y | x).

        Args:
          x: floats [B, *event_shape].
          condition: as in `forward`.
          key: PRNG key of the dropout, needed with dropout.
          dropout: probability in [0, 1) with which each element of each g(x) is set to zero, in training; the others
            are divided by 1 - dropout. A flow that pads x then draws its noise; without dropout it appends the mean.

        Cost: one evaluation of every g. No log-det is computed.

        Raises:
          ValueError: as `forward` for x and condition, for a dropout outside of [0, 1), for dropout without a key, and
            for dropout of a block whose map is a solve, such as a `MonotoneBlock`.

        Example:
          >>> base = rf.MixtureOfNormals(3, (2,), rngs=nnx.Rngs(0))
          >>> flow = rf.Classifier(rf.ActNorm((2,)), base=base)
          >>> x = jnp.ones((5, 2))
          >>> bool(jnp.allclose(jax.nn.logsumexp(flow.logits(x), axis=-1), flow.log_prob(x)))
          True
        """
        check_key("key", key, optional=True)
        without = WithoutLogDet(dropout)
        if without.needs_key and key is None:
            raise ValueError("key: expected a PRNG key for dropout, got None")
        with self._checked_input(x, condition) as (x, condition):
            graphdef, state = nnx.split(self)
            return run(_logits, (graphdef,), state, x, key, without, condition)

    def forward_and_log_prob(
        self,
        x: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
        return_logits: bool = False,
    ) -> tuple[Array, ...]:
        """As `Flow.forward_and_log_prob`; with `return_logits` the last value is the logits [B, classes] of this pass.

        Cost: that of `forward`, and the head.

        Raises:
          ValueError: as `forward`.

        Example:
          >>> base = rf.MixtureOfNormals(3, (2,), rngs=nnx.Rngs(0))
          >>> z, log_prob, logits = rf.Classifier(rf.ActNorm((2,)), base=base).forward_and_log_prob(
          ...     jnp.ones((5, 2)), return_logits=True
          ... )
          >>> log_prob.shape, logits.shape
          ((5,), (5, 3))
        """
        check_flag("return_diagnostics", return_diagnostics)
        check_flag("return_logits", return_logits)
        z, log_prob, *found = super().forward_and_log_prob(
            x, condition=condition, key=key, estimator=estimator, return_diagnostics=return_diagnostics
        )
        return (z, log_prob, *found, self.class_logits(z)) if return_logits else (z, log_prob, *found)

    def class_logits(self, z: Array) -> Array:
        """The logits [B, classes] from h = f(x), z [B, *latent_shape]; no g is evaluated."""
        z = as_float_batch("z", z, self.latent_shape)
        return self.base.log_joint(z) if self.head is None else self.head(z)

    def _run_initialize(self, x: Array, condition: Array | None) -> None:
        z = self.bijector.initialize(x, condition)
        if self.head is not None:
            self.head.initialize(z)


def _logits(graphdef, state, x, key, without, condition):
    flow = nnx.merge(graphdef, state)
    x, condition = x.astype(flow.dtype), own_condition(flow.bijector, condition)
    z = flow.bijector.estimate(x, key, without, condition)[0] if without.needs_key else flow.bijector(x, condition)
    return flow.class_logits(z)
