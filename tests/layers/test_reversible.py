"""Flows that recompute the inputs of stacked blocks: values and gradients against those of flows that keep them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import resflow_jax as rf
from resflow_jax.layers.residual import ResidualStack

KEY, ROULETTE = jax.random.key(7), rf.Roulette()
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
CONDITION = jnp.cos(3 * X)


@pytest.fixture(scope="module")
def pair():
    """A conditional flow with a stack of blocks, and the same one reversible, each as (graphdef, state)."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(2, 4, (6,), condition_dim=2), rngs=nnx.Rngs(0))
    kept = nnx.split(flow)
    rf.make_reversible(flow, rf.Anderson(tolerance=1e-13))
    return [(graphdef, jax.tree.map(as_float64, state)) for graphdef, state in (kept, nnx.split(flow))]


def as_float64(leaf):
    return leaf.astype("float64") if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def log_p(graphdef, state, x, condition, key=KEY, estimator=ROULETTE):
    return nnx.merge(graphdef, state).log_prob(x, condition=condition, key=key, estimator=estimator)


def gradients(graphdef, state, estimator=ROULETTE, x=X):
    """Value and gradients of a nonlinear function of log p, in all arrays."""

    def loss(state, x, condition):
        return jnp.sum(jnp.sin(log_p(graphdef, state, x, condition, estimator=estimator)))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), allow_int=True))(state, x, CONDITION)


def check(found, expected, tolerance=1e-9):
    floats = ([leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0] for tree in (found, expected))
    for a, b in zip(*floats, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("estimator", [rf.Roulette(), rf.Exact()], ids=["roulette", "exact"])
def test_gradients(pair, estimator):
    """The same draws give the same value and, up to the inverse's error, the same gradients."""
    kept, reversible = (gradients(*split, estimator) for split in pair)
    assert reversible[0] == kept[0]
    check(reversible, kept)


@pytest.mark.parametrize("block", ["monotone", "implicit"])
def test_other_blocks(block):
    """Stacks whose forward map is a solve: gradients in x and in all parameters."""
    config = rf.VectorFlowConfig(2, 3, (4,), block=block)
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))

    def gradient():
        graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
        loss = lambda params, x: jnp.sum(jnp.sin(nnx.merge(graphdef, params, rest).log_prob(x, key=KEY)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(jax.tree.map(as_float64, params), X)

    kept = gradient()
    rf.make_reversible(flow, rf.Anderson(tolerance=1e-13))
    check(gradient(), kept)


CLASSIFIER = rf.ClassifierConfig((4, 4, 1), 3, blocks=(3,), hidden_channels=(4,), padding=1)


def test_dropout():
    """The inverse does not know what was dropped: passes with dropout keep the inputs of blocks."""
    network = rf.ResNetClassifier(CLASSIFIER, rngs=nnx.Rngs(0))
    x = jax.random.uniform(KEY, (2, 4, 4, 1))

    def gradient():
        graphdef, state = nnx.split(network)
        logits = lambda x: nnx.merge(graphdef, state).logits(x, key=KEY, dropout=0.5)  # noqa: E731
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(logits(x)))))(x)

    expected = gradient()
    rf.make_reversible(network)
    np.testing.assert_allclose(gradient(), expected, rtol=1e-10)


def test_layers_without_an_inverse():
    """Blocks without a bound are refused, and nothing is changed."""
    network = rf.ResNetClassifier(replace(CLASSIFIER, coefficient=None), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="flow: expected layers with an inverse in every ResidualStack, got Unconstr"):
        rf.make_reversible(network)
    assert all(m.reversible is None for _, m in nnx.iter_modules(network) if isinstance(m, ResidualStack))


def test_forward_over_reverse(pair):
    """The jvp of the gradient in x, which goes through the rules of the estimate."""

    def product(graphdef, state):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(log_p(graphdef, state, x, CONDITION))))
        return jax.jit(partial(jax.jvp, gradient))((X,), (jnp.cos(X),))

    kept, reversible = (product(*split) for split in pair)
    check(reversible, kept)


def test_vmap_over_keys(pair):
    """log_det is mapped where x is not: the gradient is the sum over the lanes."""
    keys = jax.random.split(KEY, 3)

    def total(graphdef, state, x):
        lanes = jax.vmap(lambda key: log_p(graphdef, state, x, CONDITION, key))(keys)
        return jnp.sum(jnp.sin(lanes))

    kept, reversible = (jax.jit(jax.grad(partial(total, *split)))(X) for split in pair)
    check(reversible, kept)


