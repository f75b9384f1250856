"""Compositions of public layers, with a condition and without: map, log-det, inverse against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.contraction import Layered
from resflow_jax.layers.lipschitz import deferred_norms
from tests.functional.contractions import z_scores
from tests.moving import add_noise

SOLVER = rf.FixedPoint(tolerance=1e-13)
IMAGE = (4, 4, 1)


def mlp(rngs, dim=4, condition_shape=None):
    maps = [DenseMap(dim, 5), DenseMap(5, dim)]
    options = {"preactivation": False, "condition_shape": condition_shape}
    return Layered(maps, get_activation("lipswish"), 0.8, **options, rngs=rngs)


def cnn(rngs, size, channels, condition_shape=None):
    maps = [ConvMap(size, channels, 3), ConvMap(size, 3, channels)]
    options = {"preactivation": True, "condition_shape": condition_shape}
    return Layered(maps, get_activation("elu"), 0.8, **options, rngs=rngs)


class Rotation(nnx.Module):
    """A contraction of the user's, of norm 0.5 whatever the condition."""

    def __init__(self, rngs):
        self.angle = nnx.Param(jax.random.normal(rngs.params(), ()))

    def __call__(self, x, condition):
        turned = jnp.roll(x, 1, axis=-1)
        angle = self.angle[...] + condition.sum(-1, keepdims=True)
        return 0.5 * jnp.sin(jnp.cos(angle) * x + jnp.sin(angle) * turned) / np.sqrt(2)


class Shift(rf.Bijector):
    """The layer of the docstring of `Bijector`."""

    def __init__(self, dim):
        self.event_shape = (dim,)
        self.shift = nnx.Param(jnp.zeros(dim))

    def transform(self, x, condition=None):
        return x + self.shift[...][None], jnp.zeros(x.shape[0], x.dtype)

    def invert(self, y, condition=None):
        return y - self.shift[...][None]


def multi_scale(rngs, condition_shape=None):
    first = rf.Chain([rf.Logit(0.05), rf.Squeeze(IMAGE)])
    second = [rf.ActNorm((2,)), rf.ResidualBlock(cnn(rngs, (2, 2), 2, condition_shape)), rf.Squeeze((2, 2, 2))]
    return rf.MultiScale([first, rf.Chain(second), rf.ResidualBlock(cnn(rngs, (1, 1), 4))], IMAGE)


def inverted(rngs, condition_shape=None):
    inside = rf.Chain([rf.InvertibleLinear(4, rngs=rngs), rf.ResidualBlock(mlp(rngs, 4, condition_shape)), Shift(4)])
    return rf.Chain([rf.ResidualBlock(mlp(rngs)), rf.Invert(inside, SOLVER)])


def stack(rngs, condition_shape=None):
    def step(rngs):
        return rf.Chain(
            [rf.ResidualBlock(mlp(rngs, 4, condition_shape)), rf.Invert(rf.ResidualBlock(mlp(rngs)), SOLVER)]
        )

    return rf.ResidualStack(step, 2, rngs=rngs)


def monotone(rngs, condition_shape=None):
    return rf.MonotoneBlock(mlp(rngs, 4, condition_shape), solver=SOLVER)


def implicit(rngs, condition_shape=None):
    return rf.ImplicitBlock(mlp(rngs), mlp(rngs, 4, condition_shape), solver=SOLVER)


def monotone_parts(rngs):
    """A stack of monotone blocks, and the inverse of one."""
    step = lambda rngs: rf.Chain([monotone(rngs), rf.ActNorm((4,))])  # noqa: E731
    return rf.Chain([rf.ResidualStack(step, 2, rngs=rngs), rf.Invert(monotone(rngs), SOLVER)])


def monotone_scales(rngs):
    block = rf.MonotoneBlock(cnn(rngs, (4, 4), 1), solver=SOLVER)
    return rf.MultiScale([rf.Chain([rf.Logit(0.05), block, rf.Squeeze(IMAGE)]), rf.ActNorm((2,))], IMAGE)


