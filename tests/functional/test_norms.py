"""Power iteration finds the norm of the operator itself, says when it has, and its gradient is the norm's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import resflow_jax as rf
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.norms import soft_normalize, spectral_norm
from resflow_jax.functional.power_iteration import best_start, power_iteration
from tests.functional.contractions import dense_norm

MAPS = [DenseMap(7, 4), DenseMap(3, 6), ConvMap((5, 4), 2, 3), ConvMap((5, 4), 3, 2, 1)]


def random_kernel(linear_map, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=linear_map.kernel_shape))


def start(linear_map, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=linear_map.input_shape))


@partial(jax.jit, static_argnums=0, static_argnames=["iterations", "restart"])
def iterate(linear_map, kernel, v, **options):
    """The other settings are traced: one program for all of their values."""
    return power_iteration(
        partial(linear_map.matvec, kernel), v, rmatvec=partial(linear_map.rmatvec, kernel), **options
    )


@pytest.mark.parametrize("linear_map", MAPS, ids=str)
def test_sigma_is_the_operator_norm(linear_map):
    """sigma = |W|_2 of the dense matrix, with unit vectors W v = sigma u, W^T u = sigma v."""
    kernel = random_kernel(linear_map)
    sigma, u, v, status = iterate(linear_map, kernel, start(linear_map), tolerance=1e-14, max_iterations=5000)
    assert status.converged and 1 < status.iterations < 5000
    np.testing.assert_allclose(sigma, dense_norm(linear_map, kernel), rtol=1e-10)
    np.testing.assert_allclose([jnp.linalg.norm(u.ravel()), jnp.linalg.norm(v.ravel())], 1, rtol=1e-12)
    np.testing.assert_allclose(linear_map.matvec(kernel, v), sigma * u, atol=1e-5)
    np.testing.assert_allclose(linear_map.rmatvec(kernel, u), sigma * v, atol=1e-5)
    np.testing.assert_allclose(spectral_norm(partial(linear_map.matvec, kernel), u, v), sigma, rtol=1e-12)


def test_the_reshaped_kernel_has_another_norm():
    """The [9 I, O] matrix of a kernel underestimates the convolution's norm; sigma follows the convolution."""
    conv = ConvMap((6, 6), 2, 3)
    kernel = random_kernel(conv) + 1
    true, reshaped = dense_norm(conv, kernel), np.linalg.norm(np.asarray(kernel).reshape(-1, 3), 2)
    assert reshaped < 0.7 * true
    np.testing.assert_allclose(iterate(conv, kernel, start(conv), tolerance=1e-6).sigma, true, rtol=1e-4)


def test_sigma_grows_from_below():
    """sigma never decreases with the iterations and never exceeds the norm."""
    conv = MAPS[2]
    kernel, v = random_kernel(conv), start(conv)
    run = partial(iterate, conv, kernel, iterations=1)
    sigmas = []
    for _ in range(30):
        result = run(v)
        v = result.v
        sigmas.append(result.sigma)
    assert np.all(np.diff(sigmas) >= -1e-12)
    assert sigmas[-1] <= dense_norm(conv, kernel) * (1 + 1e-12)


@pytest.mark.parametrize("linear_map", [MAPS[0], MAPS[2]], ids=str)
def test_warm_start(linear_map):
    """From the v of a nearby kernel fewer iterations are enough, and the norm is that of the new kernel."""
    kernel = random_kernel(linear_map)
    run = partial(iterate, linear_map, tolerance=1e-8, max_iterations=1000, restart=False)
    first = run(kernel, start(linear_map))
    nearby = kernel + 1e-4 * random_kernel(linear_map, seed=5)
    cold, warm = run(nearby, start(linear_map)), run(nearby, first.v)
    assert warm.status.converged and 2 * warm.status.iterations < cold.status.iterations
    np.testing.assert_allclose(warm.sigma, dense_norm(linear_map, nearby), rtol=1e-6)


