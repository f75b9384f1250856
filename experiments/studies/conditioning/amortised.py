"""Amortised posterior estimation: flows q(theta | x) trained on simulated pairs, a residual flow and flowjax's.

    maximise E log q(theta | x),   theta from the prior,   x from the simulator

(Papamakarios & Murray 2016, arXiv 1605.06376; Greenberg et al. 2019, arXiv 1905.07488, without truncation of the
prior). Every step uses new simulations, or pairs of a fixed budget. theta and x are standardised by a pilot of
10000 simulations, or by the budget.

The two learners have the same interface and take turns: after some steps of the first, the second trains until its
training time is the same. Load from other programs thus affects both alike. The times exclude the first step, with its
compilation, which is reported separately. Both use Adam with the same warm-up, cosine decay and clipping.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.configs.base import OptimizerConfig
from experiments.studies.conditioning.simulators import Simulator
from resflow_jax import Anderson, Estimator, Exact, ResidualFlow, VectorFlowConfig
from resflow_jax.training.losses import negative_log_likelihood
from resflow_jax.training.step import Trainer

Array = jax.Array
Pairs = tuple[np.ndarray, np.ndarray]  # standardised theta [N, D] and x [N, X], float32

PILOT = 10000  # simulations that standardise theta and x, and set ActNorm
_SOLVER = Anderson(on_failure="raise")


@dataclass(frozen=True)
class Standardised:
    """A simulator in standardised units: (theta - mean) / std, and the same for x.

    Attributes:
      simulator: the simulator in its own units.
      moments: means and standard deviations of theta and of x.
      budget: all training pairs; None simulates new pairs at every step.
    """

    simulator: Simulator
    moments: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    budget: Pairs | None

    @classmethod
    def of(cls, simulator: Simulator, rng: np.random.Generator, budget: int | None) -> "Standardised":
        """Standardises by a pilot, or by `budget` simulations, which are then all training pairs."""
        theta = simulator.prior(rng, PILOT if budget is None else budget)
        x = simulator.simulate(rng, theta)
        moments = tuple((values.mean(axis=0), values.std(axis=0)) for values in (theta, x))
        return cls(simulator, moments, None if budget is None else (theta, x))

    def pairs(self, rng: np.random.Generator, number: int) -> Pairs:
        """Draws pairs to train on."""
        if self.budget is not None:
            rows = rng.integers(len(self.budget[0]), size=number)
            return self.standardise(self.budget[0][rows], self.budget[1][rows])
        theta = self.simulator.prior(rng, number)
        return self.standardise(theta, self.simulator.simulate(rng, theta))

    def standardise(self, theta: np.ndarray, x: np.ndarray) -> Pairs:
        """theta and x in standardised units."""
        pairs = zip((theta, x), self.moments, strict=True)
        return tuple(((values - mean) / deviation).astype(np.float32) for values, (mean, deviation) in pairs)

    def theta(self, standardised: np.ndarray) -> np.ndarray:
        """theta in its own units."""
        mean, deviation = self.moments[0]
        return mean + deviation * np.asarray(standardised, np.float64)

    @property
    def log_det(self) -> float:
        """log|d standardised / d theta|."""
        return -float(np.sum(np.log(self.moments[0][1])))


class Learner:
    """A conditional flow in training.

    Attributes:
      name: name in tables and pictures.
      steps: number of steps done.
      seconds: time of all steps but the first.
      first_step: seconds of the first step, compilation included.
    """

    name: str
    steps = 0
    seconds = 0.0
    first_step = 0.0

    def step(self, pairs: Pairs, learning_rate: float) -> Array:
        """Makes one update; returns the loss in nats of standardised theta, without waiting for its computation."""
        raise NotImplementedError

    def log_prob(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        """log q(theta | x) [N] of standardised pairs."""
        raise NotImplementedError

    def sample(self, key: Array, number: int, x: np.ndarray) -> np.ndarray:
        """theta [number, D] for one standardised x [X]."""
        raise NotImplementedError

    def finish(self) -> None:
        """Call it after the last step."""

    def train(self, batches: Iterator[Pairs], learning_rate: float, number: int) -> float:
        """Trains for `number` steps, waits for the last, and returns its loss.

        Raises:
          FloatingPointError: if the loss is not finite.
        """
        began = time.perf_counter()
        for _ in range(number):
            loss = self.step(next(batches), learning_rate)
        loss = float(loss)
        passed = time.perf_counter() - began
        if self.steps:
            self.seconds += passed
        else:
            self.first_step = passed
        self.steps += number
        if not math.isfinite(loss):
            raise FloatingPointError(f"training of the {self.name} diverged by step {self.steps}: loss {loss}")
        return loss


def _optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam whose learning rate is set before every step."""
    adam = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(config.learning_rate, b2=config.b2)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)


