"""Activations: their Lipschitz constants are true, attained, and their kinks are where they should be."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.activations import (
    ACTIVATIONS,
    MIXING,
    Activation,
    clipswish,
    cpila,
    get_activation,
    lipschitz_cube,
    lipswish,
    maxmin,
)
from resflow_jax.functional.primitives.platforms import compiling_for
from tests.functional.contractions import check_two_orders

GRID = jnp.linspace(-60.0, 60.0, 240_001)
SORTS = sorted(MIXING)
ELEMENTWISE = sorted(set(ACTIVATIONS) - set(SORTS))
ORDERS = [1, 1.5, 2, 3, 10, math.inf]


def named(name, dtype=float):
    """The activation of initial parameters, as a function of x."""
    activation = get_activation(name)
    params = {key: jnp.asarray(value, dtype) for key, value in activation.initial}
    return lambda x: activation(params, x)


@partial(jax.jit, static_argnums=0)
def derivative(function, x, *params):
    """Slopes of the outputs of one channel, [N, expansion]."""
    return jax.vmap(jax.jacfwd(lambda x: function(x[None], *params)))(x)


@cache
def slopes(name):
    return np.asarray(derivative(named(name), GRID))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lipschitz_constant_is_the_largest_singular_value(name):
    """max |J|_2 = the stated constant <= 1 over a line through R^4 that swaps all channels, attained to 1e-3."""
    activation = get_activation(name)
    x = jnp.asarray([[1.0, -0.7, 0.5, -0.3]]) * jnp.linspace(-60.0, 60.0, 24_001)[:, None] + jnp.arange(4.0)[None]
    jacobians = jax.jit(jax.vmap(jax.jacfwd(named(name))))(x)
    assert jacobians.shape == (len(x), 4 * activation.expansion, 4)
    # |J|_2^2 is the largest eigenvalue of J^T J
    norm = np.sqrt(np.linalg.eigvalsh(jnp.swapaxes(jacobians, 1, 2) @ jacobians)[:, -1].max())
    assert norm <= activation.lipschitz * (1 + 1e-14) <= 1 + 1e-14
    assert norm >= activation.lipschitz - 1e-3


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("p", ORDERS)
def test_lipschitz_constant_in_p_norms_on_a_grid(name, p):
    """max |(slopes of all outputs of one channel)|_p is `lipschitz_in(p)`, attained to 1e-3."""
    norm = np.linalg.norm(slopes(name), p, axis=-1).max()
    bound = get_activation(name).lipschitz_in(p)
    assert bound - 1e-3 <= norm <= bound * (1 + 1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lipschitz_constant_in_p_norms_for_random_pairs(name):
    """|f(x) - f(y)|_p <= lipschitz_in(p) |x - y|_p in 16 dimensions, near and far pairs."""
    rng = np.random.default_rng(0)
    f = jax.jit(named(name))
    for step in (1e-3, 1.0, 100.0):
        x = rng.normal(scale=3, size=(2000, 16))
        y = x + rng.normal(scale=step, size=x.shape) * rng.integers(0, 2, x.shape)
        change = f(x) - f(y)
        for p in ORDERS:
            bound = get_activation(name).lipschitz_in(p) * np.linalg.norm(x - y, p, axis=-1)
            assert np.all(np.linalg.norm(change, p, axis=-1) <= bound * (1 + 1e-10) + 1e-13)


@pytest.mark.parametrize("name", SORTS)
def test_sorts_permute(name):
    """The Jacobian is a permutation matrix, an isometry of every p-norm; at ties it still does not expand."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)))
    jacobians = np.asarray(jax.vmap(jax.jacfwd(named(name)))(x))
    assert set(np.unique(jacobians)) == {0.0, 1.0}
    np.testing.assert_array_equal(jacobians.sum(1), 1)
    np.testing.assert_array_equal(jacobians.sum(2), 1)
    tied = jax.jacfwd(named(name))(jnp.zeros(6))
    assert max(np.linalg.norm(tied, p) for p in (1, 2, np.inf)) <= 1 + 1e-14


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_which_activations_mix_channels(name):
    """Only outputs of the sorts depend on another channel than their own."""
    jacobian = jax.jacfwd(named(name))(jnp.asarray([1.0, 0.5, -1.0, -0.5])).reshape(-1, 4, 4)
    assert np.any(np.asarray(jacobian)[:, ~np.eye(4, dtype=bool)]) == (name in MIXING)


