"""Flows as pure functions of a dict: against the flow itself, and through what dicts go through."""

from typing import get_type_hints

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import resflow_jax as rf
import resflow_jax.interop
from resflow_jax.functional.power_iteration import PowerIterationStatus
from resflow_jax.interop import stateless
from resflow_jax.training.step import optax_promotion
from tests.interop.flows import bent
from tests.io.flows import CONDITION, conditional_flow

CONFIG = rf.VectorFlowConfig(
    dim=2,
    blocks=2,
    hidden=(4,),
    preactivation="all",
    data=rf.VectorTransform(mean=(0, 0), std=(1, 2)),
    between=rf.BetweenBlocks(batchnorm=True, invertible_linear=True),
)
X = bent(8)


@pytest.fixture(scope="module")
def model():
    return resflow_jax.interop.stateless.stateless(CONFIG)


@pytest.fixture(scope="module")
def variables(model):
    return model.init(jax.random.key(0), X)


@pytest.fixture(scope="module")
def expected(model, variables):
    return model.bind(variables).log_prob(X, estimator=rf.Exact())


def differing(first, second):
    """The collections that differ."""
    equal = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), first, second)
    return [name for name, tree in equal.items() if not all(jax.tree.leaves(tree))]


def log_prob(model, variables):
    return model.apply(variables, "log_prob", X, estimator=rf.Exact())


def test_variables_are_plain_dicts_by_collection(model, variables, expected):
    """Only dicts with string keys and arrays; apply is the flow's method; data set ActNorm at `init`."""
    assert set(variables) == {"params", "norms", "batch_stats", "constants"}
    for path, leaf in jax.tree.leaves_with_path(variables):
        assert isinstance(leaf, jax.Array)
        assert all(isinstance(entry, jax.tree_util.DictKey) and isinstance(entry.key, str) for entry in path)
    np.testing.assert_array_equal(log_prob(model, variables), expected)
    assert differing(variables, model.init(jax.random.key(0))) == ["batch_stats", "constants"]


def test_every_public_method_is_there(model, variables):
    sample = model.apply(variables, "sample", jax.random.key(0), 8)
    z = model.apply(variables, "__call__", sample)
    np.testing.assert_allclose(model.apply(variables, "inverse", z), sample, atol=1e-9)
    assert rf.certify(model.bind(variables)).bounds.shape == (2,)


def test_methods_that_change_a_flow_are_known_as_such():
    """Those that return nothing, or how a power iteration ended: `apply` is to return their variables."""
    methods = stateless.methods_of(rf.ResidualFlow)
    assert set(methods) == set(stateless.methods_of(rf.Flow)) and "__call__" in methods
    returned = {name: get_type_hints(getattr(rf.ResidualFlow, name))["return"] for name in methods}
    changing = {name for name, kind in returned.items() if kind in (type(None), PowerIterationStatus)}
    assert changing == stateless.CHANGING


def test_methods_that_change_a_flow_return_new_variables(model, variables):
    """Each changes its own collections, and those passed in stay as they were."""
    copy = jax.tree.map(jnp.copy, variables)
    scaled = {**variables, "params": jax.tree.map(lambda leaf: 1.1 * leaf + 0.1, variables["params"])}
    after, status = model.apply(scaled, "update_norms", max_iterations=3)
    assert differing(scaled, after) == ["norms"] and status.iterations > 1
    assert differing(variables, model.apply(variables, "update_statistics", 2 * X)) == ["batch_stats"]
    # The first ActNorm undoes the scaling, so batch norm after it has the same input as before.
    assert differing(variables, model.apply(variables, "initialize", 2 * X)) == ["constants"]
    assert differing(variables, copy) == []


