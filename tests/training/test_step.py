"""The training step: it descends, averages and keeps the norms; its memory does not grow with depth."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.training.losses import dequantized_bits_per_dim, negative_log_likelihood
from resflow_jax.training.step import Trainer, fit_estimator

TINY = rf.ImageFlowConfig(
    (4, 4, 1),
    blocks=(2,),
    hidden_channels=4,
    kernels=(3, 3),
    preactivation="all",
    between=rf.BetweenBlocks(first_actnorm=False),
    tail=rf.DenseTail(0),
)
IMAGES = np.random.default_rng(0).integers(0, 3, (8, 4, 4, 1)).astype(np.uint8)
KEY = jax.random.key(7)


def make(config=TINY, optimizer=None, levels=4):
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    loss = dequantized_bits_per_dim(levels)
    trainer = Trainer(nnx.split(flow)[0], loss, optimizer or optax.adam(3e-3), ema_decay=0.9)
    return trainer, trainer.create_state(flow, rf.Roulette())


@pytest.fixture(scope="module")
def run():
    """Forty steps on one batch: the trainer, the compiled step, the states after every step, the metrics."""
    trainer, state = make()
    step = jax.jit(trainer.step)
    states, metrics = [state], []
    for _ in range(40):
        state, values = step(states[-1], IMAGES, KEY)
        states.append(state)
        metrics.append(jax.device_get(values))
    return trainer, step, states, metrics


def test_the_loss_falls(run):
    """Bits/dim of the batch falls steadily; the value is finite and the step counts."""
    _, _, states, metrics = run
    losses = np.asarray([m["loss"] for m in metrics])
    assert losses[-10:].mean() < losses[:10].mean() - 0.1
    assert int(states[-1].step) == 40 and all(m["gradient_norm"] > 0 for m in metrics)


def test_steps_use_fresh_noise_and_are_repeatable(run):
    """The same state, batch and key give the same step bit for bit; the step's number changes the noise."""
    _, step_function, states, metrics = run
    again, values = step_function(states[3], IMAGES, KEY)
    chex.assert_trees_all_equal(again, states[4])
    np.testing.assert_array_equal(values["loss"], metrics[3]["loss"])
    moved = states[3]._replace(step=states[3].step + 1)
    assert step_function(moved, IMAGES, KEY)[1]["loss"] != values["loss"]


def test_average_of_the_parameters(run):
    """The averaged flow holds sum_t d^(T-t) p_t / sum_t d^(T-t), with its norms converged."""
    trainer, _, states, _ = run
    before = jax.tree.map(np.asarray, states[3])
    flow = trainer.averaged_flow(states[3])
    chex.assert_trees_all_equal(states[3], before)  # the training goes on with its own power-iteration vectors
    weights = np.asarray([0.81, 0.9, 1.0]) / 2.71
    expected = jax.tree.map(
        lambda *p: sum(w * x for w, x in zip(weights, p, strict=True)), *[s.params for s in states[1:4]]
    )
    chex.assert_trees_all_close(nnx.state(flow, nnx.Param), expected, rtol=1e-12)
    assert rf.certify(flow).norms.max() < 0.98 * (1 + 1e-4)


def test_norms_follow_the_training(run):
    """After steps that grow the kernels the stored vectors still give the layers' norms, within 1 %."""
    trainer, _, states, _ = run
    flow = nnx.merge(trainer.graphdef, states[-1].params, states[-1].non_params)
    assert rf.certify(flow).norms.max() < 0.98 * 1.01