def test_sorts_order():
    """maxmin sorts pairs, fullsort everything, both ascending along the last axis."""
    x = jnp.asarray([[3.0, 1.0, 2.0, 5.0], [0.0, 4.0, -1.0, -2.0]])
    np.testing.assert_array_equal(named("maxmin")(x), [[1, 3, 2, 5], [0, 4, -2, -1]])
    np.testing.assert_array_equal(named("fullsort")(x), [[1, 2, 3, 5], [-2, -1, 0, 4]])


@pytest.mark.parametrize("beta", [-2.0, -0.5, 0.0, 0.5, 1.0, 5.0])
def test_swish_constants_do_not_depend_on_beta(beta):
    """sup |d lipswish / dx| is the same number for every beta, the maximum to ten digits; so for clipswish."""
    scaled = jnp.linspace(2.3, 2.5, 24_001) / jax.nn.softplus(beta)  # the peak is at 2.3994 / softplus(beta)
    for name, function in (("lipswish", lipswish), ("clipswish", clipswish)):
        bound = ACTIVATIONS[name].lipschitz
        for grid in (GRID[::10], scaled):
            norms = np.linalg.norm(derivative(function, grid, beta), axis=-1)
            assert np.max(norms) <= bound * (1 + 1e-14)
        np.testing.assert_allclose(np.max(norms), bound, rtol=1e-9)


def leaky_lipswish(x, params):
    return get_activation("leakylipswish")(params, x)


@pytest.mark.parametrize("alpha", [-20.0, -3.0, 0.0, 3.0, 20.0])
def test_leaky_lipswish_never_expands(alpha):
    """a + (1 - a) lipswish'(x) is within [-1, 1] for every a in (0, 1)."""
    params = {"alpha": jnp.asarray(alpha), "beta": jnp.asarray(0.5)}
    assert np.max(np.abs(derivative(leaky_lipswish, GRID[::10], params))) <= 1 + 1e-14


def test_swish_formulas():
    """lipswish, its concatenation and its leaky form, here written with exponentials."""
    x, beta, alpha = np.linspace(-5, 5, 101), 0.7, -1.2
    expected, mirrored = (t / (1 + np.exp(-np.log1p(np.exp(beta)) * t)) / 1.1 for t in (x, -x))
    np.testing.assert_allclose(lipswish(jnp.asarray(x), beta), expected, rtol=1e-13)
    np.testing.assert_allclose(
        clipswish(jnp.asarray(x), beta), np.concatenate([expected, mirrored]) / 1.004, rtol=1e-13
    )
    a = 1 / (1 + np.exp(-alpha))
    leaky = ACTIVATIONS["leakylipswish"]({"alpha": alpha, "beta": beta}, jnp.asarray(x))
    np.testing.assert_allclose(leaky, a * x + (1 - a) * expected, rtol=1e-12, atol=1e-14)


