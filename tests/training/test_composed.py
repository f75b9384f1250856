"""A composed conditional flow is trained, on one device and on eight, checkpointed, evaluated, certified, tightened."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.training import Placement, Trainer, make_mesh
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.evaluation import evaluate_bits_per_dim, image_bits_per_dim, vector_log_prob
from resflow_jax.training.examples import Examples
from resflow_jax.training.losses import negative_log_likelihood
from resflow_jax.training.placement import tightened
from tests.io.flows import conditional_flow, contraction

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
X, CONDITIONS = RNG.normal(size=(2, 2, 16, 3)), RNG.normal(size=(2, 2, 16, 2))  # [update, batch, example, ...]


def make(rngs):
    """A conditional block, and running statistics after it."""
    block = rf.ResidualBlock(contraction(rngs, condition_dim=2))
    return rf.Flow(rf.Chain([rf.ActNorm((3,)), block, rf.MovingBatchNorm((3,))]))


def trainer_of(flow, accumulate=2):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.02))
    return Trainer(nnx.graphdef(flow), negative_log_likelihood(), optimizer, 0.9, accumulate)


def batch_of(update):
    return X[update], CONDITIONS[update]


@pytest.fixture(scope="module")
def run():
    """Two steps of two batches each on one device: the trainer, first and last state, metrics of the first step."""
    flow = make(nnx.Rngs(0))
    flow.initialize(X[0, 0], CONDITIONS[0, 0])
    trainer = trainer_of(flow)
    start, step = trainer.create_state(flow, rf.Roulette()), jax.jit(trainer.step)
    middle, metrics = step(start, batch_of(0), KEY)
    return flow, trainer, start, step(middle, batch_of(1), KEY)[0], metrics


def test_the_loss_is_that_of_the_pairs(run):
    """An update uses both batches, each with its step's key and updated statistics; every parameter has changed."""
    flow, _, start, end, metrics = run
    flow = nnx.clone(flow)
    losses = []
    for n in range(2):
        options = {"condition": CONDITIONS[0, n], "key": jax.random.fold_in(KEY, n)}
        losses.append(-flow.log_prob(X[0, n], **options).mean())
        flow.update_statistics(X[0, n], CONDITIONS[0, n])
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), atol=1e-12)
    assert int(end.step) == 4
    for before, after in zip(*map(jax.tree.leaves, (start.params, end.params)), strict=True):
        assert not np.array_equal(before, after)


def test_checkpoints_and_what_follows(run, tmp_path):
    """Restored bit for bit; the averaged flow is evaluated, certified and tightened."""
    _, trainer, start, end, _ = run
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(end, 1.0, rf.certify(trainer.averaged_flow(end)))
        checkpoints.wait()
        restored = checkpoints.restore(4, start)
        assert checkpoints.certificate(4)["is_certified"]
    chex.assert_trees_all_equal(restored, end)
    flow = tightened(trainer.averaged_flow(restored))
    assert rf.certify(flow).is_certified
    x, conditions = X[0, 0], CONDITIONS[0, 0]
    expected = flow.log_prob(x, condition=conditions, estimator=rf.Exact())
    for batch_size in (16, 5):
        found = vector_log_prob(flow, x, KEY, condition=conditions, batch_size=batch_size)
        np.testing.assert_allclose(found, expected[None], atol=1e-12)
    found = vector_log_prob(flow, x, KEY, condition=conditions[0])
    expected = flow.log_prob(x, condition=conditions[0], estimator=rf.Exact())
    np.testing.assert_allclose(found, expected[None], atol=1e-12)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py")
@pytest.mark.parametrize("strategy", ["jit", "model", "shard_map", "pmap"])
def test_eight_devices_take_the_steps_of_one(run, strategy):
    """Conditions go with their examples to the same device."""
    _, trainer, start, end, metrics = run
    is_divided = strategy == "model"
    mesh = make_mesh(data=2, model=4) if is_divided else make_mesh()
    placement = Placement(trainer, mesh, "jit" if is_divided else strategy, "model" if is_divided else "replicated")
    state = placement.place(start)
    for update in range(2):
        state, found = placement.step(state, placement.place_batch(batch_of(update)), KEY)
        if update == 0:
            np.testing.assert_allclose(found["loss"], metrics["loss"], atol=1e-12)
    chex.assert_trees_all_close(placement.to_host(placement.to_checkpoint(state)), end, atol=1e-9)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py")
def test_evaluation_on_a_mesh(run):
    flow = run[0]
    options = {"condition": CONDITIONS[0, 0], "estimator": rf.Exact()}
    found = vector_log_prob(flow, X[0, 0], KEY, **options, mesh=make_mesh())
    np.testing.assert_allclose(found[0], flow.log_prob(X[0, 0], **options), atol=1e-12)