def test_trains_by_optax_under_jit(model, variables, expected):
    """One compiled step of parameters and norms, the gradient in the parameters alone."""
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(variables, state):
        def loss(params):
            return -log_prob(model, {**variables, "params": params}).mean()

        gradient = jax.grad(loss)(variables["params"])
        with optax_promotion():
            updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(variables["params"], updates)
        return model.apply({**variables, "params": params}, "update_norms")[0], state

    trained, state = variables, optimizer.init(variables["params"])
    for _ in range(20):
        trained, state = step(trained, state)
    assert log_prob(model, trained).mean() > expected.mean() + 0.1
    assert differing(variables, trained) == ["norms", "params"]


def test_vmap_over_variables(model, variables, expected):
    """An ensemble as one dict with a leading axis."""
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    together = jax.jit(jax.vmap(lambda variables: log_prob(model, variables)))(stacked)
    np.testing.assert_allclose(together, [expected, expected], atol=1e-12)


def test_survives_serialization(model, variables, expected, tmp_path):
    """flax.serialization and orbax give the same numbers back; host arrays will do."""
    packed = flax.serialization.to_bytes(variables)
    restored = flax.serialization.from_bytes(variables, packed)
    np.testing.assert_array_equal(log_prob(model, restored), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "variables", variables)
    np.testing.assert_array_equal(log_prob(model, restored), expected)


def test_errors_name_what_is_wrong(model, variables):
    with pytest.raises(ValueError, match=r"method: expected one of forward, .*; got 'logprob'"):
        model.apply(variables, "logprob", X)
    without = {name: tree for name, tree in variables.items() if name != "norms"}
    with pytest.raises(ValueError, match=r"collections missing: norms$"):
        model.bind(without)
    with pytest.raises(ValueError, match=r"collections unknown: state$"):
        model.bind({**variables, "state": {}})
    with pytest.raises(ValueError, match=r"arrays unknown: constants/scale$"):
        model.bind({**variables, "constants": {**variables["constants"], "scale": jnp.ones(1)}})
    with pytest.raises(ValueError, match="arrays missing: constants/bijector/bijectors/0/mean, "):
        model.bind({**variables, "constants": {}})
    scalars = jax.tree.map(lambda leaf: leaf.ravel()[:1], variables["constants"])
    with pytest.raises(ValueError, match=r"expected constants/bijector/bijectors/0/mean of shape \(2,\), got \(1,\)"):
        model.bind({**variables, "constants": scalars})
    for source in (3, model.bind(variables)):
        with pytest.raises(
            ValueError, match=r"source: expected the config of a flow, or a function make_flow\(rngs\), got"
        ):
            stateless.stateless(source)
    with pytest.raises(ValueError, match=r"make_flow: expected Flow, got Rngs"):
        stateless.stateless(lambda rngs: rngs).init(jax.random.key(0))


@pytest.mark.parametrize(
    "config",
    [
        rf.CouplingFlowConfig((2,), couplings=2, conditioner=rf.MLPConditioner((2,))),
        rf.ClassifierConfig((4, 4, 1), 3, blocks=(1,), hidden_channels=(4,), padding=0),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configs_of_other_flows(config):
    """Whatever config a flow has, it makes the same flow."""
    model = stateless.stateless(config)
    flow = model.bind(model.init(jax.random.key(0)))
    assert flow.config == config and flow.event_shape == config.shape


def test_a_composed_conditional_flow():
    """From a function that makes the flow: init, methods and training in one compiled step, with conditions."""
    model, x = stateless.stateless(conditional_flow), jax.random.normal(jax.random.key(1), (8, 3))
    variables = model.init(jax.random.key(0), x, CONDITION)
    flow = conditional_flow(nnx.Rngs(jax.random.key(0)))
    flow.initialize(x, CONDITION)
    options = {"condition": CONDITION, "estimator": rf.Exact()}
    np.testing.assert_allclose(
        model.apply(variables, "log_prob", x, **options), flow.log_prob(x, **options), atol=1e-12
    )

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: model.apply({**variables, "params": params}, "log_prob", x, **options).mean())(
            params
        )

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(variables["params"])))
    assert rf.certify(model.bind(variables)).is_certified
    with pytest.raises(ValueError, match=r"method: expected one of .*; got 'logits'"):
        model.apply(variables, "logits", x)
