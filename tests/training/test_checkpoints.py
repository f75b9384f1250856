"""Checkpoints: the latest and the best survive, and restore bit for bit."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import resflow_jax as rf
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.step import TrainState

TABLE = jnp.asarray([[0.5, 0.1], [0.2, 0.2]])


# As of a flow whose blocks are not all certified: with what JSON has no numbers for.
LAYER = rf.LayerCertificate(norm=1.2, coefficient=0.9, domain=2.0, codomain=np.inf)
BLOCK = rf.BlockCertificate(
    bound=1.2, promised=0.9, order=2.0, lipschitz=2.2, inverse_lipschitz=np.inf, layers=(LAYER,)
)
CERTIFICATE = rf.Certificate((BLOCK,), lipschitz=2.2, inverse_lipschitz=np.inf)


def state(step, estimator):
    params = {"w": jnp.full((3,), float(step))}
    average = optax.ema(0.9).init(params)
    return TrainState(jnp.asarray(step), params, {}, optax.adam(1e-3).init(params), average, estimator, average)


@pytest.mark.parametrize(
    "estimator", [rf.Exact(), rf.Roulette(), rf.Roulette(rf.Fitted(TABLE))], ids=["exact", "roulette", "fitted"]
)
def test_keeps_the_latest_and_the_best(tmp_path, estimator):
    """Of four checkpoints the one with the lowest bits/dim and the newest stay, and restore exactly."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        for step, value in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)]:
            certificate = dataclasses.replace(CERTIFICATE, lipschitz=float(step))
            checkpoints.save(state(step, estimator), value, certificate)
        checkpoints.wait()
        assert (checkpoints.latest_step, checkpoints.best_step) == (4, 2)
    with Checkpoints(tmp_path / "checkpoints") as again:
        assert (again.latest_step, again.best_step) == (4, 2)
        for step in (2, 4):
            restored = again.restore(step, jax.tree.map(jnp.zeros_like, state(0, estimator)))
            chex.assert_trees_all_equal(restored, state(step, estimator))
            certificate = again.certificate(step)
            assert certificate["is_certified"] is False and certificate["lipschitz"] == step
            assert certificate["inverse_lipschitz"] == np.inf
            (block,) = certificate["blocks"]
            assert (block["bound"], block["promised"], block["inverse_lipschitz"]) == (1.2, 0.9, np.inf)
            assert block["layers"] == [{"norm": 1.2, "coefficient": 0.9, "domain": 2.0, "codomain": np.inf}]
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "4"}


def test_what_cannot_be_written_says_where(tmp_path, monkeypatch):
    """Whatever the library raises on a full disk comes as one error that names the directory; others stay whole."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1, rf.Roulette()), 3.0)
        checkpoints.wait()

        def full(*arguments, **options):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(OSError, match=rf"checkpoints: could not write to {tmp_path}; those before.*No space left"):
            checkpoints.save(state(2, rf.Roulette()), 2.0)
        assert int(checkpoints.restore(1, state(0, rf.Roulette())).step) == 1
