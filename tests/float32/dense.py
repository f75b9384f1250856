"""A contraction in float32 beside its dense mathematics in float64, by NumPy alone.

g(x) = tanh(x W + b) V,   J = d g_i / d x_j,   log|det(I + J)|
"""

import jax
import jax.numpy as jnp
import numpy as np


def network(dim=4, batch=3, norm=0.5):
    """(params, x) in float64; J is nearly symmetric, with eigenvalues near -norm, so that high terms matter."""
    rng = np.random.default_rng(0)
    w = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    v = norm * np.resize([-1.0, -0.9, -0.8, 1.0], dim)[:, None] * w.T
    return {"w": w, "b": 0.2 * rng.normal(size=dim), "v": v}, 0.3 * rng.normal(size=(batch, dim))


def g(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def dense_g(params, x):
    return np.tanh(x @ params["w"] + params["b"]) @ params["v"]


def jacobians(params, x):
    """[B, D, D], in float64."""
    slopes = 1 - np.tanh(x @ params["w"] + params["b"]) ** 2
    return np.einsum("dh,bh,hi->bid", params["w"], slopes, params["v"])


def log_det(params, x):
    """[B]."""
    return np.linalg.slogdet(np.eye(x.shape[1]) + jacobians(params, x))[1]


def series(params, x, terms):
    """The first terms of the power series of the same, [B]."""
    j = jacobians(params, x)
    powers = [np.linalg.matrix_power(j, k) for k in range(1, terms + 1)]
    return sum(-((-1) ** k) / k * np.trace(power, axis1=1, axis2=2) for k, power in enumerate(powers, start=1))


def gradient(function, params, x, h=1e-5):
    """The gradient of a scalar in params and x, by central differences in float64, exact to 1e-9, as a flat vector."""
    leaves, structure = jax.tree.flatten((params, x))
    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def at(flat):
        parts = [part.reshape(leaf.shape) for part, leaf in zip(np.split(flat, ends), leaves, strict=True)]
        return function(*jax.tree.unflatten(structure, parts))

    steps = h * np.eye(flat.size)
    return np.array([(at(flat + step) - at(flat - step)) / (2 * h) for step in steps])


def single(tree):
    """In float32, as JAX arrays."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
