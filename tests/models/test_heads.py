"""Heads of classifiers: logits in NumPy, and Lipschitz constants of their differences against gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

NORM = "center", "std", "log_scale", "shift"


def moved(shape, activation="elu", hidden=None):
    """A head whose normalisation and biases are away from their start."""
    head = rf.PooledHead(shape, 3, hidden=hidden, activation=activation, rngs=nnx.Rngs(0))
    rng, channels = np.random.default_rng(1), hidden or shape[-1]
    head.norm.std[...] = jnp.asarray(rng.uniform(0.5, 2, channels))
    for value in (head.norm.center, head.norm.log_scale, head.norm.shift, head.bias):
        value[...] = jnp.asarray(0.4 * rng.normal(size=value.shape))
    return head


def features(shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=(50, *shape)))


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_logits(shape, hidden):
    """W mean(phi(scale * (V h - center) / std + shift)) + b, by NumPy."""
    head, h = moved(shape, "tanh", hidden), features(shape)
    center, std, log_scale, shift, kernel, bias = (
        np.asarray(value[...]) for value in (*(getattr(head.norm, name) for name in NORM), head.kernel, head.bias)
    )
    mixed = np.asarray(h) if hidden is None else np.asarray(h) @ np.asarray(head.first[...])
    active = np.tanh((mixed - center) / std * np.exp(log_scale) + shift)
    expected = active.reshape(50, -1, hidden or 4).mean(axis=1) @ kernel + bias
    np.testing.assert_allclose(head(h), expected, rtol=1e-10, atol=1e-12)


def test_initialisation():
    """The normalisation is that of the batch after V, so that active features have mean 0 and deviation 1."""
    head, h = moved((2, 3, 4), hidden=5), features((2, 3, 4))
    head.initialize(h)
    normal = head.norm(h @ head.first[...])
    np.testing.assert_allclose(jnp.mean(normal, axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(jnp.std(normal, axis=(0, 1, 2)), 1, atol=1e-12)


def gradient_norms(head, h):
    """The norms of the gradients of all differences of logits in h, [B, K, K]."""
    gradients = jax.jit(jax.vmap(jax.jacrev(lambda h: head(h[None])[0])))(h).reshape(len(h), 3, -1)
    gradients = np.asarray(gradients)
    return np.linalg.norm(gradients[:, :, None] - gradients[:, None], axis=-1)


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_lipschitz_bounds(shape, hidden):
    """No gradient of a difference of logits is longer than its bound, and some are not much shorter."""
    head = moved(shape, "elu", hidden)
    bounds, norms = head.lipschitz_bounds(), gradient_norms(head, features(shape))
    assert bounds.shape == (3, 3) and bounds.dtype == np.float64
    assert (norms <= bounds[None] * (1 + 1e-12)).all()
    distinct = ~np.eye(3, dtype=bool)
    assert (norms.max(axis=0) > 0.3 * bounds)[distinct].all()
    np.testing.assert_array_equal(np.diag(bounds), 0)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_lipschitz_bounds_of_a_linear_head_are_exact(shape):
    """Without an activation the gradient is the same everywhere; with an orthogonal V it is as long as the bound."""
    for hidden in (None, 4):
        head = moved(shape, "identity", hidden)
        if hidden:
            head.first[...] = jnp.asarray(3 * np.linalg.qr(np.asarray(head.first[...]))[0])
        norms = gradient_norms(head, features(shape))
        np.testing.assert_allclose(norms, np.broadcast_to(head.lipschitz_bounds(), norms.shape), rtol=1e-10, atol=1e-12)