def _with_rate(opt_state: Any, learning_rate: float) -> Any:
    """The state of `_optimizer` with another learning rate."""
    clip, adam = opt_state
    rate = jnp.asarray(learning_rate, jnp.float32)
    return clip, adam._replace(hyperparams={**adam.hyperparams, "learning_rate": rate})


class ResidualLearner(Learner):
    """A conditional residual flow."""

    name = "residual flow"

    def __init__(
        self, model: VectorFlowConfig, optimizer: OptimizerConfig, estimator: Estimator, pairs: Pairs, seed: int
    ):
        """Makes the flow; `pairs` initialise ActNorm."""
        self.flow = ResidualFlow(model, rngs=nnx.Rngs(seed))
        self.flow.initialize(*map(jnp.asarray, pairs))

        loss = negative_log_likelihood()
        self.trainer = Trainer(nnx.split(self.flow)[0], loss, _optimizer(optimizer), optimizer.ema_decay)
        self.state = self.trainer.create_state(self.flow, estimator)
        self.update = self.trainer.compiled_step()
        self.key = jax.random.key(seed)

    def step(self, pairs: Pairs, learning_rate: float) -> Array:
        state = self.state._replace(opt_state=_with_rate(self.state.opt_state, learning_rate))
        self.state, metrics = self.update(state, pairs, self.key)
        return metrics["loss"]

    def finish(self) -> None:
        self.flow = self.trainer.current_flow(self.state)
        self.flow.tighten()

    def log_prob(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.flow.log_prob(theta, condition=x, estimator=Exact()))

    def sample(self, key: Array, number: int, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.flow.sample(key, number, condition=x, solver=_SOLVER))


@dataclass(frozen=True)
class FlowjaxConfig:
    """The flow of flowjax.

    Attributes:
      layers: number of masked autoregressive layers.
      width: width of the hidden layers of each network.
      depth: number of hidden layers of each network.
      knots: number of knots of each spline.
      interval: a spline is the identity outside [-interval, interval].
      learning_rate: peak learning rate. The default is the best of 0.001, 0.002, 0.005, 0.01 and 0.02 for two moons.
    """

    layers: int = 6
    width: int = 64
    depth: int = 2
    knots: int = 8
    interval: float = 4.0
    learning_rate: float = 1e-2


def has_flowjax() -> bool:
    """Whether the extra flowjax is installed."""
    return find_spec("flowjax") is not None


def promoting(function: Callable) -> Callable:
    """Wraps a function so that ranks and dtypes may be promoted, which flowjax and optax need."""

    def wrapped(*args):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return wrapped


