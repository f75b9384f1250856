"""Induced norms of linear maps from the vectors of a power iteration, and the soft normalisation of kernels.

Soft normalisation W * min(1, c / sigma) does not change a map of norm below c. If sigma is the largest norm of rows or
columns, each row or column is normalised by its own norm, which suffices and changes W least. Gradients flow through
sigma = u^T W v with u and v held fixed. At convergence this is the derivative of the norm, by the envelope theorem.
Learnable orders p and q have a separate loss, with W and v held fixed.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import (
    as_float_array,
    check_callable,
    check_order,
)
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.functional.vector_norms import Order, is_order, vector_norm

Array = jax.Array
LinearFunction = Callable[[Array], Array]


def spectral_norm(matvec: LinearFunction, u: Array, v: Array) -> Array:
    """Computes sigma = u^T W v with u and v held fixed. It is differentiable in everything that matvec closes over.

    With the vectors of a converged `power_iteration` it is the norm of W, and its derivative is that of the norm, by
    the envelope theorem: for a dense W the matrix u v^T. It costs one product with W.

    Args:
      matvec: v -> W v, linear.
      u: floats of W's output shape, of unit norm in the norm dual to the codomain's.
      v: floats of W's input shape, of unit norm in the domain.

    Returns:
      A scalar. For unit u and v it is at most the norm of W.

    Raises:
      ValueError: if u or v is not a float array, or if the shape of u differs from that of matvec(v).

    Example:
      >>> w, u, v = jnp.diag(jnp.array([3.0, 1.0])), jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])
      >>> sigma, gradient = jax.value_and_grad(lambda w: rf.spectral_norm(lambda v: w @ v, u, v))(w)
      >>> sigma.item(), gradient.tolist()
      (3.0, [[1.0, 0.0], [0.0, 0.0]])
    """
    check_callable("matvec", matvec)
    u, v = as_float_array("u", u), as_float_array("v", v)
    w = matvec(lax.stop_gradient(v))
    if w.shape != u.shape:
        raise ValueError(f"u: expected the shape {w.shape} of matvec(v), got {u.shape}")
    return jnp.vdot(lax.stop_gradient(u), w)


def needs_power_iteration(domain: Order, codomain: Order) -> bool:
    """Whether a norm has no closed form. It has one if domain is the number 1 or codomain is infinity.

    Raises:
      ValueError: for an order below one.
    """
    check_order("domain", domain)
    check_order("codomain", codomain)
    return not (is_order(domain, 1) or is_order(codomain, math.inf))


def induced_norm(
    linear_map: LinearMap, kernel: Array, u: Array, v: Array, domain: Order = 2.0, codomain: Order = 2.0
) -> Array:
    """||W||_{domain -> codomain} of a layer's map, a scalar, differentiable in the kernel only.

    If there is a closed form, it is exact and does not use u and v. Otherwise it is u^T W v with the vectors of
    `power_iteration`, times the factor of `with_copies`. Gradients of learnable orders come from `order_loss`.
    """
    return jnp.max(channel_norms(linear_map, kernel, u, v, domain, codomain))


def channel_norms(
    linear_map: LinearMap, kernel: Array, u: Array, v: Array, domain: Order = 2.0, codomain: Order = 2.0
) -> Array:
    """The norms that have to be limited to limit `induced_norm`, which is their maximum.

    They are [O], one for each output channel, if the norm is a maximum over rows (codomain inf); [I, 1], one for each
    input channel, if it is a maximum over columns (domain 1); and otherwise the scalar norm of the whole map. They
    broadcast against the kernel.
    """
    domain, codomain = (lax.stop_gradient(order) if isinstance(order, Array) else order for order in (domain, codomain))
    if not needs_power_iteration(domain, codomain):
        return _closed_form(linear_map, kernel, domain, codomain)
    sigma = linear_map.inner(kernel, *lax.stop_gradient((u, v)))
    return with_copies(sigma, linear_map.copies, domain, codomain)


def order_loss(linear_map: LinearMap, kernel: Array, v: Array, domain: Order, codomain: Order) -> Array:
    """||W v||_codomain / ||v||_domain with W and v held fixed, differentiable in the orders only.

    At the maximiser v it is the norm, and its derivative is that of the norm, by the envelope theorem.
    """
    kernel, v = lax.stop_gradient((kernel, v))
    if not needs_power_iteration(domain, codomain):
        return jnp.max(_closed_form(linear_map, kernel, domain, codomain))
    sigma = vector_norm(linear_map.matvec(kernel, v), codomain) / vector_norm(v, domain)
    return with_copies(sigma, linear_map.copies, domain, codomain)


def soft_normalize(kernel: Array, sigma: Array, coefficient: float) -> Array:
    """kernel * min(1, coefficient / sigma). Its norm is at most `coefficient` if sigma (`channel_norms`) is exact."""
    return kernel / trailing(jnp.maximum(1.0, sigma / coefficient), kernel)


def _closed_form(linear_map: LinearMap, kernel: Array, domain: Order, codomain: Order) -> Array:
    """The norms of all columns (domain 1) or of all rows."""
    if is_order(domain, 1):
        return linear_map.column_norms(kernel, codomain)
    return linear_map.row_norms(kernel, domain)


def with_copies(sigma: Array, copies: int, domain: Order, codomain: Order) -> Array:
    """||W + ... + W||_{p->q} of a direct sum: sigma * max_a ||a||_q / ||a||_p = sigma * copies^max(0, 1/q - 1/p)."""
    if copies == 1:
        return sigma
    exponent = jnp.maximum(0.0, 1 / codomain - 1 / domain)
    return sigma * copies ** jnp.asarray(exponent, sigma.dtype)
