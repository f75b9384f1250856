"""The gradient attack, on classifiers whose nearest boundaries are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.runs.tasks.attack import broken_within
from resflow_jax.layers.module import Module


class Linear(Module):
    """Logits W x of images, with rows of W that are orthonormal: every boundary has the normal w_a - w_b."""

    def __init__(self, shape, classes):
        w = np.linalg.qr(np.random.default_rng(0).normal(size=(np.prod(shape), classes)))[0]
        self.kernel = nnx.Param(jnp.asarray(w))

    def logits(self, x):
        return x.reshape(len(x), -1) @ self.kernel[...]


@pytest.fixture(scope="module")
def attacked():
    """A function from a factor on the distance to the nearest boundary to what is broken within."""
    flow = Linear((3, 3, 2), 3)
    x = 0.5 + 0.05 * jax.random.normal(jax.random.key(0), (12, 3, 3, 2))
    logits = np.sort(np.asarray(flow.logits(x)), axis=1)
    distances = (logits[:, -1] - logits[:, -2]) / np.sqrt(2)
    return lambda factor: broken_within(flow, x, factor * distances)


def test_the_nearest_boundary_is_found(attacked):
    """Just outside of it every class has changed, and just inside none, nor in no radius at all."""
    assert attacked(1.001).all() and attacked(1.5).all()
    assert not attacked(0.999).any() and not attacked(0.0).any()


def test_changed_images_stay_images():
    """A boundary that lies outside of [0, 1] is not reached, however large the radius."""
    flow = Linear((2, 2, 1), 2)
    flow.kernel[...] = jnp.asarray([[1.0, 0], [0, 0], [0, 0], [0, 1e-3]])
    x = jnp.full((1, 2, 2, 1), 0.9)  # x_0 >= 0 stays above 1e-3 x_3 unless x_0 falls below 0.001
    assert broken_within(flow, x, np.array([0.95])).all()
    flow.kernel[...] = jnp.asarray([[1.0, 0], [0.1, 0], [0, 0], [0, 0]])
    assert not broken_within(flow, x, np.array([100.0])).any()
