"""Induced p -> q norms agree with brute force: power iteration, closed forms, derivatives in the kernel and in p, q."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.norms import induced_norm, needs_power_iteration, order_loss
from resflow_jax.functional.power_iteration import best_start, power_iteration
from resflow_jax.functional.vector_norms import conjugate, dual_map, vector_norm
from tests.functional.brute_force import brute_force_norm, enumerated_norm
from tests.functional.contractions import dense_matrix

inf = math.inf
DENSE = DenseMap(3, 3)
PAIRS = [(1, 1), (1, 3), (2, inf), (inf, inf), (inf, 1), (inf, 2.5), (2, 1), (3, 3), (1.5, 4), (4, 1.5), (1.2, 2)]
CONVS = [ConvMap((3, 4), 2, 2), ConvMap((2, 4), 2, 1), ConvMap((1, 2), 1, 2, 5), ConvMap((3, 4), 1, 2, 5)]


@partial(jax.jit, static_argnums=(0, 3, 4), static_argnames=("tolerance", "max_iterations", "iterations"))
def iterate(linear_map, kernel, v, domain, codomain, **options):
    matvec, rmatvec = partial(linear_map.matvec, kernel), partial(linear_map.rmatvec, kernel)
    return power_iteration(matvec, v, rmatvec=rmatvec, domain=domain, codomain=codomain, **options)


@partial(jax.jit, static_argnums=(0, 3, 4), static_argnames=("tolerance", "max_iterations"))
def search(linear_map, kernels, starts, domain, codomain, **options):
    def one(kernel):
        matvec, rmatvec = partial(linear_map.matvec, kernel), partial(linear_map.rmatvec, kernel)
        return best_start(matvec, starts, rmatvec=rmatvec, domain=domain, codomain=codomain, **options)

    return jax.vmap(one)(kernels)


@jax.jit
def search_traced(kernel, starts, domain, codomain):
    """`search` on `DENSE` with orders that are arrays: one program for all of them."""
    matvec, rmatvec = partial(DENSE.matvec, kernel), partial(DENSE.rmatvec, kernel)
    return best_start(
        matvec, starts, rmatvec=rmatvec, domain=domain, codomain=codomain, tolerance=1e-14, max_iterations=3000
    )


induced_gradients = jax.jit(jax.grad(partial(induced_norm, DENSE), argnums=(0, 1, 2, 3, 4)))
order_gradients = jax.jit(jax.value_and_grad(partial(order_loss, DENSE), argnums=(0, 1, 2, 3)))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def small_matrices():
    """Kernels [12, 3, 3]: of 3x3, and of 2x2, 2x3 and 3x2 matrices with zeros around, which change no norm."""
    kernels = normal(12, 3, 3)
    kernels[3:9, 2, :] = 0
    kernels[6:12, :, 2] = 0
    return kernels


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_power_iteration_finds_the_norm(p, q):
    """The best of 32 random starts is the norm by brute force, with unit vectors that satisfy u^T W v = sigma."""
    kernels, starts = small_matrices(), normal(32, 3, seed=1)
    sigma, u, v, status = search(DENSE, kernels, starts, p, q, tolerance=1e-13, max_iterations=5000)
    assert np.all(status.converged)
    np.testing.assert_allclose(sigma, [brute_force_norm(kernel.T, p, q) for kernel in kernels], rtol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(u, conjugate(q), axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(v, p, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.einsum("nio,ni,no->n", kernels, v, u), sigma, rtol=1e-9)


def test_brute_force():
    """The search agrees with the singular value and, for polytopes, with the enumeration of vertices."""
    matrix = normal(2, 3)
    np.testing.assert_allclose(brute_force_norm(matrix, 2, 2), np.linalg.norm(matrix, 2), rtol=1e-10)
    for p in (1, inf):
        for q in (1, 2.5, inf):
            expected = enumerated_norm(matrix, q, domain=p)
            np.testing.assert_allclose(brute_force_norm(matrix, p, q), expected, rtol=1e-10)


def test_traced_orders():
    """Orders may be arrays, one a layer under vmap: the same norms, for 2 -> 2 the largest singular value."""
    kernels, starts = normal(4, 3, 3), normal(32, 3, seed=1)
    p, q = np.array([2.0, 1.3, 3.5, 1.8]), np.array([2.0, 3.0, 1.2, 1.8])
    result = jax.vmap(search_traced, in_axes=(0, None, 0, 0))(kernels, starts, p, q)
    assert np.all(result.status.converged)
    np.testing.assert_allclose(result.sigma[0], np.linalg.norm(kernels[0], 2), rtol=1e-10)
    np.testing.assert_allclose(result.sigma, [brute_force_norm(k.T, *o) for k, *o in zip(kernels, p, q, strict=True)])


def test_general_formulas_are_those_of_two_at_two():
    """With arrays of value 2 every formula, the residual's too, gives what the code for 2 -> 2 gives."""
    kernel, start = normal(3, 3), normal(3, seed=1)
    two = jnp.asarray(2.0)

    @jax.jit
    def run(v, p, q):
        matvec, rmatvec = partial(DENSE.matvec, kernel), partial(DENSE.rmatvec, kernel)
        return power_iteration(matvec, v, rmatvec=rmatvec, domain=p, codomain=q, iterations=1)

    v = start
    for _ in range(12):
        expected, result = iterate(DENSE, kernel, v, 2.0, 2.0, iterations=1), run(v, two, two)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-12), result, expected)
        v = expected.v
    assert 1e-9 < expected.status.residual < 1e-2