def test_shard_map(pair):
    """Devices that share a batch get the gradient of one device."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    graphdef, state = pair[1]

    def loss(state, x, condition):
        return jax.lax.psum(jnp.sum(log_p(graphdef, state, x, condition)), "data")

    of_parts = jax.shard_map(
        jax.grad(loss, allow_int=True),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    found = jax.jit(of_parts)(state, X, CONDITION)
    expected = jax.jit(jax.grad(lambda *args: jnp.sum(log_p(graphdef, *args)), allow_int=True))(state, X, CONDITION)
    check(found, expected)


class Half(rf.Contraction):
    lipschitz = 0.5
    event_shape = (3,)

    def __call__(self, x, condition=None):
        return 0.5 * jnp.sin(x)


def test_layers_without_arrays():
    """There is nothing to scan over but the number of the layers."""
    stack = rf.ResidualStack(lambda rngs: rf.ResidualBlock(Half()), 3, rngs=nnx.Rngs(0))

    def total(x):
        y, log_det = stack.forward(x, estimator=rf.Exact())
        return jnp.sum(jnp.sin(y)) + jnp.sum(log_det)

    x = jax.random.normal(KEY, (2, 3))
    kept = jax.value_and_grad(total)(x)
    rf.make_reversible(stack, rf.Anderson(tolerance=1e-13))
    for found, expected in zip(jax.value_and_grad(total)(x), kept, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_classes_and_logits(pair):
    """The map without a log-det is reversible too."""
    kept, reversible = (
        jax.jit(jax.grad(lambda x, split=split: jnp.sum(jnp.sin(nnx.merge(*split)(x, CONDITION)))))(X) for split in pair
    )
    check(reversible, kept)


def test_an_inverse_that_does_not_converge_gives_no_gradient(pair):
    """A solver that stops after one evaluation: NaN in the place of a wrong gradient."""
    flow = nnx.merge(*pair[0])
    rf.make_reversible(flow, rf.FixedPoint(tolerance=1e-13, max_iterations=1))
    value, (_, x_bar, _) = gradients(*nnx.split(flow))
    assert np.isfinite(value) and np.isnan(x_bar).all()


def test_relu_has_no_gradient_either():
    """Its rule gives zero at NaN. The gradients in x, in all parameters and in conditions are NaN for all that."""
    g = partial(rf.LipschitzMLP, 2, (3,), activation="relu", condition_dim=2)
    stack = rf.ResidualStack(lambda rngs: rf.ResidualBlock(g(rngs=rngs)), 2, rngs=nnx.Rngs(0))
    rf.make_reversible(stack, rf.FixedPoint(tolerance=1e-13, max_iterations=1))
    graphdef, params, rest = nnx.split(stack, nnx.Param, ...)

    def loss(params, x, condition):
        return jnp.sum(nnx.merge(graphdef, params, rest)(x, condition))

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(params, X, CONDITION)
    assert len(jax.tree.leaves(found)) > 4 and all(np.isnan(leaf).all() for leaf in jax.tree.leaves(found))


def test_images_and_every_scale():
    """All stacks of a multi-scale flow become reversible; values and diagnostics are unchanged."""
    config = rf.ImageFlowConfig((4, 4, 1), blocks=(3, 2), hidden_channels=4, tail=rf.DenseTail(2, hidden=4))
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    x = jnp.full((2, 4, 4, 1), 0.3, jnp.float32)
    options = {"key": KEY, "estimator": rf.Truncated(2), "return_diagnostics": True}
    kept = flow.log_prob(x, **options)
    rf.make_reversible(flow)
    stacks = [module for _, module in nnx.iter_modules(flow) if isinstance(module, ResidualStack)]
    assert len(stacks) == 3 and all(stack.reversible == rf.Anderson() for stack in stacks)
    jax.tree.map(np.testing.assert_array_equal, flow.log_prob(x, **options), kept)


def test_memory_does_not_grow_with_depth():
    """The temporary memory of a gradient grows with the depth of a flow that keeps inputs, and with no other's."""

    def temporary(depth, reversible):
        flow = rf.ResidualFlow(rf.VectorFlowConfig(2, depth, (4,)), rngs=nnx.Rngs(0))
        if reversible:
            rf.make_reversible(flow)
        graphdef, state = nnx.split(flow)
        gradient = jax.grad(lambda x: jnp.sum(log_p(graphdef, state, x, None)))
        compiled = jax.jit(gradient).lower(jnp.ones((5000, 2), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kept, reversible = (temporary(9, which) - temporary(3, which) for which in (False, True))
    assert reversible < 50_000 < 6 * 5000 * 2 * 4 < kept


@pytest.mark.parametrize(
    ("flow", "solver", "message"),
    [
        (rf.ActNorm((2,)), None, "flow: expected layers in a ResidualStack, got none in ActNorm"),
        (3, None, "flow: expected Module, got int"),
    ],
)
def test_bad_arguments(flow, solver, message):
    """The error names the argument."""
    with pytest.raises(ValueError, match=message):
        rf.make_reversible(flow, solver)
