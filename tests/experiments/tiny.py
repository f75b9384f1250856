"""Runs of `experiments.density digits_uniform` that take seconds, runs that were never trained, and one that is cut."""

import json
from dataclasses import replace
from itertools import islice

import jax.numpy as jnp
import optax
import pytest

from experiments.configs import CONFIGS
from experiments.configs.base import DensityConfig, EvaluationConfig, OptimizerConfig
from experiments.configs.classification import ClassifyConfig
from experiments.runs.fingerprint import fingerprint
from experiments.runs.launch import run_config
from experiments.runs.setup import set_up, tightened_flow
from experiments.runs.tasks.of_config import task_of
from experiments.runs.workdir import claim_workdir
from resflow_jax import DenseTail, ImageFlowConfig, Roulette, VectorFlowConfig, certify
from resflow_jax.data.batches import Batches
from resflow_jax.training.checkpoints import Checkpoints

DIGITS = replace(
    CONFIGS["digits_uniform"],
    model=ImageFlowConfig((8, 8, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=DenseTail(0)),
    steps=2,
    batch_size=8,
    evaluation=EvaluationConfig(estimator=Roulette(), draws=1, examples=20, every=2),
)
TINY = replace(
    DIGITS,
    steps=6,
    batch_size=16,
    log_every=2,
    optimizer=OptimizerConfig(warmup=2),
    evaluation=EvaluationConfig(estimator=Roulette(), draws=2, examples=30, every=3),
)

VECTORS = replace(
    CONFIGS["vectors"],
    model=VectorFlowConfig(dim=30, blocks=1, hidden=(4,)),
    steps=2,
    batch_size=8,
    evaluation=EvaluationConfig(estimator=Roulette(), draws=1, examples=8, every=8),
)


def run_and_cut(config: DensityConfig, batches: int) -> None:
    """A run that ends abruptly when it asks for more than the given number of batches."""
    starting_at = Batches.starting_at

    def cut(self, step, **options):
        yield from islice(starting_at(self, step, **options), batches)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "starting_at", cut)
        run_config(config)


def save_run(config: DensityConfig, loss: float | None = 3.0) -> None:
    """The files of a run at its last checkpoint without training: the weights are the initial ones."""
    task = task_of(config)
    claim_workdir(config.workdir, config, fingerprint(task))
    trainer, state = set_up(task)
    average = optax.EmaState(jnp.asarray(1), optax.tree.scale(1 - trainer.ema_decay, state.params))
    state = state._replace(step=jnp.asarray(config.steps), ema=average)
    with Checkpoints(config.workdir / "checkpoints") as checkpoints:
        checkpoints.save(state, loss, certify(tightened_flow(trainer, state)))


def finish_untrained(config: ClassifyConfig) -> None:
    """The files of a finished run of a classifier, with the initial weights and a made-up test error."""
    save_run(config)
    line = {"step": config.steps, "split": "test", "error": 90.0, "error_stderr": 1.0}
    (config.workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
