"""Certified robustness of a classifier from the Lipschitz constants of its network.

    |x' - x|_2 < r(x)   =>   argmax logits(x') = argmax logits(x),
    r(x) = min over b of (logit_a(x) - logit_b(x)) / Lip(logit_a - logit_b),   a = argmax logits(x)

The difference of two logits changes by at most its Lipschitz constant times the distance, so it stays positive inside
(Tsuzuku et al. 2018, arXiv 1802.04034, proposition 1). The constant is at most Lip(f) times that of the head, and at
most twice the largest constant of a single logit; r(x) is at least the margin over that.
"""

import jax
import numpy as np

from resflow_jax.functional.checks import as_float_batch, check_type
from resflow_jax.models.certificate import certify
from resflow_jax.models.classifier import Classifier

Array = jax.Array


def certified_radius(flow: Classifier, logits: Array) -> np.ndarray:
    """The radius around each x within which no change of x changes its predicted class.

    Args:
      flow: a classifier with a head, after `converge_norms` and `tighten` if it was trained.
      logits: floats [B, classes], of `flow.logits(x)`.

    Returns:
      float64 [B], in the unit of x and the 2-norm of one whole x; 0 for ties, and for a network without a bound on its
      Lipschitz constant. For images the changed x must lie in [0, 1] too.

    Randomness: none. Cost: singular value decompositions of all kernels, as in `certify`; no evaluation of g. The bound
    holds in exact arithmetic: a radius near the rounding of x means nothing.

    Raises:
      ValueError: for another flow, a classifier without a head, and logits of another shape.

    Source: Tsuzuku et al. (2018, arXiv 1802.04034), proposition 1.

    Example:
      >>> g = rf.LipschitzMLP(2, (4,), rngs=nnx.Rngs(0))
      >>> flow = rf.Classifier(rf.ResidualBlock(g), rf.PooledHead((2,), 3, rngs=nnx.Rngs(1)))
      >>> flow.tighten()
      >>> radius = rf.certified_radius(flow, flow.logits(jnp.ones((5, 2))))
      >>> radius.shape, bool((radius > 0).all())
      ((5,), True)
    """
    check_type("flow", flow, Classifier)
    if flow.head is None:
        raise ValueError(
            "flow: expected a classifier with a head, got a classifier by Bayes' rule, whose logits are not Lipschitz"
        )
    logits = np.asarray(as_float_batch("logits", logits, (flow.classes,)), np.float64)
    of_flow, of_head = certify(flow).lipschitz, flow.head.lipschitz_bounds()
    best = logits.argmax(axis=1)
    margins = logits[np.arange(len(logits)), best][:, None] - logits
    with np.errstate(divide="ignore", invalid="ignore"):
        constants = np.where(of_head > 0, of_flow * of_head, 0.0)  # infinity times zero is zero here
        radii = np.where(margins > 0, margins / constants[best], 0.0)
    radii[np.arange(len(logits)), best] = np.inf  # the class itself
    return radii.min(axis=1)