@pytest.mark.parametrize(("p", "q"), [(2, 1), (inf, 2.5), (1, 3), (1.5, 4)])
def test_sigma_grows_from_below(p, q):
    """sigma never decreases, never exceeds the norm, and the residual goes to zero."""
    kernel, v = normal(3, 3, seed=3), normal(3, seed=4)
    sigmas, residuals = [], []
    for _ in range(25):
        result = iterate(DENSE, kernel, v, p, q, iterations=1)
        v = result.v
        sigmas.append(result.sigma)
        residuals.append(result.status.residual)
    assert np.all(np.diff(sigmas) >= -1e-14)
    assert sigmas[-1] <= brute_force_norm(kernel.T, p, q) * (1 + 1e-9)
    assert residuals[0] > 1e-3 and residuals[-1] < 1e-6


@pytest.mark.parametrize(("p", "q"), [(2.0, 1.2), (6.0, 2.5), (1.5, 4.0)])
def test_duality(p, q):
    """||W||_{p->q} = ||W^T||_{q*->p*}."""
    starts = normal(32, 3, seed=1)
    for kernel in normal(6, 3, 3):
        sigma = search_traced(kernel, starts, p, q).sigma
        np.testing.assert_allclose(search_traced(kernel.T, starts, conjugate(q), conjugate(p)).sigma, sigma, rtol=1e-9)


@pytest.mark.parametrize(("p", "q"), [(3.0, 1.5), (3.0, 3.0), (inf, 1)])
def test_positive_matrices_need_one_start(p, q):
    """For a positive matrix and p >= q every positive start leads to the norm."""
    for kernel in np.abs(normal(5, 3, 3)) + 0.01:
        expected = brute_force_norm(kernel.T, p, q)
        for start in np.abs(normal(3, 3, seed=1)):
            result = iterate(DENSE, kernel, start, p, q) if p == inf else search_traced(kernel, start[None], p, q)
            np.testing.assert_allclose(result.sigma, expected, rtol=1e-9)


@partial(jax.jit, static_argnums=0)
def closed_forms(linear_map, kernel):
    """Norms of columns [I] and of rows [O] by order: numbers, and one array."""
    orders = {1: 1, 2: 2.0, 2.5: jnp.asarray(2.5), inf: inf}
    from_one = {key: linear_map.column_norms(kernel, order)[:, 0] for key, order in orders.items()}
    return from_one, {key: linear_map.row_norms(kernel, order) for key, order in orders.items()}


