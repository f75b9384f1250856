"""Checkpoints: the latest and the best survive, and restore bit for bit."""

import dataclasses
import resource
import threading
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import resflow_jax as rf
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.step import TrainState

ROULETTE = rf.Roulette()
TABLE = jnp.asarray([[0.5, 0.1], [0.2, 0.2]])


# A certificate of a flow whose blocks are not all certified: it has values that JSON cannot express.
LAYER = rf.LayerCertificate(norm=1.2, coefficient=0.9, domain=2.0, codomain=np.inf)
BLOCK = rf.BlockCertificate(
    bound=1.2, target_bound=0.9, order=2.0, lipschitz=2.2, inverse_lipschitz=np.inf, layers=(LAYER,)
)
CERTIFICATE = rf.Certificate((BLOCK,), lipschitz=2.2, inverse_lipschitz=np.inf)
FIELDS = dataclasses.fields(rf.Certificate)


def state(step, estimator=ROULETTE, w=None):
    params = {"w": jnp.full((3,), float(step))}
    average = optax.ema(0.9).init(params)
    optimizer = optax.adam(1e-3).init(params)
    return TrainState(jnp.asarray(step), params if w is None else {"w": w}, {}, optimizer, average, estimator, average)


@pytest.mark.parametrize(
    "estimator", [rf.Exact(), rf.Roulette(), rf.Roulette(rf.Fitted(TABLE))], ids=["exact", "roulette", "fitted"]
)
def test_keeps_the_latest_and_the_best(tmp_path, estimator):
    """Of five checkpoints the one with the lowest bits/dim, which no NaN is, and the newest two are kept, exactly."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        for step, value in [(1, 3.0), (2, np.float32(1.0)), (3, np.nan), (4, jnp.asarray(2.5)), (5, 2.2)]:
            certificate = dataclasses.replace(CERTIFICATE, lipschitz=float(step))
            checkpoints.save(state(step, estimator), value, certificate)
        checkpoints.wait()
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, 2)
    with Checkpoints(tmp_path / "checkpoints") as again:
        assert (again.latest_step, again.best_step) == (5, 2)
        for step in (2, 4, 5):
            restored = again.restore(step, jax.tree.map(jnp.zeros_like, state(0, estimator)))
            chex.assert_trees_all_equal(restored, state(step, estimator))
            certificate = again.certificate(step)
            assert certificate["is_certified"] is False and certificate["lipschitz"] == step
            assert certificate["inverse_lipschitz"] == np.inf
            (block,) = certificate["blocks"]
            assert (block["bound"], block["target_bound"], block["inverse_lipschitz"]) == (1.2, 0.9, np.inf)
            assert block["layers"] == [{"norm": 1.2, "coefficient": 0.9, "domain": 2.0, "codomain": np.inf}]
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "4", "5"}


class FormerState(NamedTuple):
    """A `TrainState` as it was when `non_params` was called `rest`."""

    step: Any
    params: Any
    rest: Any
    opt_state: Any
    ema: Any
    estimator: Any
    term_norms: Any


FORMER = {"bijector": {"deviation": jnp.asarray([2.0, 3.0]), "center": jnp.asarray([4.0, 5.0])}}
PRESENT = {"bijector": {"std": FORMER["bijector"]["deviation"], "center": FORMER["bijector"]["center"]}}


@pytest.mark.parametrize(("former", "present"), [(FORMER, PRESENT), ({}, {})], ids=["arrays", "none"])
def test_states_with_former_names(tmp_path, former, present):
    """`rest` is `non_params` now, and a `deviation` an `std`; whole or on devices every value is the same."""
    expected = state(1)._replace(non_params=present)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(FormerState(*state(1)._replace(non_params=former)))
        checkpoints.wait()
        like = jax.tree.map(jnp.zeros_like, expected)
        chex.assert_trees_all_equal(checkpoints.restore(1, like), expected)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, expected)
        chex.assert_trees_all_equal(checkpoints.restore(1, like, shardings), expected)


def test_states_of_another_flow_with_former_names(tmp_path):
    """The error names arrays that are only in the file or only expected, and a wrong shape."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(FormerState(*state(1)._replace(non_params=FORMER)))
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"state: .* got others: rest.bijector.center, rest.bijector.shift$"):
            arrays = {"std": jnp.zeros(2), "shift": jnp.zeros(2)}
            checkpoints.restore(1, state(0)._replace(non_params={"bijector": arrays}))
        with pytest.raises(ValueError, match=r"state: expected rest.bijector.std of shape \(1,\), got \(2,\)"):
            arrays = {"std": jnp.zeros(1), "center": jnp.zeros(2)}
            checkpoints.restore(1, state(0)._replace(non_params={"bijector": arrays}))


def test_states_of_another_flow(tmp_path):
    """Whole or on devices the error names the array whose shape differs, as for a flow of fewer blocks."""
    saved, other = state(1, w=jnp.zeros((16, 2))), state(0, w=jnp.zeros((4, 2)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved)
        checkpoints.wait()
        for shardings in (None, jax.tree.map(lambda leaf: leaf.sharding, other)):
            with pytest.raises(ValueError, match=r"^state: expected params.w of shape \(4, 2\), got \(16, 2\)$"):
                checkpoints.restore(1, other, shardings)


def test_certificates_of_before_target_bounds(tmp_path):
    """A block's `target_bound` was called `promised`; the same step once more is then still no loss."""
    old = CERTIFICATE.as_dict()
    old["blocks"] = [{"promised": block.pop("target_bound"), **block} for block in old["blocks"]]
    assert old["blocks"][0]["promised"] == 0.9

    class Old(rf.Certificate):
        def as_dict(self):
            return old

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), 3.0, Old(**{f.name: getattr(CERTIFICATE, f.name) for f in FIELDS}))
        checkpoints.wait()
        certificate = checkpoints.certificate(1)
        assert certificate["blocks"][0]["target_bound"] == 0.9 and "promised" not in certificate["blocks"][0]
        checkpoints.save(state(1), 3.0, CERTIFICATE)


