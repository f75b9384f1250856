"""One of our models under the clock: its training step, and what is measured of its averaged weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.configs.base import OptimizerConfig
from experiments.runs.likelihoods import reconstruction
from experiments.runs.parts import PART, number_of_parts, over_parts
from experiments.runs.setup import tightened_flow
from experiments.runs.tasks.task import Task
from resflow_jax.functional.estimators import subsampling
from resflow_jax.models.flow import Flow
from resflow_jax.models.residual_flow import flow_from_config
from resflow_jax.training.step import Trainer


class FlaxContender:
    """A flow of this library in training, by the library's own step.

    Args:
      task: the data, the loss and the config of the run.
    """

    def __init__(self, task: Task):
        self.task, self.config = task, task.config
        self._first = jax.block_until_ready(task.initial())

    def prepare(self, batch: np.ndarray) -> None:
        """Builds the flow, initialises it on training examples, and compiles the step for batches like this one."""
        task, config = self.task, self.config
        flow = flow_from_config(config.model, rngs=nnx.Rngs(config.seed))
        flow.initialize(self._first)
        optimizer = optimizer_of(config.optimizer)
        self.trainer = Trainer(nnx.split(flow)[0], task.loss, optimizer, config.optimizer.ema_decay)
        self.key = jax.random.key(config.seed)
        self.state = self.trainer.create_state(flow, config.estimator)
        self._step = self.trainer.compiled_step().lower(self.state, batch, self.key).compile()

    def step(self, batch: np.ndarray, learning_rate: float) -> bool:
        """Makes an update, and waits for it. Returns False if it was not finite, and was skipped."""
        before = self.state.opt_state
        rate = jnp.asarray(learning_rate, before.hyperparams["learning_rate"].dtype)
        state = self.state._replace(opt_state=before._replace(hyperparams={"learning_rate": rate}))
        self.state, metrics = self._step(state, batch, self.key)
        return bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"]))

    def averaged(self) -> "FlaxModel":
        """The model with averaged weights, tightened if it has bounds."""
        return FlaxModel(self.task, tightened_flow(self.trainer, self.state))


def optimizer_of(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and Adam by the settings of a config, with a learning rate in the state that is set at each step.

    Raises:
      ValueError: if the config has another optimiser than Adam.
    """
    if config.name != "adam" or config.accumulate != 1:
        raise ValueError(f"optimizer: expected adam without accumulation, got {config}")

    def make(learning_rate: Any) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(learning_rate, b2=config.b2))

    return optax.inject_hyperparams(make)(learning_rate=0.0)


class FlaxModel:
    """A trained flow of this library.

    Args:
      task: the data and the metric.
      flow: the flow.
    """

    def __init__(self, task: Task, flow: Flow):
        self._task, self._flow, self._config = task, flow, task.config

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self._flow, nnx.Param)))

    def scores(self, examples: np.ndarray, seed: int, draws: int) -> np.ndarray:
        """The metric of the task for each of N examples in each draw, [draws, N]."""
        estimator = self._estimator
        key = jax.random.key(seed)
        return self._task.scores(self._flow, examples, key, estimator, draws, self._task.batch_size)

    def sampler(self, number: int) -> Callable[[int], np.ndarray]:
        """A function from seeds to `number` samples, compiled."""
        flow, parts = self._flow, number_of_parts(number, max(1, PART // self._flow.dim))
        solve = over_parts(lambda flow, z: flow.inverse(z), flow)

        def sample(seed: int) -> np.ndarray:
            z = jax.random.normal(jax.random.key(seed), (parts, number // parts, flow.dim), flow.dtype)
            return np.asarray(solve(z))

        sample(0)
        return sample

    def evaluator(self, x: np.ndarray) -> Callable[[int], np.ndarray]:
        """A function from seeds to log p of floats x, compiled. Which seed it is does not matter."""
        parts = number_of_parts(len(x), self._task.batch_size, subsampling(self._estimator))
        key = jax.random.key(0)
        apply = over_parts(lambda flow, x: flow.log_prob(x, key=key, estimator=self._estimator), self._flow)
        shares = x.reshape(parts, -1, *x.shape[1:])

        def evaluate(seed: int) -> np.ndarray:
            return np.asarray(apply(shares))

        evaluate(0)
        return evaluate

    def reconstruction(self, x: np.ndarray) -> tuple[float, int]:
        """max |x - f^-1(f(x))|, and the number of x whose inverse did not converge."""
        return reconstruction(self._flow, x)

    @property
    def _estimator(self) -> Any:
        return self._config.evaluation.estimator
