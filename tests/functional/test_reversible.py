"""The scan whose gradient recomputes inputs: value and derivatives against those of a plain scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.reversible import reversible_scan

DEPTH, BATCH, DIM = 4, 3, 2
KEYS = jax.random.split(jax.random.key(5), DEPTH)


def apply(layer, x, inputs, shared):
    """x -> a * x + b(shared) + noise by the key, with a log-det that depends on x, so that it has a gradient there."""
    noise = jax.random.normal(inputs, x.shape, x.dtype)
    y = jnp.exp(layer["a"]) * x + jnp.sin(shared)[None] * layer["b"] + noise * 0.1
    return y, jnp.sum(layer["a"]) + jnp.sum(jnp.cos(x * layer["b"]), -1), layer["key"]


def invert(layer, y, shared):
    noise = jax.random.normal(layer["key"], y.shape, y.dtype)
    return (y - jnp.sin(shared)[None] * layer["b"] - noise * 0.1) / jnp.exp(layer["a"])


def plain(apply, layers, x, inputs, shared):
    """The same results by a plain scan."""

    def body(x, of_layer):
        x, log_det, more = apply(of_layer[0], x, of_layer[1], shared)
        return x, (log_det, more)

    x, (log_dets, more) = jax.lax.scan(body, x, (layers, inputs))
    return x, log_dets, more


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    layers = {
        "a": jnp.asarray(0.3 * rng.normal(size=(DEPTH, 1, DIM))),
        "b": jnp.asarray(rng.normal(size=(DEPTH, 1, DIM))),
    }
    return layers, jnp.asarray(rng.normal(size=(BATCH, DIM))), jnp.asarray(rng.normal(size=DIM))


def reversible(layers, x, inputs, shared):
    return reversible_scan(apply, invert, layers, x, inputs, shared, len(inputs))


REVERSIBLE, PLAIN = reversible, partial(plain, apply)


def loss(scan, layers, x, shared, keys=KEYS):
    y, log_dets, _ = scan({**layers, "key": keys}, x, keys, shared)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.exp(0.1 * log_dets))


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]


def check(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), floats(found), floats(expected))


def test_gradients(arguments):
    """In layers, input and what is shared, under jit, and where the first layer is the only one."""
    for number in (DEPTH, 1):
        layers = jax.tree.map(lambda leaf, number=number: leaf[:number], arguments[0])
        found, expected = (
            jax.jit(jax.value_and_grad(partial(loss, scan, keys=KEYS[:number]), (0, 1, 2)))(layers, *arguments[1:])
            for scan in (REVERSIBLE, PLAIN)
        )
        check(found, expected)


def test_forward_over_reverse(arguments):
    """The jvp of the gradient, in all floats at once, is that of the plain scan: the inverse is differentiated too."""
    tangents = jax.tree.map(jnp.cos, arguments)
    found, expected = (
        jax.jit(partial(jax.jvp, jax.grad(partial(loss, scan), (0, 1, 2))))(arguments, tangents)
        for scan in (REVERSIBLE, PLAIN)
    )
    check(found, expected)


@pytest.mark.parametrize("mapped", ["layers", "x", "shared", "keys"])
def test_vmap(arguments, mapped):
    """The gradient of a mapped loss, over each argument in turn, is that of the plain scan."""
    layers, x, shared = arguments

    def lanes(name, tree):
        return jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -0.3 * leaf]), tree) if mapped == name else tree

    layers, x, shared = lanes("layers", layers), lanes("x", x), lanes("shared", shared)
    keys = jax.random.split(KEYS[0], (3, DEPTH)) if mapped == "keys" else KEYS
    axes = [0 if mapped == name else None for name in ("layers", "x", "shared", "keys")]

    def gradients(scan):
        def total(layers, x, shared):
            return jnp.sum(jax.vmap(partial(loss, scan), axes)(layers, x, shared, keys))

        return jax.jit(jax.grad(total, (0, 1, 2)))(layers, x, shared)

    check(gradients(REVERSIBLE), gradients(PLAIN))


def test_no_input_is_kept(arguments):
    """What the gradient keeps between its two passes does not grow with the number of layers, beyond the layers."""

    def kept(depth, scan):
        layers = {name: jnp.ones((depth, *leaf.shape[1:])) for name, leaf in arguments[0].items()}
        keys = jax.random.split(KEYS[0], depth)
        _, pullback = jax.vjp(lambda x: scan({**layers, "key": keys}, x, keys, arguments[2])[:2], jnp.ones((1000, DIM)))
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "size"))

    assert kept(9, REVERSIBLE) - kept(3, REVERSIBLE) < 200 < 6000 < kept(9, PLAIN) - kept(3, PLAIN)


def test_forward_mode_raises(arguments):
    """JAX refuses forward mode through the scan alone."""
    layers, x, shared = arguments
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: loss(REVERSIBLE, layers, x, shared), (x,), (x,))
