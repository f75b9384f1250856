"""`fit` trains like a loop of one's own, and returns the weights that the validation examples choose."""

import json
import signal
import sys
from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from sklearn.datasets import load_iris

import resflow_jax as rf
from resflow_jax.data.embedded import load_digits
from resflow_jax.training import make_mesh
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.examples import Examples, row_numbers, split_validation
from resflow_jax.training.loop import has_stopped_improving
from tests.compilations import compilations
from tests.io.flows import conditional_flow

TABLE = load_iris().data[:, :2]  # [150, 2]
FLOW = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
EXACT = {"estimator": rf.Exact(), "progress": False}


def copied(tree):
    return jax.tree.map(np.array, tree)


def test_equals_a_loop_of_ones_own():
    """To rounding: the mean gradient of all examples, Adam, norms; the averaged weights, converged and tightened."""
    before = copied(nnx.state(FLOW))
    optimizer = optax.adam(0.02)
    fitted, history = rf.fit(FLOW, TABLE, validation=None, steps=5, optimizer=optimizer, ema=0.8, key=3, **EXACT)
    chex.assert_trees_all_equal(copied(nnx.state(FLOW)), before)  # the given flow stays as it is

    flow, x = nnx.clone(FLOW), jnp.asarray(TABLE)
    flow.initialize(x)
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)

    @jax.jit
    def step(params, rest, opt_state):
        def loss(params):
            return -jnp.mean(nnx.merge(graphdef, params, rest, copy=True).log_prob(x, estimator=rf.Exact()))

        value, gradient = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state)
        flow = nnx.merge(graphdef, optax.apply_updates(params, updates), rest, copy=True)
        flow.update_norms()
        return *nnx.split(flow, nnx.Param, ...)[1:], opt_state, value

    opt_state, losses, average = optimizer.init(params), [], jax.tree.map(jnp.zeros_like, params)
    for _ in range(5):
        params, rest, opt_state, value = step(params, rest, opt_state)
        losses.append(float(value))
        average = jax.tree.map(lambda mean, new: 0.8 * mean + 0.2 * new, average, params)
    flow = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf / (1 - 0.8**5), average), rest)
    flow.converge_norms()
    flow.tighten()

    np.testing.assert_allclose(history.train, losses, rtol=1e-9)
    chex.assert_trees_all_close(nnx.state(fitted, nnx.Param), nnx.state(flow, nnx.Param), rtol=1e-6, atol=1e-8)
    assert rf.certify(fitted).is_certified
    assert history.validation is None and history.best_step == 5 and history.ended == "steps"


@pytest.fixture(scope="module")
def run():
    """A run whose validation loss goes up and down: its result, the callback's arguments, copies of flow states."""
    seen, states, train, validation = [], [], TABLE[::2], TABLE[1::2]

    def callback(progress):
        seen.append(progress)
        states.append(copied(nnx.state(progress.flow)))
        return seen  # is true, but not True

    options = {"optimizer": optax.adam(0.1), "steps": 60, "batch_size": 16, "patience": 4, "validate_every": 2}
    found = rf.fit(FLOW, train, validation=validation, callback=callback, key=jax.random.key(1), **options, **EXACT)
    return found, seen, states, validation


def test_the_best_weights_by_validation(run):
    """The returned weights are those of the least validation loss."""
    (fitted, history), seen, states, validation = run
    best = int(np.argmin(history.validation))
    assert 0 < best < len(history.step) - 1, "a run that has its best in the midst"
    assert history.best_step == history.step[best]
    for progress, state, loss in zip(seen, states, history.validation, strict=True):
        flow = nnx.merge(nnx.graphdef(FLOW), state)
        np.testing.assert_allclose(loss, -vector_log_prob(flow, validation, jax.random.key(0)).mean(), rtol=1e-12)
        assert progress.validation == loss
        chex.assert_trees_all_equal(copied(nnx.state(progress.flow)), state)  # training leaves it alone
    expected = nnx.merge(nnx.graphdef(FLOW), states[best])
    expected.tighten()
    chex.assert_trees_all_close(nnx.state(fitted), nnx.state(expected), rtol=1e-12)


def test_early_stopping(run):
    """Training ends once four validations have not improved on those before, at once."""
    (_, history), seen, _, _ = run
    assert history.ended == "patience"
    best = int(np.argmin(history.validation))
    assert len(history.step) == best + 5 == len(seen)
    np.testing.assert_array_equal(history.step, 2 * np.arange(1, best + 6))