def test_what_cannot_be_written_says_where(tmp_path, monkeypatch):
    """Every exception of a full disk becomes one error that names the directory; other checkpoints stay intact."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1, rf.Roulette()), 3.0)
        checkpoints.wait()

        def full(*arguments, **options):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(OSError, match=rf"checkpoints: could not write to {tmp_path}; earlier ones.*No space left"):
            checkpoints.save(state(2, rf.Roulette()), 2.0)
        assert int(checkpoints.restore(1, state(0, rf.Roulette())).step) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes that orbax gives up
def test_files_that_are_too_large(tmp_path):
    """The next call raises the error of a background write; earlier checkpoints stay intact.

    The latest and the best step remain known, as they are on disk.
    """
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), 3.0)
        checkpoints.wait()
        large = state(2, w=jax.random.normal(jax.random.key(0), (20_000,)))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(OSError, match=f"could not write to {tmp_path}; .*File too large"):
                checkpoints.save(large, 2.0)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (checkpoints.latest_step, checkpoints.best_step) == (1, 1)
        chex.assert_trees_all_equal(checkpoints.restore(1, state(0)), state(1))
        checkpoints.save(large, 2.0)
        checkpoints.wait()
        assert (checkpoints.latest_step, checkpoints.best_step) == (2, 2)


def test_a_directory_that_has_become_a_file(tmp_path):
    """Python's own errors are named alike."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").write_text("mine")
        with pytest.raises(OSError, match=r"checkpoints: could not write to .*Not a directory"):
            checkpoints.save(state(1))
    assert (tmp_path / "checkpoints").read_text() == "mine"
    assert not [thread for thread in threading.enumerate() if "Signal" in type(thread).__name__], "threads that wait"


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division"),
        ValueError("w: expected floats"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),  # of a device
    ],
    ids=repr,
)
def test_other_errors_come_as_they_are(tmp_path, monkeypatch, error):
    """Bugs and errors of a device are not reported as errors of files."""

    def fail(*arguments, **options):
        raise error

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", fail)
        with pytest.raises(type(error)) as caught:
            checkpoints.save(state(1))
        assert caught.value is error


def test_an_error_of_the_background_comes_as_it_is(tmp_path, monkeypatch):
    """Parse errors of tensorstore are not reported as errors of files; earlier checkpoints remain known."""
    monkeypatch.setattr(jnp, "copy", lambda leaf: leaf)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), 3.0)
        checkpoints.wait()
        checkpoints.save(state(2, w=np.array([object()])), 2.0)
        with pytest.raises(ValueError, match='Unsupported data type: "object"'):
            checkpoints.wait()
        assert (checkpoints.latest_step, checkpoints.best_step) == (1, 1)


def test_a_step_that_is_saved_already(tmp_path):
    """The same once more is no loss, written by another process or still being written; NaN is NaN."""
    same = state(3, rf.Roulette(rf.Fitted(TABLE)), w=jnp.asarray([1.0, jnp.nan, jnp.inf]))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(same, 3.0, CERTIFICATE)
        checkpoints.save(same, 3.0, CERTIFICATE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(same, 3.0, CERTIFICATE)
        checkpoints.save(same)
        assert checkpoints.latest_step == checkpoints.best_step == 3


def test_what_would_not_be_saved_is_an_error(tmp_path):
    """Each kind of difference from what the checkpoint of the step holds, and steps that are not the newest."""
    first, new = state(3, rf.Exact()), dataclasses.replace(CERTIFICATE, lipschitz=9.0)
    renamed = first._replace(params={"v": first.params["w"]})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(first, 3.0)
        checkpoints.wait()
        for other, loss, certificate, name in [
            (first, 2.0, None, "loss"),
            (first, 3.0, new, "certificate"),
            (first._replace(params={"w": jnp.zeros(3)}), 3.0, None, "state"),
            (first._replace(params={"w": jnp.full(3, 3.0, jnp.float32)}), 3.0, None, "state"),
            (first._replace(params={"w": jnp.full(4, 3.0)}), 3.0, None, "state"),
            (renamed, 3.0, None, "state"),
            (renamed, 2.0, new, "loss and certificate and state"),
        ]:
            with pytest.raises(ValueError, match=f"state: expected .* step 3 .*, got another {name}: not saved"):
                checkpoints.save(other, loss, certificate)
        with pytest.raises(ValueError, match="expected a step after 3, the newest checkpoint, got 2: not saved"):
            checkpoints.save(state(2, rf.Exact()), 1.0)
        chex.assert_trees_all_equal(checkpoints.restore(3, first), first)
        assert checkpoints.best_step == 3


def test_a_step_that_orbax_skips_for_another_reason(tmp_path, monkeypatch):
    """An error says that there is no checkpoint of that step."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), 3.0)
        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.should_save", lambda self, step: False)
        with pytest.raises(ValueError, match="expected a step after 1, the newest checkpoint, got 2: not saved"):
            checkpoints.save(state(2), 2.0)