def test_closed_forms_dense():
    """1 -> q and p -> inf by enumeration of the vertices of the ball, the second through duality."""
    dense, kernel = DenseMap(4, 3), normal(4, 3)
    from_one, to_infinity = closed_forms(dense, kernel)
    for order in from_one:
        np.testing.assert_allclose(max(from_one[order]), enumerated_norm(kernel.T, order, domain=1), rtol=1e-12)
        expected = enumerated_norm(kernel, conjugate(order), domain=1)
        np.testing.assert_allclose(max(to_infinity[order]), expected, rtol=1e-12)
        np.testing.assert_allclose(from_one[order], np.linalg.norm(kernel, order, axis=1), rtol=1e-12)
        np.testing.assert_allclose(to_infinity[order], np.linalg.norm(kernel, conjugate(order), axis=0), rtol=1e-12)


OTHER_CONVS = [
    ConvMap((3, 2), 2, 3, 1),
    ConvMap((4,), 2, 3, padding="periodic"),
    ConvMap((2,), 2, 3, 5, padding="periodic"),
    ConvMap((2, 3), 2, 1, (5, 3), padding="periodic"),
    ConvMap((3, 1, 2), 2, 3, padding="periodic"),
    ConvMap((2,), 2, 3, 5),
    ConvMap((3, 1, 2), 2, 3),
]


@pytest.mark.parametrize("conv", [*CONVS, *OTHER_CONVS], ids=str)
def test_closed_forms_convolution(conv):
    """Columns and rows of the dense matrix, the largest of each channel, also on images smaller than the kernel."""
    kernel = jnp.asarray(normal(*conv.kernel_shape))
    matrix = dense_matrix(conv, kernel)
    from_one, to_infinity = closed_forms(conv, kernel)
    for order in from_one:
        columns = np.linalg.norm(matrix, order, axis=0).reshape(-1, conv.channels_in)
        rows = np.linalg.norm(matrix, conjugate(order), axis=1).reshape(-1, conv.channels_out)
        np.testing.assert_allclose(from_one[order], np.max(columns, axis=0), rtol=1e-12)
        np.testing.assert_allclose(to_infinity[order], np.max(rows, axis=0), rtol=1e-12)


@pytest.mark.parametrize(("p", "q"), [(inf, 2), (2.5, 2)])
def test_power_iteration_convolution(p, q):
    """On a convolution it is power iteration on its dense matrix; on 1x2x2 images that is the norm by brute force."""
    tiny, conv = ConvMap((1, 2), 2, 2), CONVS[0]
    kernel, starts = normal(1, *tiny.kernel_shape), normal(32, *tiny.input_shape, seed=1)
    sigma = search(tiny, kernel, starts, p, q, tolerance=1e-13, max_iterations=5000).sigma[0]
    matrix = dense_matrix(tiny, kernel[0])
    np.testing.assert_allclose(sigma, brute_force_norm(matrix, p, q), rtol=1e-9)

    kernel, start = jnp.asarray(normal(*conv.kernel_shape)), normal(*conv.input_shape, seed=1)
    matrix = jnp.asarray(dense_matrix(conv, kernel).T)
    result = iterate(conv, kernel, start, p, q, iterations=10)
    expected = iterate(DenseMap(*matrix.shape), matrix, start.ravel(), p, q, iterations=10)
    np.testing.assert_allclose(result.sigma, expected.sigma, rtol=1e-12)
    np.testing.assert_allclose(result.v.ravel(), expected.v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("p", "q"), [(3.0, 1.5), (1.5, 3.0), (inf, 2.0)])
def test_pixelwise_convolution(p, q):
    """A 1x1 convolution holds its matrix once a pixel: for p > q its norm exceeds that of the matrix."""
    conv, h = ConvMap((1, 2), 2, 2, 1), 1e-4
    kernel = normal(*conv.kernel_shape)
    result = search(conv, kernel[None], normal(32, 2), p, q, tolerance=1e-14, max_iterations=5000)
    u, v = result.u[0], result.v[0]
    whole = np.kron(np.eye(2), kernel[0, 0].T)
    np.testing.assert_allclose(induced_norm(conv, kernel, u, v, p, q), brute_force_norm(whole, p, q), rtol=1e-8)
    value, slope = jax.jit(jax.value_and_grad(partial(order_loss, conv, kernel, v, p)))(q)
    np.testing.assert_allclose(value, brute_force_norm(whole, p, q), rtol=1e-8)
    expected = (brute_force_norm(whole, p, q + h) - brute_force_norm(whole, p, q - h)) / (2 * h)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def slope_of_the_norm(kernel, direction, p, q):
    """Derivative of the norm along a direction, by differences of brute force."""
    norms = [brute_force_norm((kernel + h * direction).T, p, q) for h in (1e-4, -1e-4)]
    return (norms[0] - norms[1]) / 2e-4