# name: (bijector from rngs, shape of one event, of one condition). Scales and stacks of residual blocks without a
# condition are in `tests.models.test_flow` and `tests.layers.test_layers`, residual blocks alone in `test_networks`.
BIJECTORS = {
    "chain": (lambda rngs: rf.Chain([rf.ActNorm((4,)), rf.ResidualBlock(mlp(rngs)), Shift(4)]), (4,), None),
    "inverse of a chain, conditional": (lambda rngs: inverted(rngs, (2,)), (4,), (2,)),
    "multi-scale, conditional": (lambda rngs: multi_scale(rngs, (2, 1)), IMAGE, (2, 1)),
    "stack, conditional": (lambda rngs: stack(rngs, (3,)), (4,), (3,)),
    "monotone parts": (monotone_parts, (4,), None),
    "monotone, multi-scale": (monotone_scales, IMAGE, None),
    "monotone block, conditional": (lambda rngs: monotone(rngs, (2,)), (4,), (2,)),
    "implicit block, conditional": (lambda rngs: implicit(rngs, (2,)), (4,), (2,)),
    "monotone module of the user's": (
        lambda rngs: rf.MonotoneBlock(Rotation(rngs), lipschitz=0.8, solver=SOLVER),
        (4,),
        (2,),
    ),
    "module of the user's": (lambda rngs: rf.ResidualBlock(Rotation(rngs), lipschitz=0.8), (4,), (2,)),
}


@pytest.fixture(scope="module", params=BIJECTORS)
def case(request):
    """A bijector away from its start, x [3, ...] and c [3, ...] or None."""
    make, shape, condition_shape = BIJECTORS[request.param]
    rng = np.random.default_rng(1)
    with deferred_norms():  # of other kernels
        bijector = make(nnx.Rngs(0))
    x = jnp.asarray(rng.uniform(size=(3, *shape)))
    condition = None if condition_shape is None else jnp.asarray(rng.normal(size=(3, *condition_shape)))
    add_noise(bijector, 0.3)
    rf.Flow(bijector, event_shape=shape).converge_norms()
    return bijector, x, condition


@pytest.fixture(scope="module")
def jacobians(case):
    """The Jacobians of f at the examples, one by one, [B, D, D]; and f by the same program."""
    bijector, x, condition = case
    graphdef, state = nnx.split(bijector)

    def of_one(state, x, c):
        y = nnx.merge(graphdef, state)(x[None], None if c is None else c[None])[0]
        return y.ravel(), y

    @jax.jit
    def of_all(state, x, c):
        return jax.vmap(jax.jacfwd(of_one, argnums=1, has_aux=True), in_axes=(None, 0, 0))(state, x, c)

    jacobians, y = of_all(state, x, condition)
    return jacobians.reshape(len(x), x[0].size, x[0].size), y