@pytest.mark.parametrize("iterations", [1, 7])
def test_fixed_number_of_iterations(iterations):
    """Exactly `iterations` steps are made, equal to as many single steps, for any tolerance."""
    dense = MAPS[0]
    kernel, v = random_kernel(dense), start(dense)
    results = [iterate(dense, kernel, v, iterations=iterations, tolerance=t) for t in (1e-15, 10.0)]
    for _ in range(iterations):
        v = iterate(dense, kernel, v, iterations=1).v
    for result in results:
        assert result.status.iterations == iterations and result.status.iterations.dtype == np.int32
        np.testing.assert_allclose(result.v, v, rtol=1e-12)
    assert not results[0].status.converged
    assert results[1].status.converged == (iterations > 1)


def test_cap_is_reported():
    """At the cap `converged` is False and the residual tells how far off it is."""
    dense = MAPS[0]
    for cap in (3, jnp.asarray(3, jnp.int32), jnp.asarray(3, jnp.int64)):
        status = iterate(dense, random_kernel(dense), start(dense), tolerance=1e-15, max_iterations=cap).status
        assert status.iterations == 3 and not status.converged
    assert 1e-7 < status.residual < 1


def test_residual_bounds_the_distance_to_a_singular_value():
    """Some singular value is within residual * sigma of sigma, as the status promises."""
    dense = MAPS[0]
    kernel = random_kernel(dense)
    singular_values = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    for iterations in (1, 2, 4, 8):
        sigma, *_, status = iterate(dense, kernel, start(dense), iterations=iterations)
        assert np.min(np.abs(singular_values - sigma)) <= status.residual * sigma * (1 + 1e-9)


@pytest.mark.parametrize("linear_map", [MAPS[0], MAPS[2]], ids=str)
def test_zero_operator(linear_map):
    """The zero map has norm 0, no NaN in sigma, vectors or gradient, and soft normalisation keeps it zero."""
    kernel = jnp.zeros(linear_map.kernel_shape)
    sigma, u, v, _ = iterate(linear_map, kernel, start(linear_map))
    assert sigma == 0
    assert not jnp.any(jnp.isnan(u)) and not jnp.any(jnp.isnan(v))

    def loss(kernel):
        return jnp.sum(soft_normalize(kernel, spectral_norm(partial(linear_map.matvec, kernel), u, v), 0.9))

    value, gradient = jax.value_and_grad(loss)(kernel)
    assert value == 0 and jnp.all(jnp.isfinite(gradient))


def test_recovers_after_a_zero_operator():
    """The v left by a zero kernel is still a start: once the kernel moves, its norm is found."""
    dense = MAPS[0]
    v = iterate(dense, jnp.zeros(dense.kernel_shape), start(dense)).v
    kernel = random_kernel(dense)
    np.testing.assert_allclose(iterate(dense, kernel, v, tolerance=1e-8).sigma, dense_norm(dense, kernel), rtol=1e-6)