def test_patience():
    """Patience ends when the last losses are no better than the best one before."""
    assert has_stopped_improving([3.0, 2.0, 2.5, 2.0], 2)
    assert not has_stopped_improving([3.0, 2.0, 2.5], 2)
    assert not has_stopped_improving([3.0, 2.0, 2.5, 1.9], 2)
    assert not has_stopped_improving([3.0], 1) and not has_stopped_improving([1.0, 2.0, 3.0], None)


def test_history(run):
    """The result prints its main figures and converts to JSON."""
    (_, history), seen, _, _ = run
    assert f"ended by patience; best at step {history.best_step}: train" in repr(history)
    found = json.loads(json.dumps(history.as_dict()))
    np.testing.assert_array_equal(found["train"], [progress.train for progress in seen])
    assert found["ended"] == "patience" and found["event_shape"] == [2]
    assert history.train_bits_per_dim is None and (np.diff(history.seconds) > 0).all()
    assert str(seen[0]) == f"train {seen[0].train:.3f}, validation {seen[0].validation:.3f} nats"


def test_the_key_decides_all():
    """The same key gives the same numbers, and compiles the step alone, once; an integer is its key."""
    options = {"steps": 7, "validate_every": 3, "batch_size": 32} | EXACT
    flow, history = rf.fit(FLOW, TABLE.astype(np.float32), key=5, **options)
    with compilations() as programs:
        again, history_again = rf.fit(FLOW, jnp.asarray(TABLE, jnp.float32), key=jax.random.key(5), **options)
    assert len(programs) <= 3, "the step, and what differs by the argument's dtype"
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(flow))
    np.testing.assert_array_equal(history.validation, history_again.validation)
    np.testing.assert_array_equal(history.step, [3, 6, 7])
    _, other = rf.fit(FLOW, TABLE.astype(np.float32), key=6, **options)
    assert (other.train != history.train).all()


def test_goes_on_from_a_trained_flow():
    """A flow that has been initialised is not initialised again, unless that is asked for."""
    options = {"steps": 1, "validation": None, "learning_rate": 1e-12} | EXACT
    flow, history = rf.fit(FLOW, TABLE, **options)
    assert abs(history.train[0] - -np.mean(flow.log_prob(TABLE, estimator=rf.Exact()))) < 1e-6
    moved = rf.fit(flow, TABLE + 1, **options)
    expected = -np.mean(flow.log_prob(TABLE + 1, estimator=rf.Exact()))
    np.testing.assert_allclose(moved.history.train, expected, rtol=1e-6)
    again = rf.fit(flow, TABLE + 1, initialize=True, **options)
    np.testing.assert_allclose(again.history.train, history.train, rtol=1e-6)


def test_conditional():
    """Pairs stay together in training and validation: the condition determines the place of x."""
    rng = np.random.default_rng(0)
    condition = rng.normal(size=(200, 2))
    x = np.concatenate([condition, condition[:, :1]], axis=1) + 0.1 * rng.normal(size=(200, 3))
    flow = conditional_flow(nnx.Rngs(0))
    held_out = {"validation": (x[:50], condition[:50])}
    found = rf.fit(flow, x[50:], condition=condition[50:], steps=60, learning_rate=0.05, **held_out, **EXACT)
    assert found.history.validation.min() < found.history.validation[0] - 0.2
    own = -np.mean(found.flow.log_prob(x[:50], condition=condition[:50], estimator=rf.Exact()))
    np.testing.assert_allclose(found.history.validation.min(), own, rtol=1e-2)
    assert own < -np.mean(found.flow.log_prob(x[:50], condition=condition[:50][::-1], estimator=rf.Exact()))


def test_images():
    """Integer images are dequantised; the history is in nats and in bits/dim, which evaluation confirms."""
    images = load_digits().train[:80, 2:6, 2:6]
    config = rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, kernels=(1, 1), tail=rf.DenseTail(0))
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    options = {"levels": 17, "steps": 4, "batch_size": 20, "validate_every": 2, "progress": False}
    fitted, history = rf.fit(flow, images[:60], validation=images[60:], **options)
    bits = rf.evaluate_bits_per_dim(fitted, images[60:], jax.random.key(0), levels=17, estimator=rf.Exact())
    best = history.validation_bits_per_dim[history.step == history.best_step]
    assert abs(best[0] - bits.mean) < 5 * bits.noise_stderr + 0.01
    nats = 16 * np.log(2) * (history.train_bits_per_dim - np.log2(17))
    np.testing.assert_allclose(history.train, nats, rtol=1e-9)
    with pytest.raises(ValueError, match=r"x: expected pixels in 0..2, got 0..1"):
        rf.fit(flow, images, **options | {"levels": 3})
    with pytest.raises(ValueError, match=r"x: expected a float array \[B, 4, 4, 1\], got dtype uint8; dequantise"):
        rf.fit(flow, images, **options | {"levels": None})