def test_clipswish_concatenates_on_the_last_axis():
    """[B, H, W, C] -> [B, H, W, 2C], the first C channels from x, the others from -x."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))
    y = named("clipswish")(x)
    assert y.shape == (2, 3, 4, 10)
    np.testing.assert_allclose(y[..., :5], lipswish(x) / 1.004, rtol=1e-14)
    np.testing.assert_allclose(y[..., 5:], lipswish(-x) / 1.004, rtol=1e-14)


def test_clipswish_constants():
    """Just below one in the 2-norm; (2 M - 1) / (1.1 * 1.004) in the 1-norm, the plain slope in the max-norm."""
    activation = ACTIVATIONS["clipswish"]
    assert 0.9999 < activation.lipschitz < 1
    largest = 1.1 * ACTIVATIONS["lipswish"].lipschitz
    np.testing.assert_allclose(activation.lipschitz_in(1), (2 * largest - 1) / (1.1 * 1.004), rtol=1e-14)
    np.testing.assert_allclose(activation.lipschitz_in(math.inf), largest / (1.1 * 1.004), rtol=1e-14)


def test_cpila_constants():
    """For 400 orders p the largest p-norm of the slopes is that at one of two points; 0.9988 for the 2-norm."""
    activation = ACTIVATIONS["cpila"]
    np.testing.assert_allclose(activation.lipschitz, np.hypot(1, 19 * np.exp(-4)) / 1.06, rtol=1e-14)
    assert 0.998 < activation.lipschitz < 1
    found = np.abs(derivative(cpila, jnp.linspace(-1.5, 1.5, 30_001)))
    for p in [*np.linspace(1, 3, 300), *np.geomspace(3, 300, 100), math.inf]:
        norm = np.linalg.norm(found, p, axis=-1).max()
        np.testing.assert_allclose(norm, activation.lipschitz_in(p), rtol=1e-7)
        assert norm <= activation.lipschitz_in(p) * (1 + 1e-14)


def test_cpila_formula():
    """The parts below and above the joint, here written without clipping; three derivatives are continuous there."""
    x = np.linspace(-3, 3, 301)
    parts = [np.where(z > 0, z, (12.5 * z**3 - 5 * z**2 + z) * np.exp(5 * z)) for z in (x - 0.2, -x - 0.2)]
    np.testing.assert_allclose(cpila(jnp.asarray(x)[:, None]), np.stack(parts, axis=1) / 1.06, rtol=1e-13, atol=1e-15)
    f = lambda x: cpila(x[None])[0]  # noqa: E731
    for expected in (0, 1 / 1.06, 0, 0):
        np.testing.assert_allclose(jax.jit(jax.vmap(f))(0.2 + jnp.asarray([-1e-7, 0.0, 1e-7])), expected, atol=1e-4)
        f = jax.grad(f)


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - {"relu"}))
def test_continuously_differentiable(name):
    """phi' moves by at most 2 h over a step h (|phi''| <= 2, for cpila 3): no jump anywhere."""
    curvature = 3 if name == "cpila" else 2.01
    assert np.max(np.abs(np.diff(slopes(name), axis=0))) <= curvature * (GRID[1] - GRID[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_jacobian_vector_products(name):
    """x -> w^T J(x) v, which log-det estimators differentiate, twice: by vjp and jvp, by finite differences."""
    rng = np.random.default_rng(1)
    x, v = jnp.asarray(rng.normal(size=(2, 3, 4)))
    w = jnp.asarray(rng.normal(size=(3, 4 * get_activation(name).expansion)))
    by_jvp = lambda x: jnp.sum(w * jax.jvp(named(name), (x,), (v,))[1])  # noqa: E731
    by_vjp = lambda x: jnp.sum(jax.vjp(named(name), x)[1](w)[0] * v)  # noqa: E731
    check_two_orders(lambda x: by_jvp(x) + 0.7 * by_vjp(x), x)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_lipschitz_cube_at_its_joint(sign):
    """x^3/3 and x - sign(x) 2/3 meet at +-1 with one value and one slope."""
    x = sign * jnp.array([1 - 1e-9, 1.0, 1 + 1e-9])
    np.testing.assert_allclose(lipschitz_cube(x), sign / 3, atol=2e-9)
    np.testing.assert_allclose(derivative(lipschitz_cube, x), 1.0, atol=3e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_and_large_inputs(name):
    """The dtype is kept, and values and slopes stay finite far out."""
    function = named(name, jnp.float32)
    x = jnp.array([-1e6, -100.0, 0.0, -0.0, 100.0, 1e6], jnp.float32)
    y, slope = jax.jit(lambda x: (function(x), jax.jacfwd(function)(x)))(x)
    assert y.dtype == slope.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(y)) and jnp.all(jnp.isfinite(slope))


def test_lists_become_tuples():
    """Activations are part of what JAX hashes."""
    function = lambda params, x: jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=-1)  # noqa: E731
    settings = {"initial": [("beta", 0.5)], "other_slopes": [[0.0, 1.0]]}
    found = Activation("mine", function, slopes=[1.0, 0.0], **settings)
    expected = Activation("mine", function, (1.0, 0.0), (("beta", 0.5),), other_slopes=((0.0, 1.0),))
    assert found == expected and hash(found) == hash(expected)


def test_unknown_name():
    """The error names what was asked for and what exists."""
    with pytest.raises(ValueError, match=r"activation: .*elu.*got 'swishh'"):
        get_activation("swishh")


def test_unknown_parameters():
    """A parameter needs a constraint, which its name tells."""
    for name in ("gamma", 1):
        with pytest.raises(ValueError, match=rf"initial: expected one of alpha, beta; got {name!r}"):
            Activation("mine", lambda params, x: x, initial=(("beta", 0.5), (name, 1.0)))


def test_maxmin_rejects_an_odd_number_of_channels():
    """The error gives the number."""
    with pytest.raises(ValueError, match="maxmin: expected an even number of channels, got 3"):
        maxmin(jnp.zeros((2, 3)))


@pytest.mark.parametrize("p", [0.5, math.nan, "2", None])
def test_rejects_what_is_no_norm(p):
    """p below one gives no norm."""
    with pytest.raises(ValueError, match="p: expected an order of at least 1"):
        ACTIVATIONS["elu"].lipschitz_in(p)


@partial(jax.jit, static_argnums=0)
def derivatives_to_third_order(f, x, beta):
    f_x, f_b = jax.grad(f, 0), jax.grad(f, 1)
    f_xx, f_xb, f_bb = jax.jacfwd(f_x, 0), jax.jacfwd(f_x, 1), jax.jacfwd(f_b, 1)
    found = [f, f_x, f_b, f_xx, f_xb, jax.grad(f_b, 0), f_bb, jax.grad(f_xx, 1), jax.grad(f_xb, 0), jax.grad(f_xx)]
    return [jax.vmap(function, (0, None))(x, beta) for function in found]


def lipswish_formula(x, beta):
    return x / (1 + jnp.exp(-jnp.log1p(jnp.exp(beta)) * x)) / 1.1


@pytest.mark.parametrize("beta", [-1.0, 0.5, 3.0])
def test_closed_form_derivatives_of_lipswish(beta):
    """Derivatives up to the third, in x and beta and mixed, are those of the formula, forwards and backwards."""
    x = jnp.linspace(-6, 6, 41)
    found, expected = (derivatives_to_third_order(f, x, beta) for f in (lipswish, lipswish_formula))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)


def test_a_gpu_sums_the_gradient_in_beta():
    """The gradient for a beta of each channel is a matrix product on a CPU and a sum on a GPU, and the same."""
    x, params = jnp.linspace(-3, 3, 24).reshape(2, 4, 3), {"beta": jnp.asarray(0.3)}
    programs, found = [], []
    for platform in ("cpu", "gpu"):
        with compiling_for(platform):
            gradient = jax.grad(lambda params: jnp.sum(jnp.cos(ACTIVATIONS["lipswish"](params, x))))
            programs.append(str(jax.make_jaxpr(gradient)(params)))
            found.append(jax.jit(gradient)(params)["beta"])
    assert "dot_general" in programs[0] and "dot_general" not in programs[1]
    np.testing.assert_allclose(*found, rtol=1e-14)
