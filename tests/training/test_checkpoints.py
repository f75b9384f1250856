"""Checkpoints: the latest and the best survive, and restore bit for bit."""

import chex
import jax.numpy as jnp
import optax

from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.step import TrainState


def state(step):
    params = {"w": jnp.full((3,), float(step))}
    return TrainState(jnp.asarray(step), params, {}, optax.adam(1e-3).init(params), optax.ema(0.9).init(params))


def test_keeps_the_latest_and_the_best(tmp_path):
    """Of four checkpoints the one with the lowest bits/dim and the newest stay, and restore exactly."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        for step, value in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)]:
            checkpoints.save(state(step), value)
        checkpoints.wait()
        assert (checkpoints.latest_step, checkpoints.best_step) == (4, 2)
    with Checkpoints(tmp_path / "checkpoints") as again:
        assert (again.latest_step, again.best_step) == (4, 2)
        for step in (2, 4):
            restored = again.restore(step, state(0))
            chex.assert_trees_all_equal(restored, state(step))
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "4"}
