"""Norms of layers used alone, and of all layers of a model at once: right from the start, and after any change."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers import norm_updates
from resflow_jax.layers.lipschitz import (
    LipschitzLinear,
    NormSettings,
    NormState,
    advance,
    deferred_norms,
    learned_order,
    map_linears,
)
from resflow_jax.layers.norm_updates import update_norms
from resflow_jax.models import upkeep
from tests.functional.brute_force import brute_force_norm
from tests.functional.contractions import dense_matrix, dense_norm
from tests.layers.blocks import INF

DENSE, CONV = DenseMap(12, 12), ConvMap((4, 3), 3, 4)
ORDERS = [(INF, 1.0), (3.0, 1.5), (INF, 2.0)]


def applied_norm(layer):
    return np.linalg.norm(dense_matrix(layer.linear_map, layer.weights()[0]), 2)


@pytest.mark.parametrize("linear_map", [DENSE, CONV, ConvMap((4, 3), 3, 4, 1)])
def test_a_new_layer_knows_its_norm(linear_map):
    """By itself, without any update; what it applies has at most the coefficient."""
    layer = LipschitzLinear(linear_map, 0.3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.norm(), dense_norm(linear_map, layer.kernel[...]), rtol=1e-6)
    np.testing.assert_allclose(applied_norm(layer), 0.3, rtol=1e-6)


@pytest.mark.parametrize("orders", ORDERS)
def test_a_new_layer_knows_its_norm_in_other_orders(orders):
    """The global maximum, of several starts."""
    layer = LipschitzLinear(DenseMap(3, 4), 0.3, domain=orders[0], codomain=orders[1], rngs=nnx.Rngs(0))
    exact = brute_force_norm(dense_matrix(layer.linear_map, layer.kernel[...]), *orders)
    np.testing.assert_allclose(layer.norm(), exact, rtol=1e-5)


def test_new_layers_of_a_stack():
    """Under `nnx.vmap`, with fixed orders and with learned ones."""

    @nnx.vmap
    def make(rngs):
        return nnx.List(
            [
                LipschitzLinear(DENSE, 0.3, rngs=rngs),
                LipschitzLinear(DENSE, 0.3, domain=learned_order(), codomain=learned_order(), rngs=rngs),
            ]
        )

    stack = make(nnx.Rngs(0).split(3))
    for layer, norms in zip(stack, map_linears(stack, lambda layer: layer.norm()), strict=True):
        np.testing.assert_allclose(norms, np.linalg.norm(layer.kernel[...], 2, axis=(1, 2)), rtol=1e-5)


def test_a_new_stack_knows_its_norms_in_other_orders():
    """The global maxima, as of layers that are made one by one."""

    def make(rngs):
        return rf.ResidualBlock(rf.LipschitzMLP(4, (5,), norms=(INF, 1.0, INF), rngs=rngs))

    for layer in rf.ResidualStack(make, 12, rngs=nnx.Rngs(0)).unstacked():
        first = layer.contraction.linears[0]
        exact = brute_force_norm(dense_matrix(first.linear_map, first.kernel[...]), INF, 1.0)
        np.testing.assert_allclose(first.norm(), exact, rtol=1e-5)


def changes(kernel):
    """New kernels; the vectors of the old kernel miss the norm of some."""
    u, singular_values, v = np.linalg.svd(kernel)
    low, high = singular_values.copy(), singular_values.copy()
    low[0], high[-1] = 0.1 * low[-1], 20 * high[0]
    return {
        "scaled": 5 * kernel,
        "another": np.random.default_rng(0).normal(size=kernel.shape),
        "the old direction is the smallest": u * low @ v,
        "an orthogonal direction is the largest": u * high @ v,
        "all but equal": u * np.linspace(0.99, 1, len(u)) @ v,
        "a permutation": 3 * np.eye(len(u))[::-1],
    }


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_update_norm_finds_the_norm_of_any_kernel(dtype):
    """With its defaults, within 1 % (here better than 0.1 %), and the status says that it has."""
    layer = LipschitzLinear(DENSE, 0.9, rngs=nnx.Rngs(0))
    nnx.update(layer, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(layer)))
    vectors = nnx.state(layer, NormState)
    for name, kernel in changes(np.asarray(layer.kernel[...], np.float64)).items():
        nnx.update(layer, vectors)
        layer.kernel[...] = jnp.asarray(kernel, dtype)
        status = layer.update_norm()
        assert status.converged, name
        np.testing.assert_allclose(layer.norm(), np.linalg.norm(kernel, 2), rtol=1e-3, err_msg=name)
        assert applied_norm(layer) <= 0.9 * 1.001
        assert layer.u.dtype == layer.v.dtype == dtype


def test_update_norm_of_a_convolution():
    """The same for a kernel that leaves the old vectors in a subspace: the channels change their parts."""
    layer = LipschitzLinear(CONV, 0.9, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...].at[:, :, 1:].set(0)
    layer.update_norm()
    layer.v[...] = layer.v[...].at[..., 1:].set(0)  # exactly within the first channel
    kernel = np.zeros(CONV.kernel_shape)
    kernel[:, :, 0, 0], kernel[:, :, 1, 1] = 0.1, 1.0
    layer.kernel[...] = jnp.asarray(kernel)
    assert layer.update_norm().converged
    np.testing.assert_allclose(layer.norm(), dense_norm(CONV, kernel), rtol=1e-5)


def test_equal_layers_compile_once():
    """Eager layers of one map and orders share a program, whatever their kernels and settings."""
    linear_map = DenseMap(5, 9)  # of no other test
    LipschitzLinear(linear_map, 0.9, rngs=nnx.Rngs(0)).update_norm()
    before = advance._cache_size()
    layer = LipschitzLinear(DenseMap(5, 9), 0.5, rngs=nnx.Rngs(1))
    for tolerance in (1e-2, 1e-4):
        layer.update_norm(tolerance, 10 * tolerance, int(1 / tolerance))
    layer.update_norm(1e-3, None, np.int64(5))
    assert advance._cache_size() == before


class Model(nnx.Module):
    """Layers alone and stacked, alike and not, of orders with and without closed form."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: LipschitzLinear(DENSE, 0.9, rngs=rngs))
        self.stack = make(rngs.split(3))
        self.linears = nnx.List(
            LipschitzLinear(linear_map, 0.9, domain=p, codomain=q, rngs=rngs)
            for linear_map, p, q in [
                (DENSE, 2.0, 2.0),
                (CONV, 2.0, 2.0),
                (DENSE, 2.0, INF),
                (DENSE, INF, INF),
                (DenseMap(3, 4), 3.0, 1.5),
                (DENSE, 2.0, 2.0),
                (DENSE, learned_order(), learned_order()),
                (DenseMap(5, 2), learned_order(), learned_order()),
                (DenseMap(5, 7), 2.0, 2.0),
                (DenseMap(2, 13, "bfloat16"), 2.0, 2.0),
                (ConvMap((4, 3), 3, 4, 1), 2.0, 2.0),
                (DenseMap(4, 3), 3.0, 1.5),
            ]
        )
        self.other = make(rngs.split(2))


