"""Gram iteration bounds norms from above and converges; it is differentiated, mapped over stacks, run in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.norm_bounds import gram_iteration_bound
from tests.functional.kernels import MAPS, matrix_of, norm, random_kernel, stencils, torus_bounds


@partial(jax.jit, static_argnums=(0, 2))
def gram_bounds(linear_map, kernel, counts):
    return jnp.stack([gram_iteration_bound(linear_map, kernel, n) for n in counts])


@pytest.mark.parametrize("linear_map", MAPS, ids=str)
def test_gram_iteration(linear_map):
    """Not below the norm, non-increasing, within c^(1 / 2^(t+2)) of its limit: exact, or the norm on the torus."""
    kernel = random_kernel(linear_map)
    counts = (0, 1, 2, 3, 5, 7, 30)
    bounds = gram_bounds(linear_map, jnp.asarray(kernel), counts)
    limit = torus_bounds(linear_map, kernel)[0]
    true = norm(matrix_of(linear_map, kernel))
    assert limit >= true
    if isinstance(linear_map, DenseMap) or linear_map.padding == "periodic":
        np.testing.assert_allclose(limit, true, rtol=1e-10)
    assert np.all(np.diff(bounds) <= 1e-14 * limit)
    channels = min(linear_map.kernel_shape[-2:])
    guaranteed = np.array([channels ** (1 / 2 ** (n + 2)) for n in counts])
    assert np.all((1 - 1e-9) * limit <= bounds) and np.all(bounds <= (1 + 1e-9) * guaranteed * limit)
    np.testing.assert_allclose(bounds[-1], limit, rtol=1e-8)


@pytest.mark.parametrize("linear_map", [*MAPS[1:4], MAPS[7]], ids=str)
def test_gradient_of_gram_iteration(linear_map):
    """At convergence the gradient is that of the norm, u v^T for a matrix; before, that of the bound itself."""
    kernel, direction = jnp.asarray(random_kernel(linear_map)), random_kernel(linear_map, 1)
    for iterations, function in (
        (2, lambda k: gram_bounds(linear_map, k, (2,))[0]),
        (12, lambda k: torus_bounds(linear_map, np.asarray(k))[0]),
    ):
        gradient = jax.jit(jax.grad(partial(gram_iteration_bound, linear_map, iterations=iterations)))(kernel)
        slope = (function(kernel + 1e-5 * direction) - function(kernel - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-6)
        if isinstance(linear_map, DenseMap) and iterations == 12:
            u, _, vt = np.linalg.svd(kernel)
            np.testing.assert_allclose(gradient, np.outer(u[:, 0], vt[0]), atol=1e-7)


def test_gram_iteration_of_a_stack():
    """vmap gives every kernel its own result at any scale; the zero kernel has a finite gradient."""
    conv = MAPS[2]
    kernel = jnp.asarray(random_kernel(conv))
    stack = kernel[None] * jnp.asarray([1.0, 1e-150, 1e150, 0.0])[:, None, None, None, None]
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(partial(gram_iteration_bound, conv))))(stack)
    np.testing.assert_allclose(values, values[0] * np.array([1, 1e-150, 1e150, 0]), rtol=1e-12)
    np.testing.assert_allclose(
        gradients[1:3], np.broadcast_to(gradients[0], gradients[1:3].shape), rtol=1e-9, atol=1e-12
    )
    assert jnp.all(jnp.isfinite(gradients))


def test_gram_iteration_in_float32():
    """48 channels of an 8x8 scale in float32: the dtype is kept, the value that of float64; a filter with zeros too."""
    conv = ConvMap((8, 8), 48, 64)
    random = random_kernel(conv)
    difference = stencils(3)["difference"][:, :, None, None] * random[0, 0]
    for kernel in (random, difference, 1e-30 * random, 1e30 * random):
        value, gradient = _value_and_grad_32(conv, jnp.asarray(kernel, jnp.float32))
        assert value.dtype == gradient.dtype == jnp.float32 and jnp.all(jnp.isfinite(gradient))
        limit = torus_bounds(conv, kernel / np.abs(kernel).max())[0] * np.abs(kernel).max()
        assert (1 - 1e-5) * limit <= float(value) <= (1 + 1e-5) * 48 ** (1 / 2**9) * limit


@partial(jax.jit, static_argnums=0)
def _value_and_grad_32(linear_map, kernel):
    return jax.value_and_grad(partial(gram_iteration_bound, linear_map))(kernel)


def test_bad_iterations():
    with pytest.raises(ValueError, match=r"^iterations: expected"):
        gram_iteration_bound(DenseMap(2, 2), jnp.eye(2), iterations=-1)
