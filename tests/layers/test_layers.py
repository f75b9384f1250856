"""Every layer: its inverse undoes it, its log-det is that of its dense Jacobian, its state is explicit."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.contraction import Layered
from resflow_jax.layers.densenet import DenseNetOfMaps
from resflow_jax.layers.diagonal_affine import Affine
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.lipschitz import LipschitzLinear, NormState, map_linears
from resflow_jax.layers.logit import Logit
from resflow_jax.layers.normalization import MovingBatchNorm, MovingCentering, Normalization
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.layers.shapes import Flatten, Permutation, Reshape, Squeeze
from resflow_jax.layers.spline import Spline
from tests.moving import add_noise

IMAGE = (4, 4, 2)


def residual_block(rngs, *, preactivation=True, dense=False, centering=False):
    maps = [DenseMap(6, 8), DenseMap(8, 6)] if dense else [ConvMap((4, 4), 2, 5), ConvMap((4, 4), 5, 2)]
    options = {"preactivation": preactivation, "centering": centering}
    return ResidualBlock(Layered(maps, get_activation("lipswish"), 0.9, **options, rngs=rngs))


def dense_net_block(rngs):
    maps = DenseMap(6, 4), [DenseMap(4, 2), DenseMap(8, 2)], DenseMap(12, 6)
    return ResidualBlock(DenseNetOfMaps(*maps, get_activation("clipswish"), 0.9, rngs=rngs))


def stack(rngs):
    def step(rngs):
        return Chain([residual_block(rngs), ActNorm((2,)), ActNorm(IMAGE)])

    return ResidualStack(step, 3, rngs=rngs)


def mixed_stack(rngs):
    def step(rngs):
        block = residual_block(rngs, dense=True, centering=True)
        return Chain([InvertibleLinear(6, rngs=rngs), block, MovingBatchNorm((6,)), MovingCentering((6,))])

    return ResidualStack(step, 2, rngs=rngs)


# name: (constructor from rngs, shape of one example)
CLOSED_FORM = {
    "logit": (lambda rngs: Logit(0.05), IMAGE),
    "actnorm per channel": (lambda rngs: ActNorm((2,)), IMAGE),
    "actnorm per feature": (lambda rngs: ActNorm(IMAGE), IMAGE),
    "squeeze": (lambda rngs: Squeeze(IMAGE), IMAGE),
    "flatten": (lambda rngs: Flatten(IMAGE), IMAGE),
    "unflatten": (lambda rngs: Reshape((32,), IMAGE), (32,)),
    "permutation of channels": (lambda rngs: Permutation([1, 0]), IMAGE),
    "permutation of rows": (lambda rngs: Permutation([2, 0, 3, 1], axis=0), IMAGE),
    "affine": (lambda rngs: Affine((3,)), (3,)),
    "spline per channel": (lambda rngs: Spline((2,), 5, 0.7), IMAGE),
    "spline per feature": (lambda rngs: Spline(IMAGE, 3, 0.7), IMAGE),
    "linear on vectors": (lambda rngs: InvertibleLinear(5, rngs=rngs), (5,)),
    "linear on channels": (lambda rngs: InvertibleLinear(2, rngs=rngs), IMAGE),
    "batch norm per channel": (lambda rngs: MovingBatchNorm((2,)), IMAGE),
    "batch norm per feature": (lambda rngs: MovingBatchNorm(IMAGE), IMAGE),
    "centering per channel": (lambda rngs: MovingCentering((2,)), IMAGE),
    "centering per feature": (lambda rngs: MovingCentering(IMAGE), IMAGE),
    "normalization per channel": (lambda rngs: Normalization([0.4, -1.0], [0.3, 2.0]), IMAGE),
    "normalization per feature": (lambda rngs: Normalization([0.4, -1.0, 3.0], [0.3, 2.0, 1.0]), (3,)),
    "chain in closed form": (
        lambda rngs: Chain([Logit(0.05), MovingBatchNorm((2,)), Squeeze(IMAGE), InvertibleLinear(8, rngs=rngs)]),
        IMAGE,
    ),
}
LAYERS = CLOSED_FORM | {
    "convolutional block": (residual_block, IMAGE),
    "block without preactivation": (lambda rngs: residual_block(rngs, preactivation=False), IMAGE),
    "DenseNet block": (dense_net_block, (6,)),
    "stack of a linear layer, a centred block, a batch norm and a centering": (mixed_stack, (6,)),
    "chain": (lambda rngs: Chain([Logit(0.05), ActNorm((2,)), stack(rngs), Squeeze(IMAGE)]), IMAGE),
}


@cache
def moved_layer(name):
    """A layer initialised from a batch x, then with other parameters; and x [3, ...]."""
    make, shape = LAYERS[name]
    layer = make(nnx.Rngs(1))
    x = jax.random.uniform(jax.random.key(2), (3, *shape))
    layer.initialize(x)
    add_noise(layer, 0.1)
    map_linears(layer, lambda linear: linear.update_norm(1e-8, None, 1000))
    return layer, x


def in_float32(leaf):
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf


def dense_jacobians(layer, x):
    """The Jacobians of a layer at the examples of a batch, [B, D, D], and f there."""

    def of_one(e):
        y = layer(e[None])[0]
        return y.ravel(), y

    jacobians, y = jax.vmap(jax.jacfwd(of_one, has_aux=True))(x)
    return jacobians.reshape(len(x), x[0].size, x[0].size), y


@cache
def computed(name):
    """(y, log-det, x again with its status, dense Jacobians, f) of a layer, and its state before and after."""
    layer, x = moved_layer(name)
    graphdef, before = nnx.split(layer)

    @jax.jit
    def run(state, x):
        layer = nnx.merge(graphdef, state)
        y, log_det = layer.forward(x, estimator=rf.Exact())
        back, status = layer.inverse(y, solver=rf.FixedPoint(), return_status=True)
        return (y, log_det, back, status, *dense_jacobians(layer, x)), nnx.state(layer)

    found, after = run(before, x)
    return found, before, after


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_and_log_det(name):
    """f^-1(f(x)) = x, and the log-det equals slogdet of the dense Jacobian, example by example.

    None of it changes the layer.
    """
    layer, x = moved_layer(name)
    (y, log_det, back, status, jacobians, again), before, after = computed(name)
    np.testing.assert_allclose(again, y, rtol=1e-12, atol=1e-12)
    assert status.converged.shape == (layer.blocks, 3) and status.converged.all()
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-10)
    expected = np.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(log_det, expected, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_equal(after, before)


@pytest.mark.parametrize("name", LAYERS)
def test_lipschitz_bounds(name):
    """No Jacobian of f or f^-1 exceeds its bound; an affine layer attains both. Blocks are certified one by one."""
    layer, _ = moved_layer(name)
    blocks = []
    forward, inverse = layer.certified_bounds(blocks)
    assert len(blocks) == layer.blocks
    for singular_values in np.linalg.svd(computed(name)[0][4], compute_uv=False):
        norms = singular_values[0], 1 / singular_values[-1]
        assert norms[0] <= forward * (1 + 1e-12) and norms[1] <= inverse * (1 + 1e-12)
        if name in CLOSED_FORM and not name.startswith(("logit", "spline", "chain")):
            np.testing.assert_allclose(norms, (forward, inverse), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_spline_of_narrow_bins_in_low_precision(dtype):
    """The curve is that of float32, rounded once; results have the dtype of x."""
    layer = Spline((1,), 32, 13.8)
    layer.theta[...] = 5 * jax.random.normal(jax.random.key(0), layer.theta.shape)
    x = jnp.linspace(-14, 14, 501)[:, None].astype(dtype)
    y, log_det = layer.forward(x)
    expected, slopes = layer.forward(x.astype(jnp.float32))
    assert y.dtype == log_det.dtype == dtype
    np.testing.assert_array_equal(y, expected.astype(dtype))
    np.testing.assert_array_equal(log_det, slopes.astype(dtype))


def test_logit_attains_its_lipschitz_bounds():
    """f at the ends of [0, 1], f^-1 in the middle."""
    layer = Logit(0.05)
    slopes = jnp.diag(dense_jacobians(layer, jnp.asarray([[0.0, 0.5, 1.0]]))[0][0])
    forward, inverse = layer.lipschitz_bounds()
    np.testing.assert_allclose(slopes[jnp.asarray([0, 2])], forward, rtol=1e-12)
    np.testing.assert_allclose(1 / slopes[1], inverse, rtol=1e-12)


def test_chain_multiplies_lipschitz_bounds():
    """The bounds of a chain are the products of its layers'; an empty one is the identity."""
    layers = [Logit(0.05), Normalization([0.0], [0.5]), Normalization([0.0], [0.1])]
    chain = Chain(layers)
    products = np.prod([m.lipschitz_bounds() for m in layers], axis=0)
    np.testing.assert_allclose(chain.lipschitz_bounds(), products)
    np.testing.assert_allclose(Chain([chain, Chain([])]).lipschitz_bounds(), products)