def test_many_devices():
    """Two devices that share the batches give the result of one."""
    options = {"steps": 3, "batch_size": 20, "validation": TABLE[:11]} | EXACT
    one = rf.fit(FLOW, TABLE[11:], **options)
    for mesh in (make_mesh(devices=jax.devices()[:2]), Mesh(np.array(jax.devices()[:2]), ("data",))):
        two = rf.fit(FLOW, TABLE[11:], mesh=mesh, **options)
        params = (nnx.state(result.flow, nnx.Param) for result in (two, one))
        chex.assert_trees_all_close(*params, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(two.history.validation, one.history.validation, rtol=1e-9)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 2"):
        rf.fit(FLOW, TABLE, mesh=make_mesh(devices=jax.devices()[:2]), batch_size=3, progress=False)


def test_divergence():
    """The error names the step, and has the best weights so far."""
    rates = optax.piecewise_constant_schedule(1e-3, {2: 1e300})
    with pytest.raises(rf.FitDivergedError, match=r"diverged between steps .* has the weights of step 2") as caught:
        rf.fit(FLOW, TABLE, optimizer=optax.sgd(rates), steps=9, validate_every=2, **EXACT)
    flow, history = caught.value.result
    assert history.ended == "diverged" and history.step.tolist() == [2]
    assert np.isfinite(flow.log_prob(TABLE, estimator=rf.Exact())).all()
    far = np.full((2, 2), 1e200)
    message = r"the loss of the validation examples is inf\. error.result has the weights before training"
    with pytest.raises(rf.FitDivergedError, match=message) as caught:
        rf.fit(FLOW, TABLE, validation=far, steps=1, **EXACT)
    flow, history = caught.value.result
    assert repr(history) == "History(no validation point, ended: diverged)"
    np.testing.assert_allclose(flow.bijector.bijectors[0].center, TABLE.mean(0))  # initialised


def test_errors_of_a_callback():
    """They come as they are: a FloatingPointError of the user tells nothing of the training."""

    def fail(progress):
        raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match=r"^mine$") as caught:
        rf.fit(FLOW, TABLE, steps=2, validation=None, callback=fail, **EXACT)
    assert type(caught.value) is FloatingPointError


def test_a_last_update_that_is_skipped():
    """What was trained before it is returned, also without validation."""
    x = TABLE.copy()
    x[5] = 1e200  # the batch with this row is skipped
    for key in range(4):
        options = {"steps": 4, "batch_size": 32, "validation": None, "validate_every": 4, "key": key} | EXACT
        flow, history = rf.fit(FLOW, x, initialize=False, **options)
        assert history.step.tolist() == [4] and history.best_step == 4
        before, after = (jax.tree.leaves(nnx.state(f, nnx.Param)) for f in (FLOW, flow))
        assert any(np.any(a != b) for a, b in zip(before, after, strict=True))
        assert all(np.isfinite(leaf).all() for leaf in after)


@pytest.mark.parametrize("mesh", [None, 1])
def test_an_interruption_before_the_first_update_is_made(monkeypatch, mesh):
    """The weights before training are returned: their moving average has not begun."""
    x = np.concatenate([TABLE, [[1e200, 0]]])  # every batch is skipped
    mesh = mesh and make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(
        sys.modules["resflow_jax.training.fit"], "deferred_signals", lambda *_: nullcontext(lambda: True)
    )
    options = {"initialize": False, "batch_size": 151, "steps": 9, "ema": 0.9, "validation": None, "mesh": mesh}
    flow, history = rf.fit(FLOW, x, **options, **EXACT)
    assert history.ended == "interrupted"
    kept, before = (nnx.state(f, nnx.Param) for f in (flow, FLOW))
    chex.assert_trees_all_close(kept, before, rtol=0.01)  # tightened


def test_interruption(capsys, monkeypatch):
    """After Ctrl-C the step ends, and the result is returned, tightened; a callback can ask for the same.

    Nothing else is printed.
    """
    handler, tightened = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(rf.Flow, "tighten", lambda self: tightened.append(self))
    options = {"steps": 50, "validate_every": 2, "validation": None} | EXACT

    def interrupt(progress):
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    flow, history = rf.fit(FLOW, TABLE, callback=interrupt, **options)
    assert len(tightened) == 1 and tightened[0] is flow
    assert history.ended == "interrupted" and history.step.tolist() == [2, 4, 5] and history.best_step == 5
    assert signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr().out == "stopping after this step; once more to stop at once\n"
    _, history = rf.fit(FLOW, TABLE, callback=lambda progress: progress.step == 4, **options)
    assert history.ended == "callback" and history.step.tolist() == [2, 4]
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_progress_bar(capsys):
    """Progress is shown on stderr, with the losses."""
    rf.fit(FLOW, TABLE, estimator=rf.Exact(), steps=2, validate_every=1)
    printed = capsys.readouterr()
    assert printed.out == "" and "2/2" in printed.err and "validation" in printed.err and "nats" in printed.err


