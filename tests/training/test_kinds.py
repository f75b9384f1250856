"""Training and evaluation with what users bring: estimators and laws, optimisers of all kinds, flows with keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.sampling import SamplingMap
from resflow_jax.training import Placement, Trainer, make_mesh
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.losses import negative_log_likelihood

X = np.random.default_rng(0).normal(size=(16, 2))
KEY = jax.random.key(0)
needs_devices = pytest.mark.skipif(jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py")


class FirstOrder:
    """log|det(I + J)| ~ tr J; its class is no pytree."""

    needs_key = False

    def estimate(self, g, x, key):
        g_x, pullback = jax.vjp(g, x)
        rows = [pullback(jnp.zeros_like(x).at[:, i].set(1))[0][:, i] for i in range(x.shape[1])]
        return x + g_x, sum(rows)


class Law(NamedTuple):
    """A geometric law, with a number of Python."""

    p: float = 0.5

    def sample(self, key, shape=()):
        return jax.random.geometric(key, self.p, shape)

    def survival(self, k):
        return jnp.where(k == 0, 1.0, (1 - self.p) ** (jnp.maximum(k, 1) - 1).astype(float))

    def tail_ratio(self):
        return 1 - self.p


def made(optimizer=None, estimator=None):
    flow = rf.ResidualFlow(rf.VectorFlowConfig(2, 1, (4,)), rngs=nnx.Rngs(0))
    trainer = Trainer(nnx.graphdef(flow), negative_log_likelihood(), optimizer or optax.sgd(0.1), 0.9)
    return flow, trainer, trainer.create_state(flow, rf.Exact() if estimator is None else estimator)


@pytest.mark.parametrize("name", ["prodigy", "cocob"])
def test_optimisers_that_keep_the_parameters(name):
    """Their state has arrays of its own, since a step is donated both."""
    flow, trainer, state = made(getattr(optax.contrib, name)())
    step = trainer.compiled_step()
    for _ in range(2):
        state, metrics = step(state, X, KEY)
    assert np.isfinite(metrics["loss"]) and np.isfinite(flow.log_prob(X, estimator=rf.Exact())).all()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, nnx.state(flow, nnx.Param))
    assert any(jax.tree.leaves(moved))


def test_optimisers_that_look_at_the_loss():
    """They are given the loss and the gradient of the update."""

    def update(updates, state, params=None, *, value, grad, **_):
        return updates, (value, optax.tree.norm(grad))

    look = optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()), jnp.zeros(())), update)
    _, trainer, state = made(optax.chain(optax.sgd(0.1), look))
    state, metrics = jax.jit(trainer.step)(state, X, KEY)
    np.testing.assert_array_equal(state.opt_state[1], (metrics["loss"], metrics["gradient_norm"]))


def test_arrays_of_an_estimator_are_left_to_the_user():
    """A step is donated a copy of the table of fitted lengths."""
    estimator = rf.Roulette(rf.fit_lengths(jnp.array([1e-2, 1e-4, 1e-6]), batch_size=16))
    _, trainer, state = made(estimator=estimator)
    state, _ = trainer.compiled_step()(state, X, KEY)
    np.testing.assert_array_equal(estimator.length.table, np.ravel(state.estimator.length.table))


def test_an_estimator_of_the_users():
    """It trains and evaluates as in a call of the flow."""
    flow, trainer, state = made(estimator=FirstOrder())
    state, metrics = trainer.compiled_step()(state, X, KEY)
    log_prob = flow.log_prob(X, estimator=FirstOrder())
    np.testing.assert_allclose(metrics["loss"], -log_prob.mean(), rtol=1e-12)
    np.testing.assert_allclose(vector_log_prob(flow, X, KEY, estimator=FirstOrder())[0], log_prob, rtol=1e-12)
    found = SamplingMap.of(flow, None, FirstOrder(), rf.Anderson()).encode_and_log_det(jnp.asarray(X))
    jax.tree.map(np.testing.assert_array_equal, found, flow.forward(X, estimator=FirstOrder()))


@needs_devices
def test_a_law_with_numbers_of_python_on_a_mesh():
    """The same evaluation as on one device, and a step."""
    estimator = rf.Roulette(Law())
    flow, trainer, state = made(estimator=estimator)
    one, eight = (vector_log_prob(flow, X, KEY, estimator=estimator, mesh=mesh) for mesh in (None, make_mesh()))
    np.testing.assert_allclose(one, eight, rtol=1e-12)
    placement = Placement(trainer, make_mesh())
    _, metrics = placement.step(placement.place(state), placement.place_batch(X), KEY)
    assert np.isfinite(metrics["loss"])


class Noisy(rf.Bijector):
    """A scale; its dropout, which never drops, has a PRNG key."""

    event_shape = (2,)

    def __init__(self, rngs):
        self.log_scale = nnx.Param(jnp.ones(2))
        self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

    def transform(self, x, condition=None):
        log_scale = self.dropout(self.log_scale[...])
        return x * jnp.exp(log_scale)[None], jnp.full(x.shape[0], log_scale.sum())


def words(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@needs_devices
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_a_flow_with_a_key_on_many_devices(strategy):
    """Its key is placed and comes back, and the step is that of one device."""
    flow = rf.Flow(Noisy(nnx.Rngs(3)), rf.StandardNormal((2,)))
    trainer = Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), 0.9)
    before = trainer.create_state(flow, rf.Exact())
    placement = Placement(trainer, make_mesh(), strategy)
    state, _ = placement.step(placement.place(before), placement.place_batch(X), KEY)
    expected, _ = jax.jit(trainer.step)(before, X, KEY)
    found = placement.to_host(placement.to_checkpoint(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found.params, expected.params)
    for a, b in zip(jax.tree.leaves(found.non_params), jax.tree.leaves(before.non_params), strict=True):
        np.testing.assert_array_equal(words(a), words(b))
    assert placement.current_flow(placement.to_checkpoint(state)).log_prob(X).shape == (16,)


def test_checkpoints(tmp_path):
    """Keys of a flow, and numbers of Python in a law, come back, also for a state of shapes."""
    flow = rf.Flow(rf.Chain([Noisy(nnx.Rngs(3)), rf.ResidualBlock(rf.LipschitzMLP(2, (4,), rngs=nnx.Rngs(0)))]))
    trainer = Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), 0.9)
    state = trainer.create_state(flow, rf.Roulette(Law()))
    other = trainer.create_state(rf.Flow(nnx.clone(flow.bijector)), rf.Roulette(Law(0.25)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        for like in (other, jax.eval_shape(lambda: other)):
            found = checkpoints.restore(0, like)
            for a, b in zip(*map(jax.tree.leaves, (found, state)), strict=True):
                np.testing.assert_array_equal(words(jnp.asarray(a)), words(jnp.asarray(b)))