class FlowjaxLearner(Learner):
    """flowjax's masked autoregressive flow of rational-quadratic splines, trained by flowjax's own loss."""

    name = "flowjax"

    @promoting
    def __init__(self, config: FlowjaxConfig, optimizer: OptimizerConfig, pairs: Pairs, seed: int):
        import equinox as eqx
        import paramax
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal
        from flowjax.flows import masked_autoregressive_flow
        from flowjax.train.losses import MaximumLikelihoodLoss

        theta, x = pairs
        distribution = masked_autoregressive_flow(
            jax.random.key(seed),
            base_dist=Normal(jnp.zeros(theta.shape[1])),
            transformer=RationalQuadraticSpline(knots=config.knots, interval=config.interval),
            cond_dim=x.shape[1],
            flow_layers=config.layers,
            nn_width=config.width,
            nn_depth=config.depth,
        )

        def is_fixed(leaf):
            return isinstance(leaf, paramax.NonTrainable)

        self.params, static = eqx.partition(distribution, eqx.is_inexact_array, is_leaf=is_fixed)
        loss, rule = MaximumLikelihoodLoss(), _optimizer(optimizer)
        self.opt_state = rule.init(self.params)

        def update(params, opt_state, theta, x):
            value, gradient = jax.value_and_grad(loss)(params, static, theta, x)
            updates, opt_state = rule.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        def whole(params):
            return paramax.unwrap(eqx.combine(params, static))

        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._log_prob = jax.jit(lambda params, theta, x: whole(params).log_prob(theta, x))
        self._sample = jax.jit(
            lambda params, key, number, x: whole(params).sample(key, (number,), condition=x), static_argnums=2
        )

    @promoting
    def step(self, pairs: Pairs, learning_rate: float) -> Array:
        opt_state = _with_rate(self.opt_state, learning_rate)
        self.params, self.opt_state, loss = self._update(self.params, opt_state, *pairs)
        return loss

    @promoting
    def log_prob(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._log_prob(self.params, theta, x))

    @promoting
    def sample(self, key: Array, number: int, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._sample(self.params, key, number, x))


class Turn(NamedTuple):
    """The report of `take_turns` after each turn: steps and seconds of each learner, and its last loss in nats."""

    losses: dict[str, float]
    steps: dict[str, int]
    seconds: dict[str, float]


def take_turns(
    learners: list[Learner],
    task: Standardised,
    rates: list[float],
    optimizer: OptimizerConfig,
    *,
    steps: int,
    batch_size: int,
    every: int,
    seed: int,
) -> Iterator[Turn]:
    """Trains the first learner for `steps` steps, and the others for the same time.

    It yields after every `every` steps of the first learner, when the others have had the same time. `rates` are the
    peak learning rates; the schedule of each learner follows the fraction of the time that has passed.
    """
    streams = [_batches(task, batch_size, seed + n) for n in range(len(learners))]
    schedule = optimizer.learning_rates(steps)

    def train(n: int, done: int, number: int) -> float:
        share = float(schedule(min(done, steps - 1))) / optimizer.learning_rate
        return learners[n].train(streams[n], share * rates[n], number)

    losses = [train(n, 1, 1) for n in range(len(learners))]
    done = 1
    while done < steps:
        number = min(every, steps - done)
        losses[0] = train(0, done, number)
        for n in range(1, len(learners)):
            last = _catch_up(learners[n], learners[0].seconds, partial(train, n, done))
            losses[n] = losses[n] if last is None else last
        done += number
        yield Turn(
            *(
                dict(zip([learner.name for learner in learners], values, strict=True))
                for values in (losses, [one.steps for one in learners], [one.seconds for one in learners])
            )
        )
    for learner in learners:
        learner.finish()


def _catch_up(learner: Learner, seconds: float, train: Callable[[int], float]) -> float | None:
    """Trains until the learner's training time is `seconds`, up to half a step; returns the last loss, if any."""
    loss = None
    while True:
        left = seconds - learner.seconds
        per_step = max(learner.seconds, 1e-9) / (learner.steps - 1) if learner.steps > 1 else 0.0
        if left < per_step / 2:
            return loss
        loss = train(max(1, min(100, int(left / per_step))) if per_step else 1)


def _batches(task: Standardised, batch_size: int, seed: int) -> Iterator[Pairs]:
    rng = np.random.default_rng((seed, 1))
    while True:
        yield task.pairs(rng, batch_size)