def test_lengths_are_fitted_to_what_was_seen(run):
    """The averaged term norms are those of the metrics; the fitted law is theirs, and the next step uses it."""
    _, step, states, metrics = run
    state = states[-1]
    weights = 0.99 ** np.arange(40)[::-1]
    norms = np.asarray([m["diagnostics"].term_norms for m in metrics])
    expected = np.tensordot(weights / weights.sum(), norms, 1)
    fitted = fit_estimator(state, 8)
    law = rf.fit_lengths(jnp.asarray(expected[:, 3:]), batch_size=8, fixed_cost=2 * (4 + 3))  # of half of the batch
    np.testing.assert_allclose(fitted.estimator.length.table, law.table, rtol=1e-10)
    before = fit_estimator(states[0], 8).estimator.length
    np.testing.assert_allclose(before.table[0], rf.Defensive(0.4).survival(jnp.arange(1, 14)), rtol=1e-12)
    certain = fitted.estimator.length.table.at[:].set(1e-30).at[1, :3].set(1.0)
    state = state._replace(estimator=rf.Roulette(rf.Fitted(certain), 0))
    assert step(state, IMAGES, KEY)[1]["diagnostics"].length.tolist() == [0, 3]
    for estimator in (rf.Exact(), rf.Roulette(exact_terms=16)):
        with pytest.raises(ValueError, match="estimator: expected Roulette, less than 16 exact_terms"):
            fit_estimator(state._replace(estimator=estimator), 8)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_step_lowers_for_accelerators(platform):
    """The whole step is exported for the platform, with convolution instructions and no host callback."""
    trainer, state = make(
        rf.ImageFlowConfig((8, 8, 1), blocks=(1, 2), hidden_channels=4, tail=rf.DenseTail(blocks=1, hidden=4))
    )
    exported = jax.export.export(jax.jit(trainer.step), platforms=[platform])(
        state, IMAGES.repeat(2, 1).repeat(2, 2), KEY
    )
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text
    assert "callback" not in text


def test_memory_of_a_block_is_what_it_keeps():
    """Blocks with 64 hidden channels add copies of input, w and parameters, if reversible only of their parameters.

    They add no hidden activations. They add no vectors of power iterations either, which have the size of one example's
    hidden activations.
    """

    def peak(blocks, reversible):
        of_one_kind = {"preactivation": "all", "between": rf.BetweenBlocks(first_actnorm=False)}  # one program
        config = rf.ImageFlowConfig((16, 16, 1), (blocks,), **of_one_kind, hidden_channels=64, tail=rf.DenseTail(0))
        flow = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
        if reversible:
            rf.make_reversible(flow)
        trainer = Trainer(nnx.split(flow)[0], dequantized_bits_per_dim(256), optax.adam(1e-3), 0.99)
        state = jax.eval_shape(lambda flow: trainer.create_state(flow, rf.Roulette()), flow)
        images = jax.ShapeDtypeStruct((64, 16, 16, 1), jnp.uint8)
        compiled = trainer.compiled_step().lower(state, images, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kept = 8 * 64 * 16 * 16  # x or w of a batch of 64, in float64
    parameters = 8 * 64 * (64 + 9 * 2)
    hidden = 64 * kept
    more = 48 - 16
    grown, grown_reversible = (peak(48, which) - peak(16, which) for which in (False, True))
    assert grown <= more * 4 * (kept + parameters)
    assert grown <= more * hidden / 10
    assert grown_reversible <= more * 4 * parameters


def test_average_of_bfloat16_parameters():
    """It is kept in float32, where a decay of 0.999 is not 1, and comes back in the dtype of the parameters."""
    flow = rf.Flow(rf.Affine((2,)), rf.StandardNormal((2,)))
    flow = jax.tree.map(lambda leaf: (leaf - 3).astype(jnp.bfloat16), flow)
    trainer = Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.0), ema_decay=0.999)
    with jax.numpy_dtype_promotion("standard"):
        state = trainer.create_state(flow, rf.Exact())
        step = jax.jit(trainer.step)
        for _ in range(20):
            state, _ = step(state, jnp.zeros((2, 2), jnp.bfloat16), KEY)
        averaged = trainer.averaged_flow(state)
    chex.assert_trees_all_equal(nnx.state(averaged, nnx.Param), nnx.state(flow, nnx.Param))
    assert averaged.bijector.shift.dtype == jnp.bfloat16
