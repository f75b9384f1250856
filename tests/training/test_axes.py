"""Only named axes divide a batch; all other mapped axes, whatever their names, have independent lanes."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import resflow_jax as rf
from resflow_jax.training.losses import negative_log_likelihood
from resflow_jax.training.parallel import make_mesh
from resflow_jax.training.step import Trainer

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py, not another platform"
)

CONFIG = rf.VectorFlowConfig(
    dim=5, blocks=1, hidden=(6,), preactivation="all", between=rf.BetweenBlocks(batchnorm=True)
)
X = jax.random.normal(jax.random.key(0), (4, 5)) * 3 + 1
KEY = jax.random.key(5)


@cache
def members():
    """Two flows as one state with a leading axis, and each alone."""
    flows = [rf.ResidualFlow(CONFIG, rngs=nnx.Rngs(n)) for n in range(2)]
    states = [nnx.state(flow) for flow in flows]
    return nnx.split(flows[0])[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), states


def log_prob(graphdef, state, x, key=KEY):
    return nnx.merge(graphdef, state, copy=True).log_prob(x, key=key)


# A program for all tests; tests that map make their own, as do those that name an axis.
one = jax.jit(log_prob, static_argnums=0)


def initialized(graphdef, state, x):
    flow = nnx.merge(graphdef, state, copy=True)
    flow.initialize(x)
    return nnx.state(flow)


@pytest.mark.parametrize("function", [log_prob, initialized])
def test_members_of_an_ensemble_are_independent(function):
    """Also along an axis named "data": each member sees the whole batch, with the noise and statistics of one alone."""
    graphdef, stacked, states = members()
    apply = partial(function, graphdef)
    found = jax.jit(jax.vmap(apply, (0, None), axis_name="data"))(stacked, X)
    alone = jax.jit(apply)
    for n, state in enumerate(states):
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, n=n: leaf[n], found), alone(state, X), rtol=1e-10)


def test_members_train_independently():
    """An axis named "data" of a whole training step: no gradient, statistic or noise is shared."""
    graphdef, _, states = members()
    trainer = Trainer(graphdef, negative_log_likelihood(), optax.sgd(0.1), 0.9)
    starts = [trainer.create_state(nnx.merge(graphdef, state, copy=True), rf.Roulette()) for state in states]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    batches = jnp.stack([X, X[::-1] + 1])
    found, metrics = jax.jit(jax.vmap(trainer.step, (0, 0, None), axis_name="data"))(stacked, batches, KEY)
    step = jax.jit(trainer.step)
    for n, start in enumerate(starts):
        expected = step(start, batches[n], KEY)
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, n=n: leaf[n], (found, metrics)), expected, rtol=1e-9, atol=1e-12
        )


def shares(map_over, named):
    """log_prob of a batch with one half in each of two lanes, with or without a context that names the axis."""
    graphdef, _, (state, _) = members()

    def of_lane(state, x):
        if not named:
            return log_prob(graphdef, state, x)
        with rf.batch_axes(*named):
            return log_prob(graphdef, state, x)

    halves = X.reshape(2, 2, 5)
    whole, divided = PartitionSpec(), PartitionSpec("lanes")
    mesh = jax.make_mesh((2,), ("lanes",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return {
        "pmap": lambda: jax.pmap(of_lane, "lanes", in_axes=(None, 0), devices=jax.devices()[:2])(state, halves),
        "vmap": lambda: jax.jit(jax.vmap(of_lane, (None, 0), axis_name="lanes"))(state, halves),
        "shard_map": lambda: jax.jit(
            jax.shard_map(of_lane, mesh=mesh, in_specs=(whole, divided), out_specs=divided, check_vma=False)
        )(state, X),
    }[map_over]().reshape(4)


@pytest.mark.parametrize("map_over", ["pmap", "vmap", "shard_map"])
def test_a_named_axis_is_one_of_the_batch(map_over):
    """Each example draws by its number in the whole batch; not named, a lane's examples draw as if they were all."""
    graphdef, _, (state, _) = members()
    np.testing.assert_allclose(shares(map_over, ("lanes",)), one(graphdef, state, X), rtol=1e-10)
    alone = np.concatenate([one(graphdef, state, half) for half in (X[:2], X[2:])])
    np.testing.assert_allclose(shares(map_over, ()), alone, rtol=1e-10)
    assert not np.allclose(alone[2:], one(graphdef, state, X)[2:], rtol=1e-6), "the noise differs"


