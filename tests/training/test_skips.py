"""Updates that are not finite are skipped: the state stays, the steps are counted, and training ends in time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.training.loop import run_steps
from resflow_jax.training.losses import negative_log_likelihood
from resflow_jax.training.step import Trainer
from tests.training.test_parallel import LAYOUTS

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 2))
BAD = np.where(np.arange(8)[:, None] == 5, np.nan, X)  # one example of eight
FLOW = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
TRAINER = Trainer(nnx.graphdef(FLOW), negative_log_likelihood(), optax.adam(1e-2), ema_decay=0.9)


def after(step, start, batches):
    """The states after each batch."""
    states = [jax.tree.map(jnp.copy, start)]
    for batch in batches:
        states.append(step(jax.tree.map(jnp.copy, states[-1]), batch, KEY)[0])
    return states


def test_a_skipped_update_leaves_the_state():
    """Everything but the number of steps: weights, moments, averages, power iterations, fitted lengths."""
    step = TRAINER.compiled_step()
    one, two, three = after(step, TRAINER.create_state(FLOW, rf.Exact()), [X, BAD])
    assert int(three.step) == 2
    chex.assert_trees_all_equal(three._replace(step=two.step), two)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True))


def test_finite_updates_are_made_as_before():
    """Bit for bit those of the three parts of a step without a choice."""

    def plain(state, batch, key):
        found = TRAINER.gradient(state, batch, key)
        return TRAINER.advance_norms(TRAINER.update(state, found)), found.metrics()

    start = TRAINER.create_state(FLOW, rf.Exact())
    expected, found = (after(step, start, [X, X])[-1] for step in (jax.jit(plain), TRAINER.compiled_step()))
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_devices_skip(layout):
    """With accumulation, where one of eight devices alone has a bad example in one of two batches."""
    strategy, sizes, parameters = LAYOUTS[layout]
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(16, 32)), rngs=nnx.Rngs(0))  # divisible
    trainer = TRAINER._replace(graphdef=nnx.graphdef(flow), accumulate=2)
    placement = rf.training.Placement(trainer, rf.training.make_mesh(**sizes), strategy, parameters)
    start = trainer.create_state(flow, rf.Exact())
    state, metrics = placement.step(placement.place(start), placement.place_batch(np.stack([X, BAD])), KEY)
    assert np.isnan(metrics["loss"])
    found = placement.to_host(placement.to_checkpoint(state))
    assert int(found.step) == 2
    chex.assert_trees_all_equal(found._replace(step=start.step), start)
    state, metrics = placement.step(state, placement.place_batch(np.stack([X, X])), KEY)
    found = placement.to_host(placement.to_checkpoint(state))
    assert np.isfinite(metrics["loss"]) and int(found.step) == 4 and int(found.ema.count) == 1


def fake(losses):
    """A step whose losses are given."""

    def step(state, batch, key):
        loss = losses[state]
        diagnostics = Diagnostics(*[np.zeros(1)] * len(Diagnostics._fields))
        return state + 1, {"loss": np.float64(loss), "gradient_norm": np.float64(1.0), "diagnostics": diagnostics}

    return step


def pauses(losses, **options):
    batches = iter(lambda: None, 1)
    options = {"pauses_at": lambda step: step % 3 == 0, "show_progress": False, **options}
    return list(run_steps(fake(losses), 0, batches, KEY, last=len(losses), **options))


def test_the_loop_tells_which_updates_were_skipped():
    """Means are those of the others; a row goes on over pauses, and ends with a finite update."""
    nan, inf = float("nan"), float("inf")
    first, second, third = pauses([1.0, nan, 3.0, 5.0, nan, inf, nan, 4.0, 8.0])
    assert first.metrics["loss"] == 2.0 and [(one.step, one.gradient_norm) for one in first.skipped] == [(2, 1.0)]
    assert second.metrics["loss"] == 5.0 and [one.step for one in second.skipped] == [5, 6] and second.row == 2
    assert third.metrics["loss"] == 6.0 and third.row == 0 and [one.step for one in third.skipped] == [7]
    (empty,) = pauses([nan, nan, nan, 1.0], pauses_at=lambda step: step == 3)[:1]
    assert np.isnan(empty.metrics["loss"]) and empty.row == 3


def test_updates_that_end_where_the_run_does():
    """A number of steps that is no multiple of an update's is refused: the loop would end without its last pause."""
    assert [at.step for at in pauses([1.0] * 6, first=2, together=2)] == [6]
    with pytest.raises(ValueError, match=r"^last: expected 1 and a multiple of 2, the steps of an update, got 6"):
        pauses([1.0] * 6, first=1, together=2)


@pytest.mark.parametrize(
    ("losses", "skips", "steps"),
    [([1.0] + [np.nan] * 5, 5, "2 and 6"), ([1.0, 1.0] + [np.nan] * 7, 4, "3 and 6"), ([np.nan] * 3, 10, "1 and 3")],
)
def test_too_many_in_a_row(losses, skips, steps):
    """At the pause where there are as many, over pauses; and at the end, if nothing else has come since the pause."""
    with pytest.raises(FloatingPointError, match=rf"training diverged between steps {steps}: loss nan, .* in a row"):
        pauses(losses, skips=skips)


def test_fit_goes_on_after_a_bad_batch():
    """Two batches of an epoch have a gradient that overflows; the weights are those of the others, and finite."""
    x = np.concatenate([X] * 4)
    x[3] = 1e160  # its square overflows
    options = {"batch_size": 4, "steps": 24, "initialize": False, "progress": False}
    flow, history = rf.fit(FLOW, x, validation=X, validate_every=8, **options)
    assert history.ended == "steps" and np.isfinite(history.train).all() and np.isfinite(history.validation).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param)))
    with pytest.raises(rf.FitDivergedError, match=r"steps 1 and \d+: .* updates in a row were skipped"):
        rf.fit(FLOW, X * 1e160, validation=None, **options)