def test_all_layers_of_a_model():
    """Each layer gets what it gets alone; the status is that of the slowest; closed forms keep their vectors."""
    with deferred_norms():  # of other kernels
        model, alone = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    for which in (model, alone):
        rng = np.random.default_rng(0)
        for layer in (which.stack, *which.linears, which.other):
            layer.kernel[...] = jnp.asarray(rng.normal(size=layer.kernel.shape))
    status = update_norms(model, NormSettings(1e-12, 1e-7, 5000), restart=True)
    statuses = map_linears(alone, lambda layer: layer.update_norm(1e-12, 1e-7, 5000))
    assert all(s.iterations.dtype == np.int32 for s in (status, *statuses))
    assert status.converged and status.iterations == max(s.iterations.max() for s in statuses)
    assert 0 < status.residual <= 1e-7
    pairs = zip(*((which.stack, *which.linears, which.other) for which in (model, alone)), strict=True)
    for layer, other in pairs:
        np.testing.assert_allclose(layer.v[...], other.v[...], atol=1e-5)
        np.testing.assert_allclose(layer.u[...], other.u[...], atol=1e-5)
        (norms,) = map_linears(nnx.List([layer]), lambda layer: layer.norm())
        if layer.codomain == 2.0 == layer.domain:
            kernels = layer.kernel[...].reshape(-1, *layer.linear_map.kernel_shape)
            exact = [dense_norm(layer.linear_map, kernel) for kernel in kernels]
            np.testing.assert_allclose(np.ravel(norms), exact, rtol=1e-9)
    model.stack.kernel[...] += 0.1
    capped = update_norms(model, NormSettings(1e-12, 1e-7, 2), restart=False)
    assert capped.iterations == 2 and not capped.converged


