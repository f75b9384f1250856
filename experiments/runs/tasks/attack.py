"""A gradient attack on a classifier: the change of x within a radius that lowers the margin of its class most.

Projected gradient descent in the 2-norm (Madry et al. 2018, arXiv 1706.06083), with a normalised gradient of the
margin, from x itself.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.broadcasting import per_example
from resflow_jax.models.flow import Flow

Array = jax.Array


def broken_within(flow: Flow, x: Array, radii: np.ndarray, steps: int = 20) -> np.ndarray:
    """Whether the attack changes the predicted class of each x [B, H, W, C] within its radius [B]; bool [B]."""
    return np.asarray(_attacked(flow, x, jnp.asarray(radii, x.dtype), steps))


@partial(jax.jit, static_argnames="steps")
def _attacked(flow: Flow, x: Array, radii: Array, steps: int) -> Array:
    labels = jnp.argmax(flow.logits(x), axis=-1)
    axes = tuple(range(1, x.ndim))

    def margin(x):
        logits = flow.logits(x)
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        others = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
        return own - jnp.max(others, axis=-1)

    def norm(values):
        return jnp.sqrt(jnp.sum(jnp.square(values), axis=axes))

    def step(_, state):
        at, broken = state
        gradient = jax.grad(lambda at: jnp.sum(margin(at)))(at)
        pace = 2.5 / steps * radii / jnp.maximum(norm(gradient), 1e-30)
        change = at - per_example(pace, at) * gradient - x
        change = change * per_example(jnp.minimum(1, radii / jnp.maximum(norm(change), 1e-30)), x)
        at = jnp.clip(x + change, 0, 1)
        return at, broken | (margin(at) < 0)

    return jax.lax.fori_loop(0, steps, step, (x, jnp.zeros(x.shape[0], bool)))[1]
