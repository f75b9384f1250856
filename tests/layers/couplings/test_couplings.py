"""Coupling layers: the inverse undoes them, the log-det is that of the dense Jacobian, what is kept is kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.logistic_mixtures import inverse_mixture_logit, mixture_logit, mixture_of
from resflow_jax.functional.splines import Knots, inverse_spline, knots, slope_bounds, spline
from tests.functional.contractions import check_two_orders
from tests.layers.couplings.layers import CNN, IMAGE, KEEP, LAYERS, MLP, NET, dense_jacobians, made


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_and_log_det(name):
    """f^-1(f(x)) = x, and the log-det in both directions is slogdet of the dense Jacobian. The layer stays as it is."""
    layer, x, condition = made(name)
    before = jax.tree.map(jnp.copy, nnx.state(layer))

    @nnx.jit
    def run(layer, x, condition):
        y, log_det = layer.forward(x, condition=condition)
        back, status = layer.inverse(y, condition=condition, return_status=True)
        again = layer.solve_and_estimate(y, None, None, rf.Anderson(), condition)
        return y, log_det, back, status, again[:2]

    y, log_det, back, status, again = run(layer, x, condition)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)
    assert not np.allclose(y, x, atol=0.1) and status.converged.all()
    iterative = 2 if name.startswith("stack of") else int(name.startswith("mixture"))
    assert status.converged.shape == (iterative, 3)
    jacobians = dense_jacobians(layer, x, condition)
    expected = np.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(log_det, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(again[0], x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(again[1], expected, rtol=1e-8, atol=1e-8)
    chex.assert_trees_all_equal(nnx.state(layer), before)
    assert layer.lipschitz_bounds() == (np.inf, np.inf)


@pytest.mark.parametrize("name", ["affine by an array", "affine on pixels", "mixture on channels", "stack"])
def test_the_condition_matters(name):
    """Another condition gives another y; a missing one is an error."""
    layer, x, condition = made(name)
    assert not np.allclose(layer(x, condition), layer(x, condition + 1), atol=1e-3)
    with pytest.raises(ValueError, match="condition: expected floats"):
        layer.forward(x)


@pytest.mark.parametrize(
    ("mask", "shape", "network", "kept", "flipped"),
    [
        ("halves", (5,), MLP, [1, 1, 0, 0, 0], False),
        ("halves", (5,), MLP, [1, 1, 0, 0, 0], True),
        ("checkerboard", (5,), MLP, [1, 0, 1, 0, 1], True),
        (KEEP, (5,), MLP, KEEP, False),
        ([True, False, False], (3,), MLP, [1, 0, 0], True),
        ("halves", (2, 2, 2), CNN, [[[1, 0]] * 2] * 2, True),
        ("checkerboard", (2, 2, 2), CNN, [[[1, 1], [0, 0]], [[0, 0], [1, 1]]], False),
        ("checkerboard", (2, 2, 2), CNN, [[[1, 1], [0, 0]], [[0, 0], [1, 1]]], True),
    ],
)
def test_what_is_kept(mask, shape, network, kept, flipped):
    """These elements stay, bit for bit; all others move, and depend on no other moved element."""
    layer = rf.AdditiveCoupling(shape, network, mask, flipped, rngs=nnx.Rngs(0))
    nnx.update(layer, jax.tree.map(lambda p: p + 0.1, nnx.state(layer, nnx.Param)))
    kept = np.asarray(kept, bool) ^ flipped
    x = np.ones((1, *shape))
    other = np.where(kept[None], x, 5 * x)
    graphdef, state = nnx.split(layer)
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, np.concatenate([x, other]))
    np.testing.assert_array_equal(y[0] == x[0], kept)
    np.testing.assert_allclose(y[1] - other[0], y[0] - x[0], atol=1e-12)


@pytest.mark.parametrize("settings", [MLP, CNN, NET])
def test_the_start_is_the_identity(settings):
    """With a last layer of zeros; a mixture is near it, and its components differ in their gradients."""
    shape = (4, 4, 2)
    x = jax.random.normal(jax.random.key(0), (2, *shape))
    for make in (rf.AdditiveCoupling, rf.AffineCoupling, rf.SplineCoupling):
        y = jax.jit(lambda x, make=make: make(shape, settings, rngs=nnx.Rngs(0))(x))(x)
        np.testing.assert_allclose(y, x, atol=1e-12)
    layer = rf.MixtureCoupling(shape, settings, components=3, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)

    def log_det(state):
        y, log_det = nnx.merge(graphdef, state).transform(x)
        return jnp.sum(log_det), y

    slopes, y = jax.jit(jax.grad(log_det, has_aux=True))(state)
    assert np.abs(y - x).max() < 0.2
    bias = nnx.merge(graphdef, slopes).network
    bias = (bias.last if settings is NET else bias.linears[-1]).bias[...]
    means = bias.reshape(4, 4, 11, 1)[..., 5:8, 0].sum((0, 1)) if settings is MLP else bias.reshape(11, 1)[5:8, 0]
    assert len(np.unique(np.round(means, 9))) == 3


@pytest.mark.parametrize("settings", [rf.MLPConditioner(()), rf.CNNConditioner((), (3,))])
def test_the_start_without_hidden_layers_is_the_identity(settings):
    """For every condition, though its gate then acts on the output."""
    x, c = jax.random.normal(jax.random.key(0), (2, 2, 2, 2)), jnp.ones((2, 3))
    layer = rf.AffineCoupling((2, 2, 2), settings, condition_dim=3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, c), x)


def test_spline_against_its_definition():
    """Knots lie on the curve with their slopes, the map is increasing, and the identity outside; so is the inverse."""
    theta = jax.random.normal(jax.random.key(0), (11, 1))
    at = knots(theta, 4, 2.0)
    np.testing.assert_array_equal(at.x[jnp.asarray([0, -1]), 0], [-2, 2])
    y, log_slope = jax.jit(spline)(at.x, jax.tree.map(lambda k: jnp.broadcast_to(k, (5, *k.shape)), at), 2.0)
    np.testing.assert_allclose(y, at.y, atol=1e-12)
    np.testing.assert_allclose(jnp.exp(log_slope), at.slopes, rtol=1e-9)
    x = jnp.linspace(-3, 3, 301)[:, None]
    every = jax.tree.map(lambda k: jnp.broadcast_to(k, (301, *k.shape)), at)
    y, log_slope = jax.jit(spline)(x, every, 2.0)
    assert (jnp.diff(y[:, 0]) > 0).all()
    outside = np.abs(x) > 2
    np.testing.assert_array_equal(y[outside], x[outside])
    np.testing.assert_allclose(
        jnp.exp(log_slope[:, 0]), jax.jit(jax.grad(lambda x: spline(x, every, 2.0)[0].sum()))(x)[:, 0]
    )
    back, other = jax.jit(inverse_spline)(y, every, 2.0)
    np.testing.assert_allclose(back, x, atol=1e-11)
    np.testing.assert_allclose(other, log_slope, atol=1e-9)


@pytest.mark.parametrize("curve", [spline, inverse_spline])
def test_shared_knots(curve):
    """Knots without axes of a batch give what the same knots give for each example; so do all gradients."""
    theta, x = jax.random.normal(jax.random.key(0), (11, 3)), 3 * jax.random.normal(jax.random.key(1), (20, 3))

    def value(theta, x, are_shared):
        at = knots(theta, 4, 2.0)
        every = at if are_shared else jax.tree.map(lambda part: jnp.broadcast_to(part, (20, *part.shape)), at)
        values, log_slopes = curve(x, every, 2.0)
        return jnp.sum(jnp.sin(values) + log_slopes), (values, log_slopes)

    found = jax.jit(jax.grad(value, (0, 1), has_aux=True), static_argnums=2)
    chex.assert_trees_all_close(found(theta, x, True), found(theta, x, False), rtol=1e-12)


def test_bounds_of_slopes():
    """No slope on a fine grid leaves the bounds. Those of the identity are 1; those of NaN are no numbers."""
    assert np.isnan(slope_bounds(knots(jnp.full((11, 1), jnp.nan), 4, 2.0))).all()
    for seed in range(5):
        at = knots(4 * jax.random.normal(jax.random.key(seed), (11, 3)), 4, 2.0)
        x = jnp.repeat(jnp.linspace(-2, 2, 4001)[:, None], 3, axis=1)
        slopes = jnp.exp(jax.jit(spline)(x, at, 2.0)[1])
        least, greatest = slope_bounds(at)
        assert least <= slopes.min() and slopes.max() <= greatest
    straight = Knots(*(jnp.asarray(part)[:, None] for part in ([-2.0, 0.0, 2.0], [-2.0, -1.0, 2.0], [1.0, 1.0, 1.0])))
    assert slope_bounds(knots(jnp.zeros((11, 1)), 4, 2.0)) == pytest.approx((1.0, 1.0), rel=1e-12)
    assert slope_bounds(straight)[0] < 0.5 and slope_bounds(straight)[1] > 1.5


def test_mixture_against_its_definition():
    """logit of the weighted sum of sigmoids, and its slope; far in the tails too, where the sum rounds to 0 or 1."""
    theta = jax.random.normal(jax.random.key(0), (1, 9, 1))
    log_weights, means, log_scales = mixture = mixture_of(theta)
    x = jnp.asarray([[0.3]])
    cdf = jnp.sum(jnp.exp(log_weights) * jax.nn.sigmoid((x[..., None, :] - means) * jnp.exp(-log_scales)))
    (h, log_slope), pullback = jax.vjp(lambda x: jax.jit(mixture_logit)(x, mixture), x)
    np.testing.assert_allclose(h[0, 0], jnp.log(cdf / (1 - cdf)), rtol=1e-12)
    np.testing.assert_allclose(jnp.exp(log_slope), pullback((jnp.ones((1, 1)), jnp.zeros((1, 1))))[0])
    far = jnp.asarray([[-300.0], [300.0]])
    mixtures = jax.tree.map(lambda part: jnp.repeat(part, 2, axis=0), mixture)
    h, log_slope = jax.jit(mixture_logit)(far, mixtures)
    assert jnp.isfinite(h).all() and jnp.isfinite(log_slope).all()
    back, status = jax.jit(inverse_mixture_logit, static_argnums=3)(h, mixtures, 1e-12, 200)
    np.testing.assert_allclose(back, far, rtol=1e-10)
    assert status.converged.all() and status.iterations.max() < 80


def test_derivatives_of_the_inverse_of_a_mixture():
    """First and second derivatives, in the value and in the mixture, against finite differences."""

    def root(value, theta):
        return inverse_mixture_logit(value, mixture_of(theta), 1e-13, 200)[0][0, 0]

    check_two_orders(root, jnp.asarray([[0.4]]), jax.random.normal(jax.random.key(0), (1, 9, 1)))


def test_a_solve_that_does_not_finish():
    """The status tells; an eager call without status warns; its derivative is NaN."""
    layer, x, condition = made("mixture")
    y = layer(x, condition)
    solver = rf.FixedPoint(max_iterations=1)
    _, status = layer.inverse(y, condition=condition, solver=solver, return_status=True)
    assert not status.converged.any() and (status.iterations == 1).all() and (status.residual > 1e-6).all()
    with pytest.warns(RuntimeWarning, match="MixtureCoupling: 3 of 3 examples did not converge"):
        layer.inverse(y, condition=condition, solver=solver)
    total = lambda y: jnp.sum(layer.inverse(y, condition=condition, solver=solver))  # noqa: E731
    assert np.isnan(jax.jit(jax.grad(total))(y)).all()
    _, status = layer.inverse(y.at[0].set(jnp.nan), condition=condition, return_status=True)
    assert status.converged.tolist() == [[False, True, True]] and status.iterations.max() < 80


def test_a_search_in_low_precision_ends():
    """Also for an element whose residual becomes NaN, and after more steps than bfloat16 can count."""
    w = jnp.asarray([[0.3]], jnp.bfloat16)
    near = mixture_of(jnp.asarray([0.0, 0.5, 1.0], jnp.bfloat16)[None, :, None])
    far = *near[:2], jnp.full_like(near[2], -100)
    search = jax.jit(inverse_mixture_logit, static_argnums=3)
    _, status = search(w, far, 1e-2, 1000)
    assert not status.converged.any() and status.iterations.max() < 1000
    assert search(w, near, 1e-2, 1000)[1].converged.all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_a_mixture_of_any_scales(dtype, size):
    """Values, slopes and gradients are finite, also where x is a mean, and the inverse converges."""
    theta = jnp.asarray([0.0, 0.0, 0.5, -0.5, size, 0.0], dtype)[None, :, None]
    x = jnp.asarray([[0.0], [0.3], [-30.0]], dtype)
    theta = jnp.repeat(theta, 3, axis=0)

    def total(x, theta):
        h, log_slope = mixture_logit(x, mixture_of(theta))
        return (h + log_slope).sum().astype(float), (h, log_slope)

    gradients, values = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, theta)
    for part in (*gradients, *values):
        assert jnp.isfinite(part).all()
    tolerance = 1e-3 if dtype == "float32" else 0.1
    _, status = inverse_mixture_logit(jnp.asarray([[0.4], [-2.0], [5.0]], dtype), mixture_of(theta), tolerance, 1000)
    assert status.converged.all()


def test_what_overflows_is_reported():
    """An eager sample or inverse with a scale of nearly zero warns, or raises with on_failure "raise"."""
    layer = rf.AffineCoupling((2,), MLP, scale="sigmoid", rngs=nnx.Rngs(0))
    layer.network.linears[-1].bias[...] = jnp.asarray([-800.0, 1.0])
    flow = rf.Flow(layer)
    with pytest.warns(RuntimeWarning, match=r"^Flow.sample: 3 of 3 examples are not finite$"):
        flow.sample(jax.random.key(0), 3)
    with pytest.warns(RuntimeWarning, match=r"^AffineCoupling: 1 of 1 examples are not finite$"):
        layer.inverse(jnp.ones((1, 2)))
    with pytest.raises(rf.InverseError, match=r"^Flow.inverse: 2 of 2 examples are not finite$"):
        flow.inverse(jnp.ones((2, 2)), solver=rf.Anderson(on_failure="raise"))


def test_a_root_that_overflows_has_not_converged():
    """Beside an example whose search goes on, too."""
    layer = rf.MixtureCoupling((2,), rf.MLPConditioner((4,)), components=3, rngs=nnx.Rngs(0))
    layer = nnx.merge(nnx.graphdef(layer), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(layer)))
    y = jnp.asarray([[0, 3.4e38], [0, 1], [0, jnp.nan], [0, 1e30]], jnp.float32)
    x, status = jax.jit(lambda y: layer.inverse(y, return_status=True))(y)
    finite = np.isfinite(x).all(axis=1)
    assert status.converged[0].tolist() == finite.tolist()
    assert finite.tolist()[1:] == [True, False, True]


@pytest.mark.parametrize("bound", [1e-22, 1.0, 1e21])
def test_splines_of_any_unit(bound):
    """In float32 too the inverse is that of the same spline in another unit."""
    layer = rf.Spline((1,), bound=bound)
    noise = jax.random.normal(jax.random.key(0), jax.tree.leaves(nnx.state(layer))[0].shape)
    nnx.update(layer, jax.tree.map(lambda leaf: (leaf + noise).astype(jnp.float32), nnx.state(layer)))
    x = (bound * jnp.linspace(-0.95, 0.95, 20)[:, None]).astype(jnp.float32)
    np.testing.assert_allclose(layer.inverse(layer(x)), x, rtol=1e-3)


def test_narrow_bins_in_bfloat16():
    """Knots are computed in float32: the last bin has a width, and nothing is NaN."""
    layer = rf.SplineCoupling((2,), rf.MLPConditioner((4,)), rngs=nnx.Rngs(0))
    layer.network.linears[-1].bias[...] = jnp.linspace(8.0, -8.0, 23)
    layer = nnx.merge(nnx.graphdef(layer), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(layer)))
    x = jnp.stack([jnp.zeros(25), jnp.linspace(-3.0, 3.0, 25)], axis=1).astype(jnp.bfloat16)
    y, log_det, back = jax.jit(lambda x: (*layer.forward(x), layer.inverse(x)))(x)
    assert y.dtype == log_det.dtype == jnp.bfloat16
    for found in (y, log_det, back):
        assert np.isfinite(found.astype(float)).all()


def test_events_of_another_shape():
    """An inverse refuses them: an array as a mask would broadcast."""
    layer = rf.AffineCoupling((3,), MLP, np.asarray([True, False, True]), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^y: expected a float array \[B, 3\], got .*\(4, 1\)"):
        layer.inverse(jnp.ones((4, 1)))


@pytest.mark.parametrize("name", ["affine on channels", "spline", "mixture"])
def test_as_transformations(name):
    """grad under jit is finite, vmap over batches gives the batches' values, float32 and bfloat16 keep their dtype."""
    layer, x, condition = made(name)
    graphdef, state = nnx.split(layer)

    def log_det(state, x, condition):
        return nnx.merge(graphdef, state).transform(x, condition)[1]

    slopes = jax.jit(jax.grad(lambda *args: log_det(*args).sum(), argnums=(0, 1, 2)))(state, x, condition)
    assert all(jnp.isfinite(leaf).all() and jnp.any(leaf != 0) for leaf in jax.tree.leaves(slopes[1:]))
    twice = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), (x, condition))
    batched = jax.jit(jax.vmap(log_det, in_axes=(None, 0, 0)))(state, *twice)
    np.testing.assert_allclose(batched[1], jax.jit(log_det)(state, 2 * x, 2 * condition), rtol=1e-9)

    @jax.jit
    def there_and_back(state, x, condition):
        layer = nnx.merge(graphdef, state)
        y, found = layer.transform(x, condition)
        return layer.invert(y, condition), y, found

    for dtype, tolerance in ((jnp.float32, 1e-3), (jnp.bfloat16, 0.2)):
        low = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), (state, x, condition))
        back, y, found = there_and_back(*low)
        assert back.dtype == y.dtype == found.dtype == dtype and jnp.isfinite(found).all()
        np.testing.assert_allclose(back.astype(float), x, atol=tolerance * float(np.abs(x).max()))