def test_scales_beyond_float64_have_infinite_bounds():
    """A layer of a diverging flow has a bound and raises no error."""
    layer = ActNorm((2,))
    layer.log_scale[...] = jnp.asarray([-1e4, 0.0])
    assert layer.lipschitz_bounds() == (1, np.inf)


def test_what_a_layer_does_not_say():
    """Bounds that are unknown are infinite; a map that is not defined is named with its class."""
    assert Bijector().lipschitz_bounds() == (np.inf, np.inf)
    with pytest.raises(NotImplementedError, match=r"Bijector: .* transform\(x, condition\), or __call__ and estimate"):
        Bijector()(jnp.ones((1, 2)))
    with pytest.raises(NotImplementedError, match=r"Bijector: .* invert\(y, condition\), or solve"):
        Bijector().inverse(jnp.ones((1, 2)))


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_creation_under_jit_and_vmap_in_float32(name):
    """Made in one compiled program, three at once, each is a working layer of its own, and keeps float32."""
    make, shape = CLOSED_FORM[name]
    static = {}

    @jax.jit
    def create(key):
        static["graphdef"], state = nnx.split(nnx.vmap(make)(nnx.Rngs(key).split(3)))
        return state

    @jax.jit
    def run(state, x):
        layer = nnx.merge(static["graphdef"], state)
        y, log_det = layer.forward(x, estimator=rf.Exact())
        return y, log_det, layer.inverse(y), layer.initialize(x)

    stacked = create(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, *shape), jnp.float32)
    outputs = []
    for n in range(3):
        y, log_det, back, initialized = run(jax.tree.map(lambda leaf, n=n: in_float32(leaf[n]), stacked), x)
        assert y.dtype == log_det.dtype == back.dtype == initialized.dtype == jnp.float32
        np.testing.assert_allclose(back, x, atol=1e-5)
        outputs.append(y)
    if "linear" in name or name == "chain in closed form":
        assert not np.allclose(outputs[0], outputs[1])