def test_flows_with_every_kind_of_layer():
    """An inverse that is solved in the forward pass, a stack, constants: two steps, and a finite average."""
    flow = conditional_flow(nnx.Rngs(0))
    flow.initialize(X[0, 0], CONDITIONS[0, 0])
    trainer = trainer_of(flow, accumulate=1)
    state, step = trainer.create_state(flow, rf.Roulette()), trainer.compiled_step()
    for n in range(2):
        state, metrics = step(state, (X[0, n], CONDITIONS[0, n]), KEY)
        assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
        assert metrics["diagnostics"].term_norms.shape[0] == flow.blocks == 2
    assert rf.certify(trainer.averaged_flow(state)).is_certified


def test_images_of_a_class():
    """Bits/dim of images with a condition each, or one for all, are those of their log-densities."""

    class Tilted(rf.Bijector):
        event_shape, condition_shape = (2, 2, 1), (1,)

        def transform(self, x, condition=None):
            scale = jnp.exp(condition)[:, :, None, None]
            return scale * x, 4 * condition[:, 0]

        def invert(self, y, condition=None):
            return y * jnp.exp(-condition)[:, :, None, None]

    flow = rf.Flow(Tilted())
    images = RNG.integers(0, 4, (6, 2, 2, 1)).astype(np.uint8)
    conditions = RNG.normal(size=(6, 1))
    options = {"levels": 4, "draws": 2, "estimator": rf.Exact(), "batch_size": 4}
    found = image_bits_per_dim(flow, images, KEY, **options, condition=conditions)
    for n in range(6):
        alone = image_bits_per_dim(flow, images, KEY, **options, condition=conditions[n])
        np.testing.assert_allclose(found[:, n], alone[:, n], atol=1e-12)
    assert np.ptp(found) > 0.1
    mean = evaluate_bits_per_dim(flow, images, KEY, **options, condition=conditions).mean
    np.testing.assert_allclose(mean, found.mean(), atol=1e-12)
    for bad in (np.nan * conditions, jnp.full((1,), jnp.inf)):
        with pytest.raises(ValueError, match=r"^condition: expected finite values, got \d that"):
            evaluate_bits_per_dim(flow, images, KEY, **options, condition=bad)
        with pytest.raises(ValueError, match=r"^condition: expected finite values, got \d that"):
            Examples.of(flow, images, bad, levels=4)


def test_what_does_not_fit(run):
    """The batch, the condition, the events: errors that say what was expected."""
    flow, trainer, start, _, _ = run
    with pytest.raises(ValueError, match=r"batch: expected x, or a pair \(x, condition\), got 3 parts"):
        jax.eval_shape(trainer.step, start, (*batch_of(0), X[0]), KEY)
    with pytest.raises(ValueError, match=r"condition: expected floats .* got None"):
        jax.eval_shape(trainer.step, start, X[0], KEY)
    with pytest.raises(ValueError, match=r"condition: expected floats .* got None"):
        vector_log_prob(flow, X[0, 0], KEY)
    with pytest.raises(ValueError, match=r"condition: expected floats .* got shape \(5, 2\)"):
        vector_log_prob(flow, X[0, 0], KEY, condition=CONDITIONS[0, 0, :5])
    for as_given in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match=r"^x: expected finite values, got \d+ that"):
            vector_log_prob(flow, as_given(np.nan * X[0, 0]), KEY, condition=CONDITIONS[0, 0])
        with pytest.raises(ValueError, match=r"^condition: expected finite values, got \d+ that"):
            vector_log_prob(flow, X[0, 0], KEY, condition=as_given(np.nan * CONDITIONS[0, 0]))
    with pytest.raises(ValueError, match=r"flow: expected a Flow, got"):
        trainer.create_state(3, rf.Roulette())
    squares = rf.Flow(rf.Reshape((2, 2), (4,)))
    with pytest.raises(ValueError, match=r"x: expected events \[N, 2, 2\] with N > 0, got shape \(3, 4\)"):
        vector_log_prob(squares, np.zeros((3, 4)), KEY)
    np.testing.assert_allclose(vector_log_prob(squares, np.zeros((3, 2, 2)), KEY), -2 * np.log(2 * np.pi))


def test_the_flow_outlives_its_training():
    """Compiled steps take over the arrays of a state: the flow that it was made of keeps its own."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(3,)), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 2))
    before = flow(x)
    trainer = trainer_of(flow, accumulate=1)
    trainer.compiled_step()(trainer.create_state(flow, rf.Roulette()), x, jax.random.key(1))
    np.testing.assert_array_equal(flow(x), before)