def test_layers_that_share_a_loop():
    """Small matrices of any shapes share one loop for each pair of orders; large ones and convolutions do not."""
    with deferred_norms():
        model = Model(nnx.Rngs(0))
        model.large = nnx.List(LipschitzLinear(DenseMap(200, 90), 0.9, rngs=nnx.Rngs(0)) for _ in range(2))
    shared = {key: len(layers) for key, layers in norm_updates._groups(model).items()}
    assert shared == {
        (DenseMap(12, 13), (2.0, 2.0)): 7,
        (CONV, (2.0, 2.0)): 1,
        (DenseMap(4, 4), (3.0, 1.5)): 2,
        (DenseMap(12, 12), (None, None)): 2,
        (DenseMap(200, 90), (2.0, 2.0)): 2,
    }


def test_a_loop_for_each_part_of_a_stack(monkeypatch):
    """Seven layers in parts of three have the vectors of seven that iterate at once; the status is the slowest's."""
    make = nnx.vmap(lambda rngs: LipschitzLinear(DenseMap(12, 11), 0.9, rngs=rngs))  # of no other test
    stacks = [make(nnx.Rngs(0).split(7)) for _ in range(2)]
    for stack in stacks:
        stack.kernel[...] += jax.random.normal(jax.random.key(1), stack.kernel.shape)
    settings = NormSettings(1e-12, 1e-7, 5000)
    at_once = update_norms(stacks[0], settings, restart=True)
    monkeypatch.setattr(norm_updates, "_advance_all", norm_updates._advance_all.__wrapped__)  # no program of before
    monkeypatch.setattr(norm_updates, "_AT_ONCE", 3)
    monkeypatch.setattr(norm_updates, "_ELEMENTS_AT_ONCE", 2 * (12 + 11))
    in_parts = update_norms(stacks[1], settings, restart=True)
    assert in_parts.converged and in_parts.iterations == at_once.iterations
    for name in ("u", "v"):
        np.testing.assert_allclose(getattr(stacks[1], name)[...], getattr(stacks[0], name)[...], rtol=1e-9)


def test_memory_does_not_grow_with_the_number_of_layers():
    """The loops of 67 layers with large vectors take as much memory as those of 16, apart from their results."""

    def temporary(number):
        with deferred_norms():
            stack = nnx.eval_shape(
                lambda: nnx.vmap(lambda rngs: LipschitzLinear(ConvMap((32, 32), 1, 16, 3), 0.9, rngs=rngs))(
                    nnx.Rngs(0).split(number)
                )
            )
        graphdef, state = nnx.split(stack)

        def updated(state):
            stack = nnx.merge(graphdef, state)
            update_norms(stack, NormSettings(1e-3, None, 20), restart=False)
            return nnx.state(stack)

        return jax.jit(updated, donate_argnums=0).lower(state).compile().memory_analysis().temp_size_in_bytes

    results = 8 * 32 * 32 * (16 + 1)  # u and v of a layer
    assert temporary(67) - temporary(16) < (67 - 16) * results


def test_a_matrix_of_zeros_beside_larger_ones():
    """Its u is zero, and its vectors keep their shapes and stay finite."""
    model = nnx.List(LipschitzLinear(DenseMap(3, n), 0.9, rngs=nnx.Rngs(n)) for n in (2, 5))
    model[0].kernel[...] *= 0
    status = update_norms(model, NormSettings(1e-6, 1e-3, 100), restart=False)
    assert not model[0].u[...].any() and jnp.isfinite(model[0].v[...]).all() and jnp.isfinite(status.iterations)
    np.testing.assert_allclose(model[1].norm(), np.linalg.norm(model[1].kernel[...], 2), rtol=1e-5)