def test_stack_equals_its_blocks_one_by_one():
    """The scan over stacked blocks is the composition of the blocks, in order."""
    layer = stack(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, *IMAGE))
    layer.initialize(x)
    graphdef, stacked = nnx.split(layer.steps)
    expected = x
    for n in range(layer.depth):
        expected = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], stacked))(expected)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12)
    kernels = layer.steps.bijectors[0].contraction.linears[0].kernel[...]
    assert not np.allclose(kernels[0], kernels[1]), "blocks of a stack start from different parameters"


@pytest.mark.parametrize("shape", [(2,), IMAGE])
def test_actnorm_initialisation_normalises(shape):
    """After initialisation every channel (or feature) of the batch has mean zero and unit variance."""
    layer = ActNorm(shape)
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (500, *IMAGE)) * jnp.asarray([[[[1.0, 5.0]]]])
    y = layer.initialize(x)
    axes = tuple(range(4 - len(shape)))
    np.testing.assert_allclose(jnp.mean(y, axes), 0, atol=1e-10)
    np.testing.assert_allclose(jnp.std(y, axes), 1, atol=1e-10)


def test_actnorms_of_a_stack_are_initialised_in_sequence():
    """Each ActNorm of a stack sees what the initialised blocks before it put out."""
    layer = stack(nnx.Rngs(0))
    x = 4 * jax.random.normal(jax.random.key(0), (200, *IMAGE))
    y = layer.initialize(x)
    np.testing.assert_allclose(y, layer(x), atol=1e-10)
    np.testing.assert_allclose(jnp.std(y, 0), 1, atol=1e-8)


def test_squeeze_orders_channels():
    """Output channel c * 4 + dy * 2 + dx holds the pixel (2i + dy, 2j + dx) of channel c."""
    x = jnp.arange(32.0).reshape(1, *IMAGE)
    y = Squeeze(IMAGE)(x)
    assert y.shape == (1, 2, 2, 8)
    for c, dy, dx in np.ndindex(2, 2, 2):
        np.testing.assert_array_equal(y[..., c * 4 + dy * 2 + dx], x[:, dy::2, dx::2, c])