class Unconditional(nnx.Module):
    """A network that takes no condition."""

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rf.AffineCoupling((1,), MLP, rngs=nnx.Rngs(0)),
            r"shape: expected at least 2 .*, got \(1,\), one elem",
        ),
        (lambda: rf.AffineCoupling((4, 4, 1), CNN, rngs=nnx.Rngs(0)), "shape: .*one channel; a checkerboard divides"),
        (
            lambda: rf.AffineCoupling((1, 1, 4), CNN, "checkerboard", rngs=nnx.Rngs(0)),
            "shape: expected at least 2 pixels",
        ),
        (lambda: rf.AffineCoupling((1,), MLP, "checkerboard", rngs=nnx.Rngs(0)), "shape: .* 2 elements for a checker"),
        (lambda: rf.AffineCoupling((2,), MLP, "channel", rngs=nnx.Rngs(0)), "mask: expected one of halves, checkerb"),
        (lambda: rf.AffineCoupling((2,), MLP, np.ones(3, bool), rngs=nnx.Rngs(0)), r"mask: .* shape \(2,\); got bool"),
        (lambda: rf.AffineCoupling((2,), MLP, np.ones(2, bool), rngs=nnx.Rngs(0)), "mask: .* got 2 of 2 kept"),
        (lambda: rf.AffineCoupling((2,), MLP, [True, True], rngs=nnx.Rngs(0)), "mask: .* got 2 of 2 kept"),
        (lambda: rf.AffineCoupling((2,), MLP, [1, 0], rngs=nnx.Rngs(0)), r"mask: .* shape \(2,\); got int64"),
        (lambda: rf.AffineCoupling((2,), MLP, np.zeros(2, bool), rngs=nnx.Rngs(0)), "mask: .* got 0 of 2 kept"),
        (
            lambda: rf.AffineCoupling((), MLP, rngs=nnx.Rngs(0)),
            r"shape: expected at least one axis to divide, got \(\)",
        ),
        (
            lambda: rf.AffineCoupling((2,), Unconditional(), condition_dim=2),
            r"conditioner: expected a callable with the arguments \(x, condition\), got the sig",
        ),
        (lambda: rf.AffineCoupling((2,), MLP), "rngs: expected nnx.Rngs for the settings"),
        (lambda: rf.AffineCoupling((2,), 3, rngs=nnx.Rngs(0)), "conditioner: expected the settings of a network"),
        (lambda: rf.AffineCoupling((2,), CNN, rngs=nnx.Rngs(0)), "conditioner: expected events on a grid"),
        (lambda: rf.AffineCoupling((0,), MLP, rngs=nnx.Rngs(0)), "shape: expected an integer of at least 1"),
        (lambda: rf.AffineCoupling((2,), MLP, scale="tanh", rngs=nnx.Rngs(0)), "scale: expected one of exp, sigmoid"),
        (lambda: rf.AffineCoupling((2,), MLP, condition_dim=0, rngs=nnx.Rngs(0)), "condition_dim: expected"),
        (
            lambda: rf.AffineCoupling(IMAGE, CNN, condition_dim=(2, 2, 1), rngs=nnx.Rngs(0)),
            r"condition_dim: expected a number of elements, or a shape \(4, 2, K\)",
        ),
        (lambda: rf.SplineCoupling((2,), MLP, bins=1, rngs=nnx.Rngs(0)), "bins: expected an integer of at least 2"),
        (lambda: rf.SplineCoupling((2,), MLP, bins=501, rngs=nnx.Rngs(0)), "bins: expected at most 500"),
        (lambda: rf.SplineCoupling((2,), MLP, bound=0.0, rngs=nnx.Rngs(0)), "bound: expected a positive number"),
        (lambda: rf.MixtureCoupling((2,), MLP, components=0, rngs=nnx.Rngs(0)), "components: expected"),
        (
            lambda: rf.AffineCoupling((2,), nnx.Linear(1, 3, param_dtype=float, rngs=nnx.Rngs(0)))(jnp.ones((1, 2))),
            r"conditioner: expected an output of shape \(1, 2\) for x \(1, 2\), got \(1, 3\)",
        ),
        (lambda: rf.AffineCoupling((2,), MLP, rngs=nnx.Rngs(0)).forward(jnp.ones((1, 3))), "x: expected a float array"),
        (lambda: rf.MLPConditioner((0,)), "hidden: expected an integer"),
        (lambda: rf.MLPConditioner(activation="gelu"), "activation: expected one of"),
        (lambda: rf.MLPConditioner((3,), "maxmin"), "activation: expected widths that 2 divides"),
        (lambda: rf.CNNConditioner((4,), (3,)), "kernels: expected 2 sizes"),
        (lambda: rf.CNNConditioner((4,), (3, 2)), "kernels: expected odd sizes, got 2"),
        (lambda: rf.ResNetConditioner(4, kernel=2), "kernel: expected odd sizes, got 2"),
        (lambda: rf.ResNetConditioner(0), "width: expected"),
        (lambda: rf.ResNetConditioner(3, activation="maxmin"), "activation: expected widths"),
    ],
)
def test_bad_arguments(make, message):
    """The message starts with the name of the argument."""
    with pytest.raises(ValueError, match=f"^{message}" if message[0].islower() else message):
        make()