def test_a_model_of_closed_forms():
    """Nothing to iterate: it has converged."""
    model = nnx.List([LipschitzLinear(DENSE, 0.9, domain=1.0, rngs=nnx.Rngs(0))])
    status = update_norms(model, NormSettings(1e-3, 1e-2, 20), restart=False)
    assert status.converged and status.iterations == 0 and status.residual == 0
    assert status.iterations.dtype == model[0].update_norm().iterations.dtype == np.int32


@pytest.fixture(scope="module")
def flow():
    return rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=3, hidden=(6,)), rngs=nnx.Rngs(0))


def test_new_tolerances_compile_nothing(flow):
    """Eager calls with other numbers, of other types, are one program; `restart` is another one."""
    flow.update_norms()
    before = upkeep._update_norms._cache_size()
    for tolerance in (1e-2, np.float32(1e-4), np.float64(1e-5)):
        flow.update_norms(tolerance=tolerance)
        flow.update_norms(tolerance=tolerance, residual_tolerance=2 * tolerance, max_iterations=np.int64(7))
    assert upkeep._update_norms._cache_size() == before
    traced = nnx.jit(lambda flow, t, n: flow.update_norms(tolerance=t, max_iterations=n))
    for tolerance, cap in ((1e-2, 5), (1e-9, 3)):
        assert traced(flow, tolerance, cap).iterations <= cap
    flow.converge_norms()
    assert upkeep._update_norms._cache_size() == before + 1


@pytest.mark.parametrize("bad", [{"tolerance": 0.0}, {"residual_tolerance": -1.0}, {"max_iterations": 0}], ids=str)
def test_bad_settings(flow, bad):
    """The error names the argument, of a flow and of a layer."""
    layer = LipschitzLinear(DENSE, 0.9, rngs=nnx.Rngs(0))
    for update in (flow.update_norms, layer.update_norm):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: expected"):
            update(**bad)


def test_converge_norms_warns_where_it_is_eager(flow):
    """A kernel is not finite: an eager call warns; a compiled program has no callback and only returns the status."""
    graphdef, state = nnx.split(flow)

    def converge(state):
        flow = nnx.merge(graphdef, state, copy=True)
        status = flow.converge_norms()
        return nnx.state(flow), status

    assert "callback" not in str(jax.make_jaxpr(converge)(state))
    spoilt = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.ndim > 1 else leaf, state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flow.converge_norms().converged
        status = jax.jit(converge)(nnx.state(spoilt))[1]
        assert not status.converged and not status.residual <= 1e-2
    with pytest.warns(RuntimeWarning, match="power iteration: a layer is far from converged"):
        assert not spoilt.converge_norms().converged


def linears(flow):
    return [layer for _, layer in nnx.iter_modules(flow) if isinstance(layer, LipschitzLinear)]


def test_a_flow_in_training_follows_a_direction_that_its_vectors_lack():
    """A singular value grows from nothing, beside vectors that are orthogonal to it: `update_norms` finds it."""
    flow = rf.ResidualFlow(
        rf.VectorFlowConfig(
            dim=8, blocks=1, hidden=(8,), preactivation="all_but_first", between=rf.BetweenBlocks(actnorm=False)
        ),
        rngs=nnx.Rngs(0),
    )
    for linear in linears(flow):
        linear.kernel[...] = jnp.eye(8).at[0, 0].set(2.0)
        linear.v[...] = linear.u[...] = jnp.eye(8)[0]
    graphdef, state = nnx.split(flow)

    @jax.jit
    def train(state, steps):
        def step(state, scale):
            flow = nnx.merge(graphdef, state, copy=True)
            linear = linears(flow)[0]
            linear.kernel[...] = linear.kernel[...].at[3, 3].set(scale)
            flow.update_norms()
            return nnx.state(flow), linears(flow)[0].norm()

        return jax.lax.scan(step, state, steps)

    scales = jnp.concatenate([jnp.linspace(1.0, 3.0, 100), jnp.full(20, 3.0)])
    _, norms = train(state, scales)
    error = 1 - norms / jnp.maximum(2.0, scales)
    assert error[80:].max() < 1e-6 and error.max() < 0.15
