"""Latents and samples of flows with classes: of a mixture with a component for each class, or of one normal.

z = mean_k + T std_k e,   e from N(0, I), of class k;   z = T e without a mixture
"""

import jax
import jax.numpy as jnp

from resflow_jax import MixtureOfNormals
from resflow_jax.models.flow import Flow

Array = jax.Array


def is_mixture(flow: Flow) -> bool:
    """Whether the base of a flow has a component for each class."""
    return isinstance(flow.base, MixtureOfNormals)


def of_classes(base: MixtureOfNormals, classes: Array, noise: Array, temperature: float = 1.0) -> Array:
    """z [B, *event_shape] of classes [B], from noise of the same shape as z."""
    return base.means[...][classes] + temperature * jnp.exp(base.log_stds[...][classes]) * noise


def columns_of(flow: Flow) -> int:
    """The number of columns of a picture of samples: eight, or ten for a mixture of more than eight classes."""
    return 10 if is_mixture(flow) and flow.base.components > 8 else 8


def class_samples(flow: Flow, seed: int, rows: int = 8) -> Array:
    """Samples in [0, 1] for a picture, by rows; each column of a mixture has one class, the first ones."""
    columns = columns_of(flow)
    key, number = jax.random.key(seed), rows * columns
    if not is_mixture(flow):
        return flow.sample(key, number, return_status=True)[0]
    noise = jax.random.normal(key, (number, *flow.latent_shape), flow.dtype)
    classes = jnp.arange(number) % columns % flow.base.components
    return jnp.clip(flow.inverse(of_classes(flow.base, classes, noise), return_status=True)[0], 0, 1)
