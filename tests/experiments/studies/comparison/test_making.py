"""Small jobs with our own models, in this process: what a run measures, what a candidate does not."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs.base import OptimizerConfig
from experiments.studies.comparison import making
from experiments.studies.comparison.flax_contender import optimizer_of
from experiments.studies.comparison.jobs import Job
from experiments.studies.comparison.jobs import found as found_result
from experiments.studies.comparison.making import contender_of, made
from experiments.studies.comparison.measures import sampling
from experiments.studies.comparison.running import cores, run_all
from resflow_jax.training.step import optax_promotion

RUN = Job("moons", "residual", 0, 0.01, 1.0, 1e-2, is_search=False, small=True)


def test_a_run():
    """Two updates, then all figures, and samples beside data."""
    found, arrays = made(RUN)
    assert found["error"] is None and (found["steps"], found["skipped"]) == (2, 0)
    assert found["set_up_seconds"] > 0 and found["step_seconds"] > 0 and found["machine"]["jax"] == jax.__version__
    assert np.isfinite([found["test"], found["test_stderr"], found["validation_loss"]]).all()
    assert found["parameters"] > 0 and found["reconstruction"] < 1e-5 and found["unconverged"] == 0
    assert found["sampled"] == 20 and min(found[name] for name in ("sample_seconds", "log_prob_1", "log_prob_1000")) > 0
    assert arrays["samples"].shape == (20, 2) and arrays["data"].shape == (8, 2)


def test_a_candidate_leaves_the_test_split_alone(monkeypatch):
    """It is validated, not measured."""
    monkeypatch.setattr(making, "measure", lambda *_: pytest.fail("was measured"))
    job = Job("moons", "made", 0, 1e-6, 1.0, 1e-3, is_search=True, small=True)
    task, contender = contender_of(job)
    monkeypatch.setattr(making, "contender_of", lambda *_: (task, contender))
    task.splits.test[:] = np.nan
    found, arrays = made(job)
    assert found["error"] is None and arrays is None and found["parameters"] > 0

    monkeypatch.setattr(type(task), "scores", lambda *_: np.full((1, 8), np.nan))
    found, arrays = made(job)
    assert found["error"] == "diverged: no finite validation in 2 steps" and arrays is None


@pytest.mark.usefixtures("compiles_alike")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no cores to choose")
def test_a_process_of_its_own(tmp_path):
    """It keeps to its core, with one JAX device and without a cache of compiled programs."""
    job = Job("moons", "nice", 0, 1e-6, 1.0, 1e-3, is_search=True, small=True)
    run_all(lambda: [] if found_result(job, tmp_path) else [job], tmp_path, cores(1))
    result = found_result(job, tmp_path)
    assert result["error"] is None, job.path(tmp_path).with_suffix(".log").read_text()
    assert (result["machine"]["cores"], result["machine"]["devices"], result["machine"]["cache"]) == (1, 1, False)


def test_the_optimiser_is_that_of_the_config():
    """With the learning rate of each step from outside."""
    config = OptimizerConfig(b2=0.95, clip=0.5)
    rates = [0.1, 0.3]
    found, usual = (
        optimizer_of(config),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(lambda n: jnp.asarray(rates)[n], b2=0.95)),
    )
    params = expected = {"a": jnp.ones(3)}
    state, usual_state = found.init(params), usual.init(params)
    for n, rate in enumerate(rates):
        gradient = {"a": jnp.arange(3.0) + n}
        state = state._replace(
            hyperparams={"learning_rate": jnp.asarray(rate, state.hyperparams["learning_rate"].dtype)}
        )
        with optax_promotion():
            updates, state = found.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            updates, usual_state = usual.update(gradient, usual_state, expected)
            expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(params["a"], expected["a"], rtol=1e-6)
    with pytest.raises(ValueError, match="optimizer: expected adam without accumulation, got"):
        optimizer_of(OptimizerConfig(name="adamw"))


def test_slow_samples():
    """Fewer are drawn, and the time is scaled."""

    class Slow:
        def __init__(self):
            self.drawn = []

        def sampler(self, number):
            def sample(seed):
                self.drawn.append(number)
                sum(range(10**5 * number // 20))
                return np.zeros((number, 2))

            return sample

    model = Slow()
    figures, samples = sampling(model, 1000, longest=0.0)
    assert figures["sampled"] == 20 and figures["sample_seconds"] > 0 and samples.shape == (20, 2)
    assert model.drawn == [20]
    figures, samples = sampling(model, 1000, longest=1e9)
    assert figures["sampled"] == 1000 and samples.shape == (1000, 2)
