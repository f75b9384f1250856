"""Shared parts of the tests of estimators: nets with dense references, and estimates as one vector.

An estimator is tested through the loss  sum_b c_b log_det_b + sum sin(3 y), with c of different size and sign: its
value and its gradient in every parameter and every element of x, as one vector.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from resflow_jax.functional.estimators import Roulette
from resflow_jax.functional.length_laws import Defensive, Fitted, Geometric, Poisson
from resflow_jax.functional.logdet import residual
from tests.functional.contractions import (
    conv_net,
    dense_log_det,
    dense_net,
    jacobians,
    nonsymmetric_net,
    z_scores,
)

NETS = {
    "saturated": partial(dense_net, 0.8),
    "moderate": partial(dense_net, 0.5),
    "small": partial(dense_net, 0.3),
    "conv": partial(conv_net, 0.8),
    "near one": partial(dense_net, 0.98),
    "conv near one": partial(conv_net, 0.98),
    "nonsymmetric": partial(nonsymmetric_net, 0.75),
}
PAPERS = Roulette(Poisson(2.0), exact_terms=2, minres_steps=0)
SAFE = Defensive(0.4, 0.1, 0.75)
FITTED = Fitted(jnp.array([1.0, 0.6, 0.6, 0.2]), 0.75)
SLOW = Geometric(0.2)  # finite variance (and fourth moment) for the spectral radius 0.8 of "saturated"
GRADIENTS = ["neumann", "autodiff"]
WEIGHTS = jnp.array([1.5, -0.7, 0.3])


@cache
def net_named(name):
    """(g, params, x), made once, and as concrete arrays even when first asked for under jit."""
    with jax.ensure_compile_time_eval():
        return NETS[name]()


def loss_of(g, params, x, log_det, y):
    return jnp.vdot(WEIGHTS[: len(x)].astype(log_det.dtype), log_det) + jnp.sum(jnp.sin(3 * y))


def flat_value_and_gradient(g, params, x, value):
    """[log_det, d loss / d params, d loss / d x] as one vector, for value: (params, x) -> (y, log_det)."""

    def loss(params, x):
        y, log_det = value(params, x)
        return loss_of(g, params, x, log_det, y), log_det

    gradient, log_det = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return jnp.concatenate([log_det, ravel_pytree(gradient)[0]])


def estimate(net, estimator, key):
    return flat_value_and_gradient(*net, lambda params, x: residual(net[0], params, x, key=key, estimator=estimator))


def reference(net, log_det=dense_log_det):
    """The same vector by autodiff through dense Jacobians, independent of the package."""
    g, params, x = net
    value = lambda params, x: (x + g(params, x), log_det(g, params, x))  # noqa: E731
    return jax.jit(lambda: flat_value_and_gradient(g, params, x, value))()


@cache
def exact(name):
    """The dense reference of a net."""
    return reference(net_named(name))


@cache
def dense_jacobians(name):
    """dg/dx of every example of a net, [B, D, D]."""
    g, params, x = net_named(name)
    return np.asarray(jax.jit(lambda: jacobians(g, params, x))())


def of_keys(function):
    """The function of many keys, 500 at a time. All of these take as long as the longest series among them."""
    return jax.jit(lambda keys: jax.lax.map(function, keys, batch_size=500))


def worst_z(name, estimator, keys=4000, estimate=estimate, exact=exact):
    """The largest |z| of the mean over keys, over all components of value and gradient."""
    run = of_keys(lambda key: estimate(net_named(name), estimator, key))
    return np.abs(z_scores(run(jax.random.split(jax.random.key(0), keys)), exact(name))).max()
