"""The memory of a gradient grows neither with the terms of the series nor with the width of the network."""

import jax
import jax.numpy as jnp

from resflow_jax.functional.estimators import Roulette, Truncated
from resflow_jax.functional.logdet import residual


def gradient_memory(estimator, blocks, batch=64, dim=8, hidden=512):
    """Bytes of temporaries of the gradient of a scan over blocks: parameters and their gradient are not among them."""
    params = jnp.zeros((blocks, dim, hidden)), jnp.zeros((blocks, hidden, dim))

    def g(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    def block(x, inputs):
        params, key = inputs
        return (x + g(params, x), 0.0) if estimator is None else residual(g, params, x, key=key, estimator=estimator)

    def loss(params, x, key):
        y, log_dets = jax.lax.scan(block, x, (params, jax.random.split(key, blocks)))
        return jnp.sum(y**2) + jnp.sum(log_dets)

    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((batch, dim)), jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_neither_with_the_series_nor_with_width():
    """Truncated(40) takes what Truncated(4) takes (5 per cent), 16 blocks of Roulette() what 2 take (10 per cent).

    A block keeps x and w, 2 B D numbers, and none of its B * 512 hidden activations, which are 32 times as many.
    """
    short, long = (gradient_memory(Truncated(terms), 2) for terms in (4, 40))
    shallow, deep = (gradient_memory(Roulette(), blocks) for blocks in (2, 16))
    assert 0 < long <= 1.05 * short
    assert deep <= 1.1 * shallow
    assert deep - shallow <= 14 * 64 * 8 * 8 * 2.5


def test_the_memory_test_has_power():
    """A scan over x + g(x) without a custom gradient keeps hidden activations, and the same measure sees them."""
    shallow, deep = (gradient_memory(None, blocks) for blocks in (2, 16))
    assert deep - shallow >= 14 * 64 * 512 * 8