@pytest.mark.parametrize(("p", "q"), [(1, 3), (2.5, inf), (inf, 2)])
def test_gradient_in_the_kernel(p, q):
    """d sigma / d kernel is that of the norm by brute force, with closed form and without."""
    kernel, direction = normal(3, 3, seed=2), normal(3, 3, seed=5)
    u, v = np.zeros(3), np.zeros(3)
    if needs_power_iteration(p, q):
        u, v = search(DENSE, kernel[None], normal(32, 3), p, q, tolerance=1e-15, max_iterations=9000)[1:3]
        u, v = u[0], v[0]
    gradient = jax.jit(jax.grad(lambda kernel: induced_norm(DENSE, kernel, u, v, p, q)))(kernel)
    np.testing.assert_allclose(np.vdot(gradient, direction), slope_of_the_norm(kernel, direction, p, q), rtol=1e-5)


@pytest.mark.parametrize(("p", "q"), [(3.0, 1.5), (1.5, 3.0)])
def test_gradient_in_the_kernel_alone(p, q):
    """With orders that are arrays the gradient in the kernel is that of the norm, and there is no other."""
    kernel, direction = normal(3, 3, seed=2), normal(3, 3, seed=5)
    _, u, v, _ = search_traced(kernel, normal(32, 3), p, q)
    gradients = induced_gradients(kernel, u, v, p, q)
    slope = np.vdot(gradients[0], direction)
    np.testing.assert_allclose(slope, slope_of_the_norm(kernel, direction, p, q), rtol=1e-5)
    assert all(np.all(other == 0) for other in gradients[1:])


@pytest.mark.parametrize(("p", "q"), [(2.0, 2.0), (1.4, 3.0), (3.0, 1.4)])
def test_gradient_of_the_order_loss(p, q):
    """d/dp and d/dq with W and v fixed are those of the norm itself; no gradient flows into W and v."""
    kernel = normal(3, 3, seed=2)
    v = search_traced(kernel, normal(32, 3), p, q).v
    value, gradients = order_gradients(kernel, v, p, q)
    np.testing.assert_allclose(value, brute_force_norm(kernel.T, p, q), rtol=1e-9)
    assert np.all(gradients[0] == 0) and np.all(gradients[1] == 0)
    h = 1e-4
    slope_p = (brute_force_norm(kernel.T, p + h, q) - brute_force_norm(kernel.T, p - h, q)) / (2 * h)
    slope_q = (brute_force_norm(kernel.T, p, q + h) - brute_force_norm(kernel.T, p, q - h)) / (2 * h)
    np.testing.assert_allclose(gradients[2:], [slope_p, slope_q], rtol=1e-5)
    assert slope_p > 0 > slope_q


def test_gradient_of_the_order_loss_in_closed_forms():
    """1 -> q in q and p -> inf in p, for a convolution at the image's border too."""
    conv, h = CONVS[1], 1e-5
    kernel = normal(*conv.kernel_shape)
    matrix, v = dense_matrix(conv, jnp.asarray(kernel)), jnp.zeros(conv.input_shape)
    for loss, norm in [
        (lambda q: order_loss(conv, kernel, v, 1, q), lambda q: enumerated_norm(matrix, q, domain=1)),
        (lambda p: order_loss(conv, kernel, v, p, inf), lambda p: enumerated_norm(matrix.T, p / (p - 1), domain=1)),
    ]:
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(2.5), (norm(2.5 + h) - norm(2.5 - h)) / (2 * h), rtol=1e-7)