@pytest.mark.parametrize("linear_map", MAPS, ids=str)
def test_gradient_is_that_of_the_norm(linear_map):
    """d sigma / d kernel = d(u^T W v), u v^T for a matrix: finite differences of the LAPACK norm along 3 directions."""
    kernel = random_kernel(linear_map)
    _, u, v, _ = iterate(linear_map, kernel, start(linear_map), tolerance=1e-15, max_iterations=3000)
    gradient = jax.grad(lambda kernel: spectral_norm(partial(linear_map.matvec, kernel), u, v))(kernel)
    if isinstance(linear_map, DenseMap):
        np.testing.assert_allclose(gradient, np.outer(v, u), atol=1e-14)
    for seed in range(2, 5):
        direction = random_kernel(linear_map, seed)
        norms = [dense_norm(linear_map, kernel + h * direction) for h in (1e-5, -1e-5)]
        np.testing.assert_allclose(jnp.vdot(gradient, direction), (norms[0] - norms[1]) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_soft_normalize(scale):
    """W min(1, c / |W|): identity, gradient included, below c = 0.9; norm c and the quotient rule's gradient above."""
    dense, c = MAPS[0], 0.9
    kernel = random_kernel(dense)
    kernel *= scale / dense_norm(dense, kernel)
    direction, weights = random_kernel(dense, 2), random_kernel(dense, 3)
    _, u, v, _ = iterate(dense, kernel, start(dense), tolerance=1e-15, max_iterations=3000)

    def normalized(kernel):
        return soft_normalize(kernel, spectral_norm(partial(dense.matvec, kernel), u, v), c)

    np.testing.assert_allclose(dense_norm(dense, normalized(kernel)), min(scale, c), rtol=1e-10)
    if scale < c:
        assert jnp.all(normalized(kernel) == kernel)
    true = [
        jnp.vdot(weights, k * min(1, c / dense_norm(dense, k)))
        for k in (kernel + 1e-6 * direction, kernel - 1e-6 * direction)
    ]
    slope = jax.jvp(lambda k: jnp.vdot(weights, normalized(k)), (kernel,), (direction,))[1]
    np.testing.assert_allclose(slope, (true[0] - true[1]) / 2e-6, rtol=1e-6)


def test_tolerance_is_on_the_whole_vector():
    """Where the root-mean-square change of u and v (1e-3) stops 3 per cent low, the default tolerance goes on.

    The identity plus a weak blur has singular values crowded around one: every step is small, and smaller still when
    spread over 4608 elements. sigma = 1 + 2 eps (cos(pi / (H + 1)) + cos(pi / (W + 1))) exactly.
    """
    conv, eps = ConvMap((24, 24), 8, 8), 0.05
    stencil = np.zeros((3, 3))
    stencil[[0, 1, 1, 2], [1, 0, 2, 1]], stencil[1, 1] = eps, 1
    kernel = jnp.asarray(stencil[:, :, None, None] * np.eye(8))
    true = 1 + 4 * eps * np.cos(np.pi / 25)

    run = partial(iterate, conv, kernel, iterations=1)
    u, v = jnp.zeros(conv.output_shape), start(conv)
    for _ in range(100):
        sigma, u_new, v_new, _ = run(v)
        changes = [jnp.sqrt(jnp.mean((new - old) ** 2)) for new, old in ((u_new, u), (v_new, v))]
        u, v = u_new, v_new
        if max(changes) < 1e-3:
            break
    assert 0.02 < 1 - sigma / true < 0.1

    result = iterate(conv, kernel, start(conv))
    assert result.status.converged and 0 < 1 - result.sigma / true < 0.02
    tight = iterate(conv, kernel, start(conv), tolerance=1e-6, max_iterations=2000)
    assert tight.status.converged and 0 < 1 - tight.sigma / true < 1e-3


def test_vmap_over_stacked_kernels():
    """Every kernel of a stack gets the result, iterations and status it would get alone."""
    conv = MAPS[2]
    kernels = jnp.stack([random_kernel(conv), 0.1 * random_kernel(conv, 7), jnp.zeros(conv.kernel_shape)])
    v = jnp.stack([start(conv, seed) for seed in (1, 2, 3)])
    run = partial(iterate, conv, tolerance=1e-6, max_iterations=1000)
    stacked = jax.vmap(run)(kernels, v)
    for n in range(3):
        expected = run(kernels[n], v[n])
        assert stacked.status.iterations[n] == expected.status.iterations
        assert stacked.status.converged[n] == expected.status.converged
        np.testing.assert_allclose(stacked.sigma[n], expected.sigma, rtol=1e-12)
        np.testing.assert_allclose(stacked.v[n], expected.v, rtol=1e-9, atol=1e-9)


def test_float32():
    """The dtype is kept and sigma is right to float32's accuracy."""
    dense = MAPS[0]
    kernel, v = random_kernel(dense).astype(jnp.float32), start(dense).astype(jnp.float32)
    sigma, u, v, status = iterate(dense, kernel, v, tolerance=1e-6, max_iterations=1000)
    assert sigma.dtype == u.dtype == v.dtype == status.residual.dtype == jnp.float32
    assert status.converged
    np.testing.assert_allclose(sigma, dense_norm(dense, kernel), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"tolerance": 0.0}, {"tolerance": -1.0}, {"residual_tolerance": 0.0}, {"max_iterations": 0}, {"iterations": 0}],
    ids=str,
)
def test_bad_options(options):
    """Tolerances are positive and counts at least one; the error names the argument."""
    dense = MAPS[0]
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        power_iteration(partial(dense.matvec, random_kernel(dense)), start(dense), **options)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_maps_of_any_size(scale):
    """Squares of float32 numbers over- and underflow here; norms do not."""
    matrix = jnp.asarray(scale * np.diag([1.0, 3.0, 2.0]), jnp.float32)
    result = power_iteration(lambda v: matrix @ v, jnp.ones(3, jnp.float32), tolerance=1e-6)
    assert result.status.converged
    np.testing.assert_allclose(result.sigma, 3 * scale, rtol=1e-5)


