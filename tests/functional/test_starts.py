"""A power iteration finds the norm even if its start is in an invariant subspace, and its status is true."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from resflow_jax.functional.linear_maps import DenseMap
from resflow_jax.functional.power_iteration import power_iteration
from resflow_jax.functional.starts import HIDDEN, excludes_larger, mixed_start, pseudo_random_direction


@partial(jax.jit, static_argnames=("iterations", "restart", "domain", "codomain"))
def iterate(matrix, v, **options):
    """x -> matrix x; the settings are traced."""
    return power_iteration(lambda v: matrix @ v, v, rmatvec=lambda u: matrix.T @ u, **options)


def circulant(row):
    return np.stack([np.roll(row, n) for n in range(len(row))])


def periodic_convolution(kernel, side):
    """The dense matrix of a periodic 3x3 convolution on side x side pixels, kernel [3, 3, I, O]."""
    shift = [np.roll(np.eye(side), step, axis=1) for step in (1, 0, -1)]
    return sum(
        np.kron(np.kron(shift[row], shift[column]), kernel[row, column].T) for row in range(3) for column in range(3)
    )


def block_diagonal(*blocks):
    size = sum(len(block) for block in blocks)
    matrix, start = np.zeros((size, size)), 0
    for block in blocks:
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix


def locked(seed=0):
    """{name: (matrix, v in an invariant subspace without the largest singular vector)}."""
    rng = np.random.default_rng(seed)
    laplacian = np.zeros((3, 3, 2, 2))
    laplacian[[0, 1, 1, 2], [1, 0, 2, 1]], laplacian[1, 1] = -0.1 * np.eye(2), np.eye(2) + 0.1 * rng.normal(size=(2, 2))
    small, large = (scale * rng.normal(size=(12, 12)) for scale in (0.5, 1))
    return {
        "one mode of a periodic convolution": (periodic_convolution(laplacian, 4), np.kron(np.ones(16), [1.0, 2.0])),
        "one block": (block_diagonal(small, large), np.r_[rng.normal(size=12), np.zeros(12)]),
        "one mode of a circulant matrix": (circulant(np.r_[1.0, -0.4, np.zeros(9), -0.4]), np.ones(12)),
        "the mean of an equivariant layer": (np.eye(9) - 0.08, np.ones(9)),
        "a direct sum of three": (np.kron(np.diag([1.0, 0.9, 1.1]), large), np.r_[rng.normal(size=12), np.zeros(24)]),
        "the null space": (block_diagonal(np.zeros((3, 3)), large), np.r_[np.ones(3), np.zeros(12)]),
    }


LOCKED = locked()


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", LOCKED)
def test_a_restart_leaves_an_invariant_subspace(name, dtype):
    """Plain iterations stay more than 5 % below the largest singular value; the restart finds it."""
    matrix, v = (jnp.asarray(array, dtype) for array in LOCKED[name])
    true = float(np.linalg.norm(matrix.astype(np.float64), 2))
    assert iterate(matrix, v, iterations=7).sigma < 0.95 * true
    for tolerance in (1e-3, 1e-6):
        result = iterate(matrix, v, tolerance=tolerance)
        assert result.status.converged and result.sigma.dtype == dtype
        np.testing.assert_allclose(result.sigma, true, rtol=10 * tolerance)
    np.testing.assert_allclose(matrix.T @ result.u, result.sigma * result.v, atol=1e-4)
    np.testing.assert_allclose([jnp.linalg.norm(result.u), jnp.linalg.norm(result.v)], 1, rtol=1e-6)


def test_stacked_layers():
    """Under vmap every map of a stack leaves its own subspace."""
    names = ["one mode of a circulant matrix", "one block", "the mean of an equivariant layer"]
    size = max(len(LOCKED[name][1]) for name in names)
    matrices = np.stack([np.pad(LOCKED[name][0], (0, size - len(LOCKED[name][1]))) for name in names])
    starts = np.stack([np.pad(LOCKED[name][1], (0, size - len(LOCKED[name][1]))) for name in names])
    result = jax.vmap(partial(iterate, tolerance=1e-6))(matrices, starts)
    assert result.status.converged.all()
    np.testing.assert_allclose(result.sigma, np.linalg.norm(matrices, 2, axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("restart", [False, True])
def test_a_slowly_moving_map(restart):
    """One block overtakes the block that contains v, as in training; v follows after a few warm calls."""
    blocks = [np.random.default_rng(seed).normal(size=(20, 20)) for seed in (0, 1)]
    first, second = (block / np.linalg.norm(block, 2) for block in blocks)
    matrices = np.stack([block_diagonal(first, (0.8 + 0.005 * min(n, 80)) * second) for n in range(120)])

    def call(v, matrix):
        result = iterate(matrix, v, tolerance=1e-3, max_iterations=300 if restart else 20, restart=restart)
        return result.v, (result.sigma, result.status)

    start = np.r_[np.linalg.svd(first)[2][0], np.zeros(20)]
    _, (sigma, status) = jax.jit(partial(jax.lax.scan, call))(start, matrices)
    error = 1 - sigma / np.linalg.norm(matrices, 2, axis=(1, 2))
    assert (error > -1e-12).all() and error[-20:].max() < 1e-6, "what is mixed in leaves sigma almost as it was"
    assert error[80:].max() < 0.01 and status.converged[80:].all() and status.iterations.min() >= 2
    assert error.max() < (0.01 if restart else 0.1), "overtaken by 0.5 % a call from call 40 on"


@pytest.mark.parametrize("size", [30, 400])
@pytest.mark.parametrize("gap", [0.011, 0.015, 0.03, 0.1, 1.0])
def test_converged_is_true(size, gap):
    """v is in a cluster just below the largest singular value: `converged` is never more than 1 % too low."""
    spectrum = np.r_[np.ones(size - 1), 1 + gap]
    v = np.r_[np.random.default_rng(0).normal(size=size - 1), 0]
    for tolerance in (1e-1, 1e-3, 1e-6):
        result = iterate(np.diag(spectrum), v, tolerance=tolerance)
        assert result.status.converged and result.status.iterations < 600
        assert result.sigma >= (1 - HIDDEN) * spectrum.max()
        capped = iterate(np.diag(spectrum), v, tolerance=tolerance, max_iterations=3)
        assert not capped.status.converged or capped.sigma >= (1 - HIDDEN) * spectrum.max()


def test_a_spectrum_without_gap():
    """Singular values that crowd up to the largest: within 1 % once `converged`, and it converges."""
    spectrum = 1 - np.linspace(0, 1, 500) ** 2 / 2
    result = iterate(np.diag(spectrum), np.eye(500)[400])
    assert result.status.converged and 0.99 < result.sigma <= 1


def test_the_bound_on_what_is_hidden():
    """Parts along v_1 that are b at the start grow so that the true residual never falls below what is excluded."""
    size, best = 64, 1.0
    for ratio in (1 + HIDDEN, 1.1, 3.0):  # of the hidden singular value to the estimate
        part = 1 / (16 * math.sqrt(size))
        for count in range(1, 400):
            share = min(1.0, part * ratio ** (2 * (count - 1)))
            if share == 1:
                break
            residual = share * (ratio**2 - 1)
            sigma = best * (1 + HIDDEN) / ratio
            arguments = jnp.asarray(sigma), jnp.asarray(count), size, jnp.asarray(best)
            excludes = [
                excludes_larger(sigma, jnp.asarray(found), *rest)
                for sigma, *rest in [arguments]
                for found in (0.99 * residual, 1.01 * residual)
            ]
            assert excludes == [True, False]
        assert excludes_larger(jnp.asarray(sigma), jnp.asarray(10.0), jnp.asarray(1000), size, jnp.asarray(best))


@pytest.mark.parametrize("order", [1, 1.5, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_what_is_mixed_in(order, dtype):
    """A unit vector, within a tenth of `residual_tolerance` of v in every order, nowhere zero, the same again."""
    direction = pseudo_random_direction((7, 5, 3), dtype)
    assert direction.dtype == dtype and (abs(direction) >= 1).all() and (abs(direction) <= 2).all()
    assert 30 < (direction > 0).sum() < 75 and len(np.unique(direction)) == direction.size
    v = jnp.zeros((7, 5, 3), dtype).at[2, 1, 1].set(-3.0)
    mixed = mixed_start(v, order, jnp.asarray(1e-1, dtype))
    np.testing.assert_allclose(np.linalg.norm(mixed.ravel(), order), 1, rtol=1e-6)
    assert 1e-3 < np.linalg.norm((mixed - v / 3).ravel(), order) <= 1e-2 * (1 + 1e-6)
    assert (mixed != 0).all()
    large = mixed_start(v, order, jnp.asarray(1e3, dtype))
    assert np.linalg.norm((large - v / 3).ravel(), order) < 0.15
    again = mixed_start(jnp.zeros_like(v), order, jnp.asarray(1e-2, dtype))
    np.testing.assert_allclose(again, direction / np.linalg.norm(direction.ravel(), order), rtol=1e-6)


@pytest.mark.parametrize("order", [2.0, 1.5])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
def test_starts_of_any_size(dtype, order):
    """The largest and the smallest floats of a dtype have the start of their multiple of a usual size."""
    v = jnp.asarray(np.random.default_rng(0).normal(size=300), dtype)
    v, finfo = v / jnp.max(jnp.abs(v)), jnp.finfo(dtype)
    start = partial(jax.jit(mixed_start, static_argnums=1), residual_tolerance=jnp.asarray(1e-2, dtype))
    expected = np.asarray(start(v, order), float)
    np.testing.assert_allclose(np.linalg.norm(expected, order), 1, rtol=1e-2)
    for size in (finfo.max, 64 * finfo.tiny):
        found = start(v * jnp.asarray(float(size), dtype), order)
        np.testing.assert_allclose(np.asarray(found, float), expected, atol=1e-2)


@pytest.mark.parametrize("restart", [False, True])
def test_from_a_zero_vector(restart):
    """A zero v works as a start; the zero map has zero sigma and u, and keeps v usable as a start."""
    matrix = np.random.default_rng(0).normal(size=(5, 4))
    result = iterate(matrix, jnp.zeros(4), tolerance=1e-10, restart=restart)
    np.testing.assert_allclose(result.sigma, np.linalg.norm(matrix, 2), rtol=1e-9)
    zero = iterate(np.zeros((5, 4)), jnp.zeros(4), restart=restart)
    assert zero.sigma == 0 and zero.status.converged and (zero.u == 0).all() and np.isfinite(zero.v).all()
    np.testing.assert_allclose(jnp.linalg.norm(zero.v), 1, rtol=1e-12)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_ends_at_once(restart, value):
    """One iteration and `converged` False; v is still a start."""
    matrix = np.random.default_rng(0).normal(size=(4, 4))
    matrix[1, 2] = value
    result = iterate(matrix, jnp.ones(4), restart=restart)
    assert result.status.iterations == 1 and not result.status.converged and not np.isfinite(result.sigma)


@pytest.mark.parametrize("orders", [(3.0, 1.5), (math.inf, 2.0), (1.5, 3.0)])
def test_other_orders_restart_too(orders):
    """From a local maximum, the start, to the better of the two chains."""
    matrix = np.diag([1.0, 2.0, 0.5])
    domain, codomain = orders
    kept, moved = (
        iterate(matrix, jnp.eye(3)[0], restart=restart, domain=domain, codomain=codomain, tolerance=1e-8)
        for restart in (False, True)
    )
    assert moved.sigma >= kept.sigma * (1 - 1e-9) and moved.status.converged
    u, v = np.asarray(moved.u), np.asarray(moved.v)
    np.testing.assert_allclose(u @ matrix @ v, moved.sigma, rtol=1e-6)


def test_traced_settings_compile_once():
    """New tolerances and caps are new numbers for the same program, with the results of constants."""
    matrix, v = LOCKED["one block"]
    jitted = jax.jit(lambda **settings: iterate(matrix, v, **settings))
    results = [
        (jitted(tolerance=t, residual_tolerance=r, max_iterations=n), t, r, n)
        for t, r, n in [(1e-3, 1e-1, 50), (1e-6, 1e-3, 400), (1e-6, 1e-3, 3), (1e-12, 1e-7, 2000)]
    ]
    assert jitted._cache_size() == 1
    for result, *settings in results:
        fixed = dict(zip(("tolerance", "residual_tolerance", "max_iterations"), settings, strict=True))
        expected = jax.jit(
            lambda fixed=fixed: power_iteration(
                lambda v: matrix @ v, jnp.asarray(v), rmatvec=lambda u: matrix.T @ u, **fixed
            )
        )()
        assert result.status.iterations == expected.status.iterations
        assert result.status.converged == expected.status.converged
        np.testing.assert_allclose(result.sigma, expected.sigma, rtol=1e-12)
    with pytest.raises(ValueError, match=r"^tolerance: expected a scalar, got shape \(2,\)"):
        jitted(tolerance=jnp.ones(2))
    with pytest.raises(ValueError, match=r"^residual_tolerance: expected a positive number, got -1.0"):
        power_iteration(lambda v: v, jnp.ones(2), residual_tolerance=jnp.asarray(-1.0))


@pytest.mark.parametrize("restart", [False, True])
def test_maps_that_differ_between_devices(restart):
    """Inside a shard_map each device iterates on its own map, from the v that all share."""
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    matrices = np.random.default_rng(0).normal(size=(2, 6, 6))

    def of_one(matrix):
        return iterate(matrix[0], jnp.ones(6), tolerance=1e-8, restart=restart).sigma[None]

    spec = PartitionSpec("devices")
    sigma = jax.jit(jax.shard_map(of_one, mesh=mesh, in_specs=spec, out_specs=spec))(matrices)
    np.testing.assert_allclose(sigma, np.linalg.norm(matrices, 2, axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("mode", ["checking_leaks", "debug_nans"])
def test_in_the_strict_modes_of_jax(mode):
    """Modes that are not on in all tests: in float32, eagerly and with the settings of the default; a zero map too."""
    dense = DenseMap(5, 4)
    name, value = {
        "checking_leaks": ("jax_check_tracer_leaks", True),
        "debug_nans": ("jax_debug_nans", True),
    }[mode]
    kernel = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        for scale in (1.0, 0.0):
            scaled = jnp.asarray(np.float32(scale) * kernel)
            result = power_iteration(partial(dense.matvec, scaled), jnp.ones(5, "f4"))
            assert result.status.converged and result.sigma.dtype == jnp.float32
    finally:
        jax.config.update(name, before)


def test_without_jit():
    """Under `jax.disable_jit` the loop runs in Python, to the same result."""
    matrix, v = LOCKED["the mean of an equivariant layer"]
    expected = iterate(matrix, v)
    with jax.disable_jit():
        result = iterate(jnp.asarray(matrix), jnp.asarray(v))
    assert result.status.iterations == expected.status.iterations
    np.testing.assert_allclose(result.v, expected.v, rtol=1e-9)