def test_rows():
    """All batches have one size; every epoch has every number once."""
    batches = row_numbers(10, 4, np.random.default_rng(0))
    rows = np.concatenate([next(batches) for _ in range(10)])
    epochs = rows.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (4, 1)))
    assert (epochs[0] != epochs[1]).any()


def test_division():
    """A fraction of the examples, with their conditions, is held out; the rest is trained on."""
    examples = Examples(jnp.arange(20.0).reshape(10, 2), jnp.arange(10.0))
    train, held_out = split_validation(FLOW, examples, 0.3, None, np.random.default_rng(0))
    assert train.number == 7 and held_out.number == 3
    for part in (train, held_out):
        np.testing.assert_array_equal(part.x[:, 0], 2 * part.condition)
    both = np.concatenate([train.condition, held_out.condition])
    np.testing.assert_array_equal(np.sort(both), np.arange(10))
    assert split_validation(FLOW, examples, None, None, np.random.default_rng(0)) == (examples, None)


BAD = {
    "flow: expected Flow, got str": {"flow": "flow"},
    "x: expected a float array [B, 2], got dtype int64; pass x.astype": {"x": np.zeros((9, 2), int)},
    "x: expected a float array [B, 2], got shape (9, 3)": {"x": np.zeros((9, 3))},
    "x: expected a float array [B, 2], got list; pass jnp.asarray(x)": {"x": [[0.0, 1.0]]},
    "x: expected finite values, got 1": {"x": np.array([[0.0, np.nan], [1.0, 2.0], [1.0, 2.0]])},
    "x: expected at least 2 examples to train on, got 1": {"x": np.zeros((1, 2)), "validation": None},
    "condition: expected None": {"condition": np.zeros((150, 2))},
    "key: expected a PRNG key": {"key": 0.5},
    "validation: expected a share in (0, 1) of 150 examples": {"validation": 1.5},
    "validation: x: expected a float array [B, 2], got shape (4, 3)": {"validation": np.zeros((4, 3))},
    "validation: condition: expected None": {"validation": (np.zeros((4, 2)), np.zeros((4, 1)))},
    "validation: expected examples x, or a pair (x, condition), got 3 parts": {"validation": (TABLE, TABLE, TABLE)},
    "steps: expected an integer of at least 1, got 0": {"steps": 0},
    "epochs: expected None together with steps=3, got 2": {"steps": 3, "epochs": 2},
    "epochs: expected a positive number, got -1": {"epochs": -1},
    "epochs: expected a finite number, got inf": {"epochs": np.inf},
    "batch_size: expected an integer of at least 1, got 1.5": {"batch_size": 1.5},
    "batch_size: expected at most 135, the number of training examples, got 136": {"batch_size": 136},
    "learning_rate: expected None together with an optimizer, got 0.1": {
        "learning_rate": 0.1,
        "optimizer": optax.sgd(0.1),
    },
    "learning_rate: expected a positive number, got 0": {"learning_rate": 0},
    "learning_rate: expected a number or an optax schedule, got str": {"learning_rate": "fast"},
    "optimizer: expected GradientTransformation, got float": {"optimizer": 0.1},
    "estimator: expected": {"estimator": "exact"},
    "evaluation_estimator: expected": {"evaluation_estimator": "exact"},
    "ema: expected a number in (0, 1), got 1": {"ema": 1},
    "patience: expected an integer of at least 1, got 0": {"patience": 0},
    "validate_every: expected an integer of at least 1, got 0": {"validate_every": 0},
    "initialize: expected bool, got str": {"initialize": "yes"},
    "levels: expected an integer of at least 1, got 0": {"levels": 0},
    "mesh: expected Mesh, got int": {"mesh": 2},
    "progress: expected bool, got int": {"progress": 1},
    "callback: expected a function, got int": {"callback": 1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    """The error names the argument, what was expected and what came; before anything is compiled."""
    with pytest.raises(ValueError) as caught:
        rf.fit(**{"flow": FLOW, "x": TABLE, "progress": False} | BAD[message])
    assert str(caught.value).startswith(message)
