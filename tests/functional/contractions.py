"""Random contractions with their dense references, and the z-scores that compare the two.

`dense_net` and `conv_net` return (g, params, x): g(params, x) = c * W^T diag(s) tanh(W x + b), with params a nested
pytree. For orthonormal W and s in [-1, 1] its Jacobian is symmetric, of norm at most c, and nearly c * s in spectrum
where tanh is nearly linear: with c = 0.8 the high orders of the series do matter. `nonsymmetric_net` has another
orthonormal matrix in place of W^T: its Jacobians are far from symmetric and normal, and all eigenvalues are different.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.linear_maps import ConvMap
from resflow_jax.functional.primitives.convolution import conv2d


def dense_net(scale, *, batch=3, dim=4, dtype=jnp.float64, seed=0):
    """A contraction on [B, D] of Lipschitz constant `scale`, nearly attained."""
    rng = np.random.default_rng(seed)
    w = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    s = np.resize([-1.0, 0.9, -0.8, 1.0], dim)
    params = {"map": {"w": w, "b": 0.2 * rng.normal(size=dim)}, "out": [s, np.asarray(scale)]}
    x = 0.3 * rng.normal(size=(batch, dim))
    return _dense, *jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x))


def _dense(params, x):
    w, b = params["map"]["w"], params["map"]["b"]
    s, scale = params["out"]
    return scale * ((jnp.tanh(x @ w + b[None]) * s[None]) @ w.T)


def nonsymmetric_net(scale, *, batch=3, dim=8, dtype=jnp.float64, seed=0):
    """A contraction on [B, D] of Lipschitz constant `scale`, with a Jacobian that is far from symmetric."""
    rng = np.random.default_rng(seed)
    w, u = (np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2))
    params = {"map": {"w": w, "b": 0.2 * rng.normal(size=dim)}, "out": [u, np.linspace(0.5, 1, dim), np.asarray(scale)]}
    x = 0.3 * rng.normal(size=(batch, dim))
    return _nonsymmetric, *jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x))


def _nonsymmetric(params, x):
    w, b = params["map"]["w"], params["map"]["b"]
    u, s, scale = params["out"]
    return scale * ((jnp.tanh(x @ w + b[None]) * s[None]) @ u)


def conv_net(scale, *, batch=2, dtype=jnp.float64, seed=0):
    """A contraction on [B, 4, 4, 2] with 3x3 convolutions to and from 3 channels, of Lipschitz constant `scale`."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(3, 3, 2, 3))
    kernel /= dense_norm(ConvMap((4, 4), 2, 3), jnp.asarray(kernel))
    params = {"map": {"kernel": kernel, "b": 0.2 * rng.normal(size=3)}, "out": [np.array([-1.0, 0.9, -0.8]), scale]}
    x = 0.3 * rng.normal(size=(batch, 4, 4, 2))
    return _conv, *jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x))


def _conv(params, x):
    kernel, b = params["map"]["kernel"], params["map"]["b"]
    s, scale = params["out"]
    hidden = conv2d(x, kernel)
    hidden = jnp.tanh(hidden + trailing(b, hidden)) * trailing(s, hidden)
    return scale * conv2d(hidden, kernel[::-1, ::-1].swapaxes(2, 3))


@partial(jax.jit, static_argnums=0)
def _columns(linear_map, kernel):
    size = math.prod(linear_map.input_shape)
    basis = jnp.eye(size).reshape(size, *linear_map.input_shape)
    return jax.vmap(lambda v: linear_map.matvec(kernel.astype(basis.dtype), v).ravel(), out_axes=1)(basis)


def dense_matrix(linear_map, kernel):
    """The dense matrix [outputs, inputs] of a linear map between `input_shape` and `output_shape`."""
    return np.asarray(_columns(linear_map, kernel))


def dense_norm(linear_map, kernel):
    """The largest singular value of the dense matrix of a linear map, by LAPACK."""
    return np.linalg.norm(dense_matrix(linear_map, kernel), 2)


def jacobians(g, params, x):
    """dg/dx of every example by JAX's own jacfwd: [B, D, D]."""
    size = x[0].size

    def one(x):
        return jax.jacfwd(lambda flat: g(params, flat.reshape(1, *x.shape)).ravel())(x.ravel())

    return jax.vmap(one)(x).reshape(-1, size, size)


def dense_log_det(g, params, x):
    """log|det(I + J)| of every example, [B], from the dense Jacobian."""
    j = jacobians(g, params, x)
    return jnp.linalg.slogdet(jnp.eye(j.shape[-1])[None] + j)[1]


def dense_series(g, params, x, terms, most=27):
    """sum_{k <= terms} (-1)^(k+1) / k * tr(J^k) of every example, [B]; one program for all numbers up to `most`."""
    j = jacobians(g, params, x)

    def add(carry, k):
        power, total = carry
        power = power @ j
        term = -((-1.0) ** k) / k * jnp.trace(power, axis1=1, axis2=2)
        return (power, total + jnp.where(k <= terms, term, 0)), None

    start = jnp.broadcast_to(jnp.eye(j.shape[-1]), j.shape), jnp.zeros(len(x))
    return jax.lax.scan(add, start, jnp.arange(1.0, most + 1))[0][1]


def z_scores(samples, expected):
    """(mean - expected) / standard error of every component of samples [K, ...]."""
    samples, expected = np.asarray(samples), np.asarray(expected)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return (samples.mean(axis=0) - expected) / (error + 1e-12 * (1 + np.abs(expected)))


def check_two_orders(function, *args, h=2e-5, rtol=1e-6):
    """Gradient (reverse) and Hessian-vector product (forward over reverse) of a scalar against central differences."""
    flat, unravel = ravel_pytree(args)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=flat.shape))

    @jax.jit
    def derivatives(flat):
        value_and_grad = jax.value_and_grad(lambda flat: function(*unravel(flat)))
        return jax.jvp(value_and_grad, (flat,), (direction,))

    (_, gradient), (slope, curvature) = derivatives(flat)
    (above, gradient_above), (below, gradient_below) = (derivatives(flat + s * h * direction)[0] for s in (1, -1))
    np.testing.assert_allclose([slope, gradient @ direction], (above - below) / (2 * h), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(curvature, (gradient_above - gradient_below) / (2 * h), rtol=rtol, atol=rtol)