def test_log_det_and_inverse(case, jacobians):
    """log_det is that of the dense Jacobian; the inverse undoes f; shapes are those that were announced."""
    bijector, x, condition = case
    graphdef, state = nnx.split(bijector)

    @jax.jit
    def there_and_back(state, x, c):
        bijector = nnx.merge(graphdef, state)
        y, log_det = bijector.forward(x, condition=c, estimator=rf.Exact())
        return y, log_det, *bijector.inverse(y, condition=c, solver=SOLVER, return_status=True)

    y, log_det, back, status = there_and_back(state, x, condition)
    np.testing.assert_allclose(jacobians[1], y, rtol=1e-10, atol=1e-12)
    assert y.shape[1:] == bijector.output_shape(x.shape[1:]) and bijector.input_shape(y.shape[1:]) == x.shape[1:]
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians[0])[1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(back, x, atol=1e-9)
    assert status.converged.shape == (bijector.blocks, 3) and status.converged.all()


def test_log_det_on_the_way_back(case):
    """`Invert` gives x and minus the log-det of f there, with the noise of `estimate`, by `solve_and_estimate`."""
    bijector, x, condition = case
    options = {"key": jax.random.key(5), "estimator": rf.Truncated(2), "return_diagnostics": True}
    graphdef, state = nnx.split(bijector)

    @jax.jit
    def run(state, x, c):
        bijector = nnx.merge(graphdef, state)
        inverse = rf.Invert(bijector, SOLVER)
        there = bijector.forward(x, condition=c, **options)
        back = inverse.forward(there[0], condition=c, **options)
        return there, back, inverse.inverse(back[0], condition=c)

    (y, log_det, there), (back, log_det_back, again), forth = run(state, x, condition)
    np.testing.assert_allclose(back, x, atol=1e-9)
    np.testing.assert_allclose(log_det_back, -log_det, atol=1e-7)
    np.testing.assert_allclose(again.mean, there.mean, atol=1e-7)
    np.testing.assert_allclose(forth, y, atol=1e-8)


def test_certified_bounds(case, jacobians):
    """No singular value of a Jacobian is beyond the bounds, which hold for every condition."""
    bijector, _, _ = case
    blocks = []
    lipschitz, inverse = bijector.certified_bounds(blocks)
    assert len(blocks) == bijector.blocks and all(block.bound < 1 for block in blocks)
    values = np.linalg.svd(jacobians[0], compute_uv=False)
    assert values.max() <= lipschitz * (1 + 1e-9) and (1 / values).max() <= inverse * (1 + 1e-9)
    bounds = rf.Invert(bijector).lipschitz_bounds()
    assert bounds == (inverse, lipschitz)


# The parts of the others are in these: a scanned stack and scales of residual blocks, monotone ones, modules.
@pytest.mark.parametrize(
    "case", [name for name in BIJECTORS if name != "monotone, multi-scale"], indirect=True, scope="module"
)
def test_gradients(case):
    """Gradients of log-det and y with `Exact` in parameters, x and c, against finite differences along a direction."""
    bijector, x, condition = case
    graphdef, params, rest = nnx.split(bijector, nnx.Param, ...)

    def value(params, x, condition):
        bijector = nnx.merge(graphdef, params, rest)
        y, log_det = bijector.forward(x, condition=condition, estimator=rf.Exact())
        return jnp.sum(jnp.cos(y)) + jnp.sum(jnp.arange(1.0, 4.0) * log_det)

    inputs = params, x, condition
    rng = np.random.default_rng(7)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), inputs)
    value_and_gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1) if condition is None else (0, 1, 2)))
    gradient = value_and_gradient(*inputs)[1]
    for n, (part, along) in enumerate(zip(gradient, direction, strict=False)):
        moved = [
            value_and_gradient(
                *(jax.tree.map(lambda p, d, s=s: p + s * d, a, b) if m == n else a for m, (a, b) in pairs)
            )[0]
            for s in (1e-5, -1e-5)
            for pairs in [list(enumerate(zip(inputs, direction, strict=True)))]
        ]
        product = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(part), jax.tree.leaves(along), strict=True))
        np.testing.assert_allclose(product, (moved[0] - moved[1]) / 2e-5, rtol=1e-4, atol=1e-6)


