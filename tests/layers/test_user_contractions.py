"""Contractions of a user's own: how they may be called, what they may not do, and what their certificate may claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

X = jax.random.normal(jax.random.key(0), (4, 2))


class Half(rf.Contraction):
    lipschitz = 0.5

    def __call__(self, x):
        return 0.5 * jnp.sin(x)


def test_a_contraction_without_condition_takes_x_alone():
    block = rf.ResidualBlock(Half())
    expected = X + 0.5 * jnp.sin(X)
    np.testing.assert_allclose(block(X), expected, rtol=1e-12)
    np.testing.assert_allclose(block.initialize(X), expected, rtol=1e-12)
    y, log_det = block.forward(X, estimator=rf.Exact())
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(log_det, jnp.log1p(0.5 * jnp.cos(X)).sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("lipschitz", [1.5, 1.0, 0.0, None])
def test_the_constant_of_a_contraction_is_checked(lipschitz):
    g = Half()
    g.lipschitz = lipschitz
    with pytest.raises(ValueError, match=rf"Half.lipschitz: expected a number in \(0, 1\), got {lipschitz}"):
        rf.ResidualBlock(g)


def test_a_call_that_the_log_det_would_not_see_is_refused():
    with pytest.raises(TypeError, match="Shrunk: expected a method apply"):

        class Shrunk(rf.LipschitzMLP):
            def __call__(self, x, condition=None):
                return 0.5 * super().__call__(x, condition)


class Twice(rf.LipschitzMLP):
    def apply(self, weights, x, features=None):
        return 2 * super().apply(weights, x, features)


class LargerWeights(rf.LipschitzMLP):
    def weights(self):
        scales, layers, activations = super().weights()
        return scales, [(3 * kernel, bias) for kernel, bias in layers], activations


class LargerGates(rf.LipschitzMLP):
    def condition_features(self, condition):
        return [(3 * gate, shift) for gate, shift in super().condition_features(condition)]


@pytest.mark.parametrize("kind", [Twice, LargerWeights, LargerGates], ids=lambda kind: kind.__name__)
def test_a_map_of_another_kind_does_not_inherit_a_proof(kind):
    g = kind(2, (4,), coefficient=0.6, rngs=nnx.Rngs(0))
    certificate = rf.certify(rf.Flow(rf.ResidualBlock(g)))
    assert certificate.unproved == (0,)
    assert not certificate.is_certified


class Narrow(nnx.Module):
    def __call__(self, x):
        return 0.1 * x[:, :1]


@pytest.mark.parametrize("method", ["__call__", "initialize", "inverse"])
def test_a_module_that_changes_the_shape_is_refused_by_every_method(method):
    """x + g(x) would broadcast."""
    block = rf.ResidualBlock(Narrow(), lipschitz=0.5)
    with pytest.raises(ValueError, match=r"g: expected an output float64 \(4, 2\) like [xy], got float64 \(4, 1\)"):
        getattr(block, method)(X)


class Stateful(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return 0.2 * jnp.tanh(self.layer(x))


class Centered(nnx.Module):
    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.use_running_average = False

    def __call__(self, x):
        if not self.use_running_average:
            self.mean[...] = x.mean(axis=0)
        return x - self.mean[...][None]


STATEFUL = {
    "batch statistics": lambda rngs: Centered(),
    "random streams": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_module_that_changes_its_state_is_refused(name):
    """What it returns depends on the batch, or on how often it was called; after eval() it is a function of x."""
    module = Stateful(STATEFUL[name](nnx.Rngs(0)))
    block = rf.ResidualBlock(module, lipschitz=0.9)
    for use in (block, block.inverse, lambda x: block.forward(x, estimator=rf.Exact())):
        with pytest.raises(
            ValueError, match=r"g: expected a call of Stateful not to change its state.* call module.eval"
        ):
            use(X)
    module.eval()
    np.testing.assert_array_equal(block.forward(X, estimator=rf.Exact())[0], block(X))


class Transformed(nnx.Module):
    """Flax writes all variables back after a transformation."""

    def __init__(self, transform):
        rngs = nnx.Rngs(0)
        self.layer, self.dropout = rf.LipschitzDense(2, 2, 0.8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.transform = transform

    def __call__(self, x):
        return self.transform(lambda module, x: module.dropout(jnp.tanh(module.layer(x))))(self, x)


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_a_module_may_use_transformations_of_flax(transform):
    module = Transformed(transform)
    module.eval()
    block = rf.ResidualBlock(module, lipschitz=0.8)
    y, log_det = block.forward(X, estimator=rf.Exact())
    np.testing.assert_allclose(y, X + jnp.tanh(module.layer(X)), rtol=1e-9)
    jacobians = jax.vmap(jax.jacobian(lambda x: x + jnp.tanh(module.layer(x))))(X)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobians)[1], rtol=1e-9)


def test_shapes_of_a_module_are_checked():
    assert rf.ResidualBlock(Narrow(), lipschitz=0.5, event_shape=[2]).event_shape == (2,)
    for name in ("event_shape", "condition_shape"):
        with pytest.raises(ValueError, match=f"{name}: expected a tuple of sizes"):
            rf.ResidualBlock(Narrow(), lipschitz=0.5, **{name: 2})


class OfFirst(rf.Contraction):
    """Every output point is the first point: the norm is 1 in order infinity, and sqrt(points) in order 2."""

    lipschitz = 0.9
    event_shape = (5, 2)

    def __init__(self, rngs):
        layer = rf.LipschitzDense(2, 2, 0.9, domain=np.inf, codomain=np.inf, rngs=rngs)
        layer.kernel[...] = jnp.asarray([[-0.9, -0.9], [0.0, 0.0]])
        layer.bias[...] = jnp.zeros(2)
        self.linears = nnx.List([layer])

    def __call__(self, x):
        return jnp.broadcast_to(self.linears[0](x[:, :1]), x.shape)

    def bound(self, norms, orders):
        return norms[0] * 5 ** (1 / orders[0])


def test_bounds_of_whole_events_count_all_of_their_elements():
    """Not those of the rows alone to which a dense layer is applied."""
    block = rf.ResidualBlock(OfFirst(nnx.Rngs(0)))
    jacobian = jax.jacobian(lambda x: block(x[None])[0].ravel())(jnp.zeros((5, 2))).reshape(10, 10)
    singular_values = np.linalg.svd(jacobian, compute_uv=False)
    lipschitz, inverse = block.lipschitz_bounds()
    assert singular_values[0] <= lipschitz < np.inf
    assert 1 / singular_values[-1] <= inverse < np.inf
    block.contraction.event_shape = None  # unknown, so there is no bound in the 2-norm
    assert block.lipschitz_bounds()[1] == np.inf


class Gathered(rf.Contraction):
    """Rows of one element, rotated between two layers: orders 3 -> 2 and 2 -> 3 of a row are not those of 8 rows."""

    lipschitz = 0.81
    event_shape = (8, 1)

    def __init__(self, rngs):
        layers = [rf.LipschitzDense(1, 1, 0.9, domain=p, codomain=q, rngs=rngs) for p, q in ((3.0, 2.0), (2.0, 3.0))]
        for layer in layers:
            layer.kernel[...] = jnp.ones((1, 1))
            layer.bias[...] = jnp.zeros(1)
            layer.update_norm()
        self.linears = nnx.List(layers)

    def __call__(self, x):
        first = jnp.full((8, 1), 8**-0.5) - jnp.eye(8)[:, :1]
        mirror = jnp.eye(8) - 2 * first @ first.T / jnp.sum(first**2)
        return self.linears[1](mirror @ self.linears[0](x))

    def bound(self, norms, orders):
        return norms[0] * norms[1]


def test_falling_orders_of_rows_prove_nothing_of_events():
    g = Gathered(nnx.Rngs(0))
    ones = jnp.ones((1, 8, 1))
    in_three_norm = jnp.linalg.norm(g(ones).ravel(), 3) / jnp.linalg.norm(ones.ravel(), 3)
    assert in_three_norm > 1
    blocks = []
    rf.ResidualBlock(g).certified_bounds(blocks)
    assert blocks[0].order == 2
    np.testing.assert_allclose(blocks[0].bound, 0.81, rtol=1e-6)


def test_stacks_of_stacks():
    """Their norms are found, certified and tightened; they are the chain of their layers."""

    def step(rngs):
        return rf.Chain([rf.ResidualBlock(rf.LipschitzMLP(2, (4,), rngs=rngs)), rf.ActNorm((2,))])

    stack = rf.ResidualStack(lambda rngs: rf.ResidualStack(step, 2, rngs=rngs), 3, rngs=nnx.Rngs(0))
    for _, layer in nnx.iter_modules(stack):
        if hasattr(layer, "kernel"):
            layer.kernel[...] *= 5
    flow = rf.Flow(stack)
    flow.converge_norms()
    flow.tighten()
    certificate = rf.certify(flow)
    assert len(certificate.bounds) == flow.blocks == 6
    np.testing.assert_allclose(certificate.norms, 0.98, rtol=1e-3)
    assert flow.norm_orders().shape == (12, 2)
    np.testing.assert_allclose(flow.order_loss(), np.mean(certificate.norms), rtol=0.5)
    chain = rf.Chain([layer for inner in stack.unstacked() for layer in inner.unstacked()])
    for mine, ours in zip(stack.forward(X, estimator=rf.Exact()), chain.forward(X, estimator=rf.Exact()), strict=True):
        np.testing.assert_allclose(mine, ours, rtol=1e-9)
    np.testing.assert_allclose(flow.inverse(flow(X)), X, atol=1e-6)


def test_a_flow_without_linear_layers_has_no_norms():
    flow = rf.Flow(rf.ActNorm((2,)), event_shape=(2,))
    assert flow.order_loss() == 0
    assert flow.norm_orders().shape == (0, 2)
    _, status = flow.inverse(X, return_status=True)
    assert rf.certify(flow).error_bounds(status).shape == (0, 4)