# The transpose, and the derivative


@pytest.mark.parametrize("linear_map", MAPS[1:3], ids=str)
def test_jax_transposes_the_map(linear_map):
    """Without rmatvec: the same numbers, of one start and of several, also of a map in lanes."""
    kernel = random_kernel(linear_map)
    matvec, v = partial(linear_map.matvec, kernel), start(linear_map)
    expected = iterate(linear_map, kernel, v, tolerance=1e-10)
    found = jax.jit(lambda v: power_iteration(matvec, v, tolerance=1e-10))(v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)
    best = best_start(matvec, jnp.stack([v, -v, jnp.ones_like(v)]), tolerance=1e-12)
    np.testing.assert_allclose(best.sigma, dense_norm(linear_map, kernel), rtol=1e-9)


def test_a_transpose_in_lanes_and_in_float32():
    """vmap over what matvec closes over; JAX's own convolution; float32 under strict promotion."""
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)))
    found = jax.jit(jax.vmap(lambda w: power_iteration(lambda v: w @ v, jnp.ones(5), tolerance=1e-12)))(matrices)
    np.testing.assert_allclose(found.sigma, np.linalg.norm(matrices, 2, axis=(1, 2)), rtol=1e-8)
    taps = jnp.asarray([1.0, -2.0, 1.0], jnp.float32)
    found = power_iteration(lambda v: jnp.convolve(v, taps), jnp.ones(6, jnp.float32), tolerance=1e-6)
    dense = np.stack([np.convolve(e, taps) for e in np.eye(6)])
    assert found.sigma.dtype == jnp.float32
    np.testing.assert_allclose(found.sigma, np.linalg.norm(dense, 2), rtol=1e-5)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py")
@pytest.mark.parametrize("is_varying", [True, False])
def test_a_transpose_in_shard_map(is_varying):
    """A map of its own on each device, from a start that all share, and a map that all share."""
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("data") if is_varying else PartitionSpec()

    def sigma(matrices):
        return power_iteration(lambda v: matrices[0] @ v, jnp.ones(5), tolerance=1e-12).sigma[None]

    found = jax.jit(jax.shard_map(sigma, mesh=mesh, in_specs=spec, out_specs=spec))(matrices)
    expected = np.linalg.norm(matrices, 2, axis=(1, 2))
    np.testing.assert_allclose(found, expected if is_varying else expected[:1], rtol=1e-8)


def test_maps_that_cannot_be_transposed():
    """It says to give rmatvec, with which it works."""
    for bad in (jnp.tanh, lambda v: v * v, lambda v: v / jnp.sum(v)):
        with pytest.raises(ValueError, match=r"^matvec: expected a linear function that JAX can transpose; .*rmatvec"):
            power_iteration(bad, jnp.ones(3))

    @jax.custom_vjp
    def twice(v):
        return 2 * v

    twice.defvjp(lambda v: (2 * v, None), lambda _, u: (2 * u,))
    np.testing.assert_allclose(power_iteration(twice, jnp.ones(3), rmatvec=twice).sigma, 2, rtol=1e-9)


def test_spectral_norm():
    """At the singular vectors it is the norm, its gradient is u v^T, and u and v have none."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    left, values, right = np.linalg.svd(matrix)
    u, v = jnp.asarray(left[:, 0]), jnp.asarray(right[0])
    sigma, gradient = jax.value_and_grad(lambda *args: rf.spectral_norm(lambda v: args[0] @ v, *args[1:]), (0, 1, 2))(
        matrix, u, v
    )
    np.testing.assert_allclose(sigma, values[0], rtol=1e-12)
    np.testing.assert_allclose(gradient[0], u[:, None] * v[None], rtol=1e-12)
    assert not np.any(gradient[1]) and not np.any(gradient[2])
    with pytest.raises(ValueError, match=r"^u: expected the shape \(4,\) of matvec\(v\), got \(3,\)"):
        rf.spectral_norm(lambda v: matrix @ v, v, v)
    with pytest.raises(ValueError, match=r"^v: expected a float array"):
        rf.spectral_norm(lambda v: matrix @ v, u, [1.0, 2.0, 3.0])