def test_conditions_matter_and_are_checked(case):
    """Another condition gives another map; one for all is broadcast; what is missing or unexpected raises."""
    bijector, x, condition = case
    if condition is None:
        with pytest.raises(
            ValueError, match=r"condition: expected None, since no part takes a condition, got shape \(3, 2\)"
        ):
            bijector.forward(x, condition=jnp.ones((3, 2)), estimator=rf.Exact())
        return
    with pytest.raises(ValueError, match=r"condition: expected floats \[3, .*one for each example.*, got None"):
        bijector.forward(x, estimator=rf.Exact())
    graphdef, state = nnx.split(bijector)
    options = {"estimator": rf.Truncated(1), "key": jax.random.key(0)}
    call = jax.jit(lambda state, x, c: nnx.merge(graphdef, state).forward(x, condition=c, **options)[0])
    assert np.abs(call(state, x, condition) - call(state, x, condition + 0.5)).min(axis=0).max() > 1e-4
    if bijector.condition_shape is not ...:
        of_all = jnp.broadcast_to(condition[0], condition.shape)
        np.testing.assert_allclose(call(state, x, condition[0]), call(state, x, of_all), rtol=1e-12)
        with pytest.raises(ValueError, match=r"condition: expected floats .*, got shape \(2, 7\)"):
            bijector.forward(x, condition=jnp.ones((2, 7)), estimator=rf.Exact())
    with pytest.raises(ValueError, match=r"condition: expected .*, got dtype int64; for classes use jax.nn.one_hot"):
        bijector.forward(x, condition=jnp.ones(3, int), estimator=rf.Exact())


def test_a_condition_takes_the_dtype_of_x():
    """A residual block and an affine layer in float32 take float64, under strict promotion too."""
    g = rf.LipschitzMLP(4, (5,), condition_dim=2, rngs=nnx.Rngs(0))
    for layer in (rf.ResidualBlock(g), rf.Affine((4,), condition_dim=2, rngs=nnx.Rngs(0))):
        layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layer)
        x, c = jnp.ones((3, 4), jnp.float32), jnp.linspace(0.0, 1.0, 6).reshape(3, 2)
        assert c.dtype == jnp.float64
        y, log_det = layer.forward(x, condition=c, estimator=rf.Exact())
        assert y.dtype == log_det.dtype == layer.inverse(y, condition=c).dtype == jnp.float32
        np.testing.assert_array_equal(y, layer.forward(x, condition=c.astype("float32"), estimator=rf.Exact())[0])


def test_conditional_roulette_is_unbiased():
    """Over many keys the mean of log-det and of its gradient in c is that of the exact ones."""
    bijector = rf.ResidualBlock(mlp(nnx.Rngs(0), 3, (2,)))
    x, c = jax.random.normal(jax.random.key(1), (2, 3)), jax.random.normal(jax.random.key(2), (2, 2))
    graphdef, state = nnx.split(bijector)

    def value(c, key, estimator):
        log_det = nnx.merge(graphdef, state).forward(x, condition=c, key=key, estimator=estimator)[1]
        return jnp.sum(jnp.asarray([1.0, 2.0]) * log_det)

    both = jax.value_and_grad(value)
    exact = jax.jit(lambda c: both(c, None, rf.Exact()))(c)
    draws = jax.jit(jax.vmap(lambda key: both(c, key, rf.Roulette())))(jax.random.split(jax.random.key(3), 4000))
    for found, expected in zip(draws, exact, strict=True):
        assert np.abs(z_scores(found, expected)).max() < 5


def test_what_does_not_chain():
    """The error names both layers and both shapes."""
    rngs = nnx.Rngs(0)
    with pytest.raises(
        ValueError,
        match=r"bijectors\[1\] \(ResidualBlock\): expected events of shape \(3,\), got \(4,\), "
        r"which bijectors\[0\] \(ResidualBlock\) puts out",
    ):
        rf.Chain([rf.ResidualBlock(mlp(rngs)), rf.ResidualBlock(mlp(rngs, 3))])
    with pytest.raises(
        ValueError, match=r"bijectors\[0\] \(ActNorm\): expected events whose shape ends in \(5,\), got \(4,\)"
    ):
        rf.Chain([rf.ActNorm((5,)), rf.ResidualBlock(mlp(rngs))])
    with pytest.raises(
        ValueError,
        match=r"condition: expected one shape for all layers, got \(2,\) in bijectors\[0\] "
        r"\(ResidualBlock\) and \(3,\) in bijectors\[1\]",
    ):
        rf.Chain([rf.ResidualBlock(mlp(rngs, 4, (2,))), rf.ResidualBlock(mlp(rngs, 4, (3,)))])
    with pytest.raises(ValueError, match=r"bijectors\[0\]: expected Bijector, got Layered"):
        rf.Chain([mlp(rngs)])
    with pytest.raises(
        ValueError, match=r"scales\[0\]: expected an even number of channels to halve, got events \(4, 4, 1\)"
    ):
        rf.MultiScale([rf.Logit(0.1), rf.Chain([])], IMAGE)
    with pytest.raises(ValueError, match="scales: expected at least one bijector, got none"):
        rf.MultiScale([], IMAGE)
    with pytest.raises(ValueError, match="bijector: expected one without padding"):
        rf.Invert(rf.ChannelPadding(1))
    with pytest.raises(ValueError, match=r"solver: expected Anderson\(\)"):
        rf.Invert(rf.Chain([]), solver="newton")