def test_a_compiled_function_knows_its_context():
    """The context is part of what a program is cached by, so that neither is taken for the other."""
    graphdef, _, (state, _) = members()
    inner = jax.jit(partial(log_prob, graphdef))

    def of_lane(named, x):
        if named:
            with rf.batch_axes("lanes"):
                return inner(state, x)
        return inner(state, x)

    apply = [jax.vmap(partial(of_lane, named), axis_name="lanes")(X.reshape(2, 2, 5)) for named in (True, False, True)]
    np.testing.assert_array_equal(apply[0], apply[2])
    np.testing.assert_allclose(apply[0].reshape(4), inner(state, X), rtol=1e-10)
    assert not np.allclose(apply[0][1], apply[1][1], rtol=1e-6)


def test_statistics_of_the_whole_batch_by_any_name():
    """ActNorm and running statistics are set from all shares where the axis is named, whatever its name."""
    graphdef, _, (state, _) = members()

    def of_lane(x):
        with rf.batch_axes("lanes"):
            return initialized(graphdef, state, x)

    found = jax.pmap(of_lane, "lanes", out_axes=None, devices=jax.devices()[:2])(X.reshape(2, 2, 5))
    chex.assert_trees_all_close(found, initialized(graphdef, state, X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("named", [("nowhere",), ("lanes", "nowhere")])
def test_names_that_nothing_binds(named):
    """The error names the axis, or the value that is not a name."""
    with pytest.raises(ValueError, match=r"batch_axes: expected the name of an axis .*, got 'nowhere'"):
        shares("vmap", named)
    with pytest.raises(ValueError, match=r"names: expected strings, .* got 3"):
        rf.batch_axes(3)


def test_an_axis_that_arrays_tell_of():
    """In shard_map with check_vma nothing is to be named; to name another axis of the mesh is an error."""
    graphdef, _, (state, _) = members()
    whole, divided = PartitionSpec(), PartitionSpec("data")

    def spread(names):
        def of_device(state, x):
            with rf.batch_axes(*names):
                return log_prob(graphdef, state, x)

        mesh = make_mesh(2, 2, jax.devices()[:4])
        return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=(whole, divided), out_specs=divided))(state, X)

    expected = one(graphdef, state, X)
    for names in ((), ("data",)):
        np.testing.assert_allclose(spread(names), expected, rtol=1e-10)
    with pytest.raises(ValueError, match=r"batch_axes: .* that the batch varies over, .*data.*got.*model"):
        spread(("model",))


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_keys_of_other_kinds(kind):
    """Draws mapped over such keys would depend on all keys of a device; here they go by the example all the same."""
    graphdef, _, (state, _) = members()
    key, whole, divided = jax.random.key(5, impl=kind), PartitionSpec(), PartitionSpec("data")
    apply = jax.shard_map(
        partial(log_prob, graphdef),
        mesh=make_mesh(2, 1, jax.devices()[:2]),
        in_specs=(whole, divided, whole),
        out_specs=divided,
    )
    np.testing.assert_allclose(jax.jit(apply)(state, X, key), one(graphdef, state, X, key), rtol=1e-10)
    values = [one(graphdef, state, X, key) for key in jax.random.split(key, 4)]  # of two keys the signs may be equal
    assert np.ptp(values, axis=0).min() > 1e-2