def test_unflatten_is_the_inverse_of_flatten():
    """Both ways, pixel by pixel, to the last bit; what one puts out the other takes."""
    flatten, unflatten = Flatten(IMAGE), Reshape((32,), IMAGE)
    x = jnp.arange(64.0).reshape(2, *IMAGE)
    y = flatten(x)
    assert y.shape == (2, 32)
    np.testing.assert_array_equal(unflatten(y), x)
    np.testing.assert_array_equal(unflatten.forward(y)[0], flatten.inverse(y))
    np.testing.assert_array_equal(unflatten.inverse(x), y)


def test_logit_is_finite_at_the_ends_in_float32():
    """x = 0 and x = 1 give finite values, log-dets and inverses back to the ends."""
    layer = Logit(1e-6)
    x = jnp.asarray([[0.0, 1.0, 0.5]], jnp.float32)
    y, log_det = layer.forward(x, estimator=rf.Exact())
    assert jnp.isfinite(y).all() and jnp.isfinite(log_det).all()
    np.testing.assert_allclose(y[0, 0], -y[0, 1], rtol=1e-6)
    np.testing.assert_allclose(layer.inverse(y), x, atol=1e-6)


def test_norm_state_is_explicit():
    """Applying a layer changes nothing; `update_norm` changes u and v only; they are not parameters."""
    layer = LipschitzLinear(DenseMap(6, 5), 0.5, rngs=nnx.Rngs(0))
    layer.update_norm(1e-10, None, 1000)
    np.testing.assert_allclose(layer.norm(), np.linalg.norm(layer.kernel[...], 2), rtol=1e-9)
    layer.kernel[...] = 3 * layer.kernel[...].at[0].add(1.0)
    v, kernel = layer.v[...], layer.kernel[...]
    layer(jnp.ones((2, 6)))
    np.testing.assert_array_equal(v, layer.v[...])
    layer.update_norm(1e-10, None, 1000)
    assert not np.allclose(v, layer.v[...])
    np.testing.assert_array_equal(kernel, layer.kernel[...])
    np.testing.assert_allclose(layer.norm(), np.linalg.norm(kernel, 2), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(layer.weights()[0], 2), 0.5, rtol=1e-9)
    assert set(nnx.state(layer, nnx.Param)) == {"kernel", "bias"}
    assert set(nnx.state(layer, NormState)) == {"u", "v"}


def test_gradient_flows_through_sigma():
    """The gradient of the normalised kernel is that of W * c / |W|_2, dense, by finite differences."""
    layer = LipschitzLinear(DenseMap(4, 3), 0.1, rngs=nnx.Rngs(0))
    layer.update_norm(1e-14, None, 5000)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    weights = jax.random.normal(jax.random.key(0), (4, 3))

    def loss(params):
        return jnp.sum(weights * nnx.merge(graphdef, params, rest).weights()[0])

    def dense(kernel):
        return np.sum(weights * kernel * 0.1 / np.linalg.norm(kernel, 2))

    gradient = jax.grad(loss)(params)["kernel"][...]
    kernel = np.asarray(layer.kernel[...])
    for index in np.ndindex(kernel.shape):
        step = np.zeros_like(kernel)
        step[index] = 1e-6
        np.testing.assert_allclose(
            gradient[index], (dense(kernel + step) - dense(kernel - step)) / 2e-6, rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("coefficient", [0.0, 1.0, 1.5, None])
def test_linear_rejects_coefficient(coefficient):
    """A coefficient that gives no contraction is named in the error."""
    with pytest.raises(ValueError, match=r"coefficient: expected a number in \(0, 1\)"):
        LipschitzLinear(DenseMap(2, 2), coefficient, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_logit_rejects_alpha(alpha):
    """alpha outside (0, 0.5) is named in the error."""
    with pytest.raises(ValueError, match="alpha: expected a number in"):
        Logit(alpha)


def test_squeeze_rejects_odd_sides():
    """A side that cannot be halved is named in the error."""
    with pytest.raises(ValueError, match=r"shape: expected even height and width.*\(3, 4, 1\)"):
        Squeeze((3, 4, 1))
