"""Every layer: its inverse undoes it, its log-det is that of its dense Jacobian, its state is explicit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.bijector import Chain
from resflow_jax.layers.elementwise import ActNorm, Flatten, Logit, Squeeze
from resflow_jax.layers.lipschitz import LipschitzLinear, NormState, map_linears
from resflow_jax.layers.residual import ResidualBlock, ResidualStack

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE = (4, 4, 2)


def residual_block(rngs, *, activation="lipswish", preactivation=True, dense=False):
    maps = [DenseMap(6, 8), DenseMap(8, 6)] if dense else [ConvMap((4, 4), 2, 5), ConvMap((4, 4), 5, 2)]
    block = ResidualBlock(maps, get_activation(activation), 0.9, preactivation=preactivation, rngs=rngs)
    map_linears(block, lambda layer: layer.update_norm(1e-8, None, 1000))
    return block


def stack(rngs):
    def step(rngs):
        return Chain([residual_block(rngs), ActNorm((2,)), ActNorm(IMAGE)])

    return ResidualStack(step, 3, rngs=rngs)


# name: (constructor from rngs, shape of one example)
LAYERS = {
    "logit": (lambda rngs: Logit(0.05), IMAGE),
    "actnorm per channel": (lambda rngs: ActNorm((2,)), IMAGE),
    "actnorm per feature": (lambda rngs: ActNorm(IMAGE), IMAGE),
    "squeeze": (lambda rngs: Squeeze(IMAGE), IMAGE),
    "flatten": (lambda rngs: Flatten(IMAGE), IMAGE),
    "convolutional block": (residual_block, IMAGE),
    "block without preactivation": (lambda rngs: residual_block(rngs, preactivation=False), IMAGE),
    "dense block": (lambda rngs: residual_block(rngs, dense=True, activation="elu"), (6,)),
    "stack": (stack, IMAGE),
    "chain": (lambda rngs: Chain([Logit(0.05), ActNorm((2,)), stack(rngs), Squeeze(IMAGE)]), IMAGE),
}


@pytest.fixture(params=LAYERS)
def layer_and_x(request):
    make, shape = LAYERS[request.param]
    layer = make(nnx.Rngs(1))
    x = jax.random.uniform(jax.random.key(2), (3, *shape))
    layer.initialize(x)
    # Parameters away from their initial values, so that no term of a log-det hides behind a zero.
    params = nnx.state(layer, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    nnx.update(layer, jax.tree.unflatten(structure, moved))
    map_linears(layer, lambda linear: linear.update_norm(1e-8, None, 1000))
    return layer, x


def test_inverse_and_log_det(layer_and_x):
    """f^-1(f(x)) = x, and the log-det equals slogdet of the dense Jacobian, example by example."""
    layer, x = layer_and_x
    y, log_det, _ = layer.forward(x, None, rf.Exact())
    np.testing.assert_allclose(layer(x), y, rtol=1e-12, atol=1e-12)
    back, status = layer.inverse(y, rf.FixedPoint())
    assert status.converged.shape == (3,) and status.converged.all()
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-10)
    for n in range(len(x)):
        jacobian = jax.jacobian(lambda e: layer(e[None])[0].ravel())(x[n]).reshape(x[n].size, x[n].size)
        np.testing.assert_allclose(log_det[n], np.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10)


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
    kernels = layer.steps.bijectors[0].linears[0].kernel[...]
    assert not np.allclose(kernels[0], kernels[1]), "blocks of a stack start from different parameters"


@pytest.mark.parametrize("shape", [(2,), IMAGE])
def test_actnorm_initialisation_normalises(shape):
    """After initialisation every channel (or feature) of the batch has mean zero and unit variance."""
    layer = ActNorm(shape)
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (500, *IMAGE)) * jnp.asarray([1.0, 5.0])
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


def test_logit_is_finite_at_the_ends_in_float32():
    """x = 0 and x = 1 give finite values, log-dets and inverses back to the ends."""
    layer = Logit(1e-6)
    x = jnp.asarray([[0.0, 1.0, 0.5]], jnp.float32)
    y, log_det, _ = layer.forward(x, None, rf.Exact())
    assert jnp.isfinite(y).all() and jnp.isfinite(log_det).all()
    np.testing.assert_allclose(y[0, 0], -y[0, 1], rtol=1e-6)
    np.testing.assert_allclose(layer.inverse(y, rf.FixedPoint())[0], x, atol=1e-6)


def test_norm_state_is_explicit():
    """Applying a layer changes nothing; `update_norm` changes u and v only; they are not parameters."""
    layer = LipschitzLinear(DenseMap(6, 5), 0.5, rngs=nnx.Rngs(0))
    layer.update_norm(1e-10, None, 1000)
    np.testing.assert_allclose(layer.spectral_norm(), np.linalg.norm(layer.kernel[...], 2), rtol=1e-9)
    layer.kernel[...] = 3 * layer.kernel[...].at[0].add(1.0)
    v, kernel = layer.v[...], layer.kernel[...]
    layer(jnp.ones((2, 6)))
    np.testing.assert_array_equal(v, layer.v[...])
    layer.update_norm(1e-10, None, 1000)
    assert not np.allclose(v, layer.v[...])
    np.testing.assert_array_equal(kernel, layer.kernel[...])
    np.testing.assert_allclose(layer.spectral_norm(), np.linalg.norm(kernel, 2), rtol=1e-9)
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
    with pytest.raises(ValueError, match="logit_alpha: expected a number in"):
        Logit(alpha)


def test_squeeze_rejects_odd_sides():
    """A side that cannot be halved is named in the error."""
    with pytest.raises(ValueError, match=r"shape: expected even height and width.*\(3, 4, 1\)"):
        Squeeze((3, 4, 1))