@pytest.mark.parametrize(("p", "q"), [(inf, 2.5), (3, 1.5), (1.2, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_float32_at_any_scale(p, q, scale):
    """In float32 sigma scales with W over sixty decades: powers neither overflow nor vanish."""
    kernels, starts = small_matrices()[:4].astype(np.float32), normal(32, 3, seed=1).astype(np.float32)
    result = search(DENSE, np.float32(scale) * kernels, starts, p, q, tolerance=1e-6, max_iterations=500)
    assert all(leaf.dtype == jnp.float32 for leaf in (*result[:3], result.status.residual))
    assert np.all(result.status.converged)
    expected = [brute_force_norm(kernel.T.astype(float), p, q) for kernel in kernels]
    np.testing.assert_allclose(result.sigma / np.float32(scale), expected, rtol=1e-5)


@pytest.mark.parametrize(("p", "q"), [(1, 1), (inf, 2), (3, 1.5)])
def test_zero_operator(p, q):
    """The zero map has norm 0 and converges; no NaN in the vectors and in the gradients; v stays a start."""
    kernel, start = jnp.zeros((3, 3)), normal(3)
    sigma, u, v, status = iterate(DENSE, kernel, start, p, q)
    assert sigma == 0 and status.converged and np.all(u == 0) and np.all(np.isfinite(v)) and np.any(v != 0)
    value, gradient = jax.value_and_grad(lambda kernel: induced_norm(DENSE, kernel, u, v, p, q))(kernel)
    assert value == 0 and np.all(np.isfinite(gradient))
    loss, slopes = jax.value_and_grad(lambda r: order_loss(DENSE, kernel, v, *r))(jnp.asarray([2.5, 1.5]))
    assert loss == 0 and np.all(slopes == 0)


@pytest.mark.parametrize("order", [1, 1.5, 2, 3.0, inf])
def test_vector_norm(order):
    """NumPy's norm over the given axes; finite gradients, zero at a zero element and at the zero vector."""
    x = normal(4, 3, 2)
    x[0, 0, 0] = 0
    gradient_of = jax.jit(jax.grad(lambda x: vector_norm(x, order)))
    np.testing.assert_allclose(vector_norm(x, order, axis=1), np.linalg.norm(x, order, axis=1), rtol=1e-14)
    np.testing.assert_allclose(vector_norm(x, order), np.linalg.norm(x.ravel(), order), rtol=1e-14)
    np.testing.assert_allclose(gradient_of(x), np.where(x == 0, 0, dual_map(x, order)[0]), rtol=1e-12)
    assert np.all(gradient_of(np.zeros_like(x)) == 0)


@pytest.mark.parametrize("order", [1.5, 2.0, 3.0])
def test_slope_of_the_vector_norm_in_the_order(order):
    """Against differences, with zero elements; zero at the zero vector."""
    x, h = normal(5), 1e-6
    x[1] = 0
    slope_of = jax.jit(jax.grad(vector_norm, argnums=1))
    expected = (np.linalg.norm(x, order + h) - np.linalg.norm(x, order - h)) / (2 * h)
    np.testing.assert_allclose(slope_of(x, order), expected, rtol=1e-6)
    assert slope_of(np.zeros(5), order) == 0


def test_orders_that_need_power_iteration():
    """Those without closed form: arrays always, and numbers unless domain is 1 or codomain infinity."""
    assert not needs_power_iteration(1, 3.0) and not needs_power_iteration(2.0, inf)
    assert not needs_power_iteration(1, jnp.asarray(2.0)) and not needs_power_iteration(jnp.asarray(2.0), inf)
    assert needs_power_iteration(2.0, 2.0) and needs_power_iteration(inf, 1)
    assert needs_power_iteration(jnp.asarray(1.5), jnp.asarray(2.5))


@pytest.mark.parametrize("bad", [0.5, -1, math.nan, "f", None, jnp.ones(2), jnp.asarray(2)], ids=repr)
def test_bad_orders(bad):
    """The error names the argument."""
    kernel, v = jnp.ones((3, 3)), jnp.ones(3)
    iteration = partial(power_iteration, partial(DENSE.matvec, kernel), v)
    for name in ("domain", "codomain"):
        for function in (iteration, partial(induced_norm, DENSE, kernel, v, v)):
            with pytest.raises(ValueError, match=f"^{name}: expected an order of at least 1"):
                function(**{name: bad})
    with pytest.raises(ValueError, match=r"^codomain: expected an order of at least 1"):
        order_loss(DENSE, kernel, v, 2.0, bad)