def test_what_is_no_contraction():
    """A module needs a word on its constant; a contraction takes none."""
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"lipschitz: expected a bound .* of Rotation.*got None"):
        rf.ResidualBlock(Rotation(rngs))
    with pytest.raises(ValueError, match=r"lipschitz: expected a number in \(0, 1\), got 1.5"):
        rf.ResidualBlock(Rotation(rngs), lipschitz=1.5)
    with pytest.raises(ValueError, match=r"lipschitz: expected None together with a Contraction"):
        rf.ResidualBlock(mlp(rngs), lipschitz=0.5)
    with pytest.raises(ValueError, match=r"contraction: expected a Contraction or a callable nnx.Module, got ufunc"):
        rf.ResidualBlock(np.sin, lipschitz=0.5)
    with pytest.raises(ValueError, match="expected layers that keep the shape"):
        rf.ResidualStack(lambda rngs: rf.Flatten((2, 2)), 2, rngs=rngs)


def test_a_solve_that_fails_is_nan():
    """An inverted block on a wrong word gives NaN, not a wrong value; `on_failure="warn"` gives the best guess."""

    class Expanding(nnx.Module):
        def __call__(self, x):
            return -3 * x

    block = rf.ResidualBlock(Expanding(), lipschitz=0.9, event_shape=(2,))
    x = jnp.ones((2, 2))
    solver = rf.FixedPoint(max_iterations=5, on_failure="raise")
    assert jnp.isnan(jax.jit(rf.Invert(block, solver).__call__)(x)).all()
    with pytest.raises(rf.InverseError):
        rf.Invert(block, solver)(x)
    solver = rf.FixedPoint(max_iterations=5, on_failure="warn")
    assert jnp.isfinite(jax.jit(rf.Invert(block, solver).__call__)(x)).all()


def test_an_explicit_inverse_reports_what_is_not_finite():
    """The inverse of an inverted block needs no solve; its status fails for an example with NaN, and only there."""
    layer = rf.Invert(rf.ResidualBlock(rf.LipschitzMLP(2, (4,), rngs=nnx.Rngs(0))))
    y = jnp.asarray([[jnp.nan, 1.0], [0.5, 1.0], [jnp.inf, 0.0]])
    x, status = layer.inverse(y, return_status=True)
    assert status.converged.tolist() == [[False, True, False]]
    assert np.isfinite(x[1]).all() and status.residual.tolist() == [[np.inf, 0, np.inf]]


def test_fitted_lengths_without_blocks():
    """Layers in closed form ignore every estimator, one with a table too, alone and in a stack."""
    estimator = rf.Roulette(rf.Fitted(jnp.asarray([0.5, 0.1])))
    stack = rf.ResidualStack(lambda rngs: rf.Affine((2,)), 2, rngs=nnx.Rngs(0))
    for layer in (rf.ActNorm((2,)), rf.Chain([rf.ActNorm((2,)), stack])):
        x = jnp.ones((3, 2))
        np.testing.assert_array_equal(layer.forward(x, estimator=estimator)[1], layer.forward(x)[1])
