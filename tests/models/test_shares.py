"""Calls of a flow whose batches are divided among CPU devices, as `rf.use_cpu_cores` makes them."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import resflow_jax as rf

ESTIMATOR = rf.Roulette()
KEY, B = jax.random.key(3), 8


@pytest.fixture(scope="module")
def parts():
    """A conditional flow in its two parts, a batch, and its conditions."""
    config = rf.VectorFlowConfig(dim=3, blocks=1, hidden=(4,), condition_dim=2)
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    x, condition = jax.random.normal(KEY, (B, 3)), jax.random.normal(jax.random.key(4), (B, 2))
    return *nnx.split(flow), x, condition


@pytest.fixture
def two() -> Iterator[Mesh]:
    """Two devices share batches."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("cores",))
    with jax.set_mesh(mesh):
        yield mesh


def all_results(graphdef, state, x, condition, key):
    """What the methods of a flow return."""
    flow = nnx.merge(graphdef, state)
    options = {"condition": condition, "key": key, "estimator": ESTIMATOR}
    z = flow(x, condition)
    return {
        "forward": flow.forward(x, **options, return_diagnostics=True),
        "both": flow.forward_and_log_prob(x, **options),
        "sample": flow.sample(key, B, condition=condition),
        "way back": flow.inverse_and_log_prob(z, **options, return_diagnostics=True, return_status=True),
        **results(graphdef, state, x, condition, key),
    }


def results(graphdef, state, x, condition, key):
    """The inverse with its status, and a gradient of log_prob in the parameters, in x and in the condition."""

    def loss(state, x, condition):
        flow = nnx.merge(graphdef, state)
        return jnp.sum(jnp.sin(flow.log_prob(x, condition=condition, key=key, estimator=ESTIMATOR)))

    flow = nnx.merge(graphdef, state)
    return {
        "inverse": flow.inverse(flow(x, condition), condition=condition, return_status=True),
        "gradient": jax.grad(loss, argnums=(0, 1, 2))(state, x, condition),
    }


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


def last(tree):
    return jax.tree.map(lambda leaf: leaf[-1], tree)


def scanned(function, *arrays):
    return last(jax.lax.scan(lambda carry, _: (carry, function(*arrays)), 0, None, length=2)[1])


def mapped_over_keys(function, *arrays_and_key):
    *arrays, key = arrays_and_key
    return last(jax.vmap(lambda key: function(*arrays, key))(jnp.stack([jax.random.key(9), key])))


def mapped_over_parameters(function, state, *others):
    return last(jax.vmap(lambda state: function(state, *others))(jax.tree.map(lambda a: jnp.stack([a / 2, a]), state)))


MODES = {
    "scan": scanned,
    "vmap over keys": mapped_over_keys,
    "vmap over parameters": mapped_over_parameters,
}


@pytest.fixture(scope="module")
def expected(parts):
    """Those of one device."""
    graphdef, *arrays = parts
    return jax.jit(partial(all_results, graphdef))(*arrays, KEY)


def test_results_are_those_of_one_device(parts, expected, two):
    """Values, diagnostics, statuses and gradients."""
    graphdef, *arrays = parts
    assert_close(jax.jit(partial(all_results, graphdef))(*arrays, KEY), expected)


@pytest.mark.parametrize("mode", MODES)
def test_in_loops_and_maps(mode, parts, expected, two):
    """The inverse and the gradient are those of one device there too."""
    graphdef, *arrays = parts
    found = jax.jit(lambda *args: MODES[mode](partial(results, graphdef), *args))(*arrays, KEY)
    assert_close(found, {name: expected[name] for name in found})


def test_each_device_takes_a_share(parts, two):
    """The results of a call lie on both devices."""
    graphdef, state, x, condition = parts
    flow = nnx.merge(graphdef, state)
    for y in (flow(x, condition), flow.sample(KEY, B, condition=condition)):
        assert y.sharding.device_set == set(two.devices.flat)
        assert {shard.data.shape for shard in y.addressable_shards} == {(B // 2, 3)}


def test_what_is_not_divided(parts, two):
    """Shares of an odd size, and calls inside of another division or of a map with a named axis."""
    graphdef, state, x, condition = parts
    z = nnx.merge(graphdef, state)(x, condition)

    def transform(state, x, condition):
        return nnx.merge(graphdef, state)(x, condition)

    odd = transform(state, x[:6], condition[:6])
    assert odd.sharding.is_fully_replicated
    whole, batch = PartitionSpec(), PartitionSpec("cores")
    divided = jax.shard_map(transform, in_specs=(whole, batch, batch), out_specs=batch)(state, x, condition)
    lanes = [leaf.reshape(2, 4, -1) for leaf in (x, condition)]
    mapped = jax.vmap(transform, (None, 0, 0), axis_name="lanes")(state, *lanes)
    assert_close((odd, divided, mapped.reshape(B, -1)), (z[:6], z, z))


def test_after_a_step_on_all_devices(parts, two):
    """The parameters lie on both devices then. Later calls take them, also those of a batch that is not divided."""
    graphdef, state, x, condition = parts

    @jax.jit
    def step(state):
        def loss(state):
            return -jnp.mean(nnx.merge(graphdef, state).log_prob(x, condition=condition, key=KEY, estimator=ESTIMATOR))

        flow = nnx.merge(graphdef, jax.tree.map(lambda a, b: a - 0.01 * b, state, jax.grad(loss)(state)))
        flow.update_norms()
        return nnx.split(flow)[1]

    once = step(state)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(once))
    flow = nnx.merge(graphdef, step(once))
    for size in (8, 6):
        z = flow(x[:size], condition[:size])
        assert_close(flow.inverse(z, condition=condition[:size]), x[:size])
    assert flow.sample(KEY, 7, condition=condition[0]).shape == (7, 3)
