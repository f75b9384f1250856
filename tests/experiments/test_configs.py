"""The configurations of experiments have the promised sizes, published settings and optimisers."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from experiments.configs import CONFIGS, cifar10_densenet, digits_densenet
from experiments.configs.base import OPTIMIZERS, SCHEDULES, DensityConfig, OptimizerConfig
from experiments.configs.tiny import tiny as tiny_config
from resflow_jax.training.step import optax_promotion

# config: number of parameters
SIZES = {
    "cifar10_densenet": (cifar10_densenet.CONFIG.model, 24_894_586),
    "residual flow of default sizes": (rf.ImageFlowConfig((32, 32, 3)), 25_174_129),
    "digits_densenet": (digits_densenet.CONFIG.model, 107_398),
    "digits_uniform": (CONFIGS["digits_uniform"].model, 107_361),
    "cifar10_monotone": (CONFIGS["cifar10_monotone"].model, 24_894_430),
    "digits_monotone": (CONFIGS["digits_monotone"].model, 107_362),
    "digits": (CONFIGS["digits"].model, 40_394),
    "fashion_mnist": (CONFIGS["fashion_mnist"].model, 318_221),
}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters(name):
    """The parameters are counted without making any."""
    config, expected = SIZES[name]
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param))) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_tiny_mode(name):
    """A tiny config makes two updates of a flow of eight channels, on embedded data of the same shape and bits."""
    config, small = CONFIGS[name], tiny_config(CONFIGS[name])
    assert small.steps == 2 * config.optimizer.accumulate and small.workdir != config.workdir
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(small.model, rngs=nnx.Rngs(0)))
    if isinstance(config, DensityConfig):
        assert len(small.model.blocks) == len(config.model.blocks) and small.model.shape == config.model.shape
        assert small.model.hidden_channels == 8
        assert small.data.name in ("digits", "photographs") and small.data.bits == config.data.bits
        assert flow.event_shape == config.model.shape
    else:
        assert small.data == config.data and small.model.hidden == (8,) and flow.event_shape == (config.model.dim,)


def test_config_names_and_work_directories_are_their_own():
    """No two runs write to the same place; the help has a line for each."""
    assert len({config.workdir for config in CONFIGS.values()}) == len(CONFIGS) == 34


def test_published_settings():
    """Terms, batches, optimiser and logit are those of the authors' commands."""
    for name in ("mnist", "cifar10", "svhn", "imagenet32", "imagenet64", "celebahq64"):
        config = CONFIGS[name]
        assert config.estimator == rf.Roulette(rf.Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian")
        assert (config.batch_size, config.optimizer.learning_rate, config.optimizer.accumulate) == (64, 1e-3, 1)
        assert config.model.data.logit_alpha == (1e-6 if name == "mnist" else 0.05)
    config = CONFIGS["celebahq256"]
    assert (config.batch_size, config.optimizer.accumulate, config.estimator.exact_terms) == (8, 5, 8)
    assert config.model.blocks == (16,) * 6 and config.model.activation == "elu" and config.data.bits == 5
    config, blocks = CONFIGS["cifar10_monotone"], CONFIGS["cifar10_densenet"].model
    assert config.model == replace(blocks, activation="cpila", block="monotone") and config.batch_size == 64
    assert config.estimator == rf.Roulette(rf.Poisson(2.0), exact_terms=10, minres_steps=0, probe="gaussian")
    for data in ("digits", "mnist", "cifar10"):
        assert CONFIGS[f"{data}_truncated_elu"].estimator == rf.Truncated(terms=5)
        base = "digits_uniform" if data == "digits" else data
        assert CONFIGS[f"{data}_elu"].estimator == CONFIGS[base].estimator


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_optimizers_descend(name, schedule, warmup):
    """Every optimiser with every schedule lowers a square; after the warm-up the rate is that of the schedule."""
    settings = OptimizerConfig(
        name,
        0.05,
        warmup=warmup,
        schedule=schedule,
        milestones=(30, 50) if schedule == "step" else (),
        weight_decay=1e-3 if name == "adamw" else 0.0,
    )
    optimizer = settings.build(60)
    x = jnp.asarray([1.0, -2.0])
    state = optimizer.init(x)
    for _ in range(60):
        with optax_promotion():
            updates, state = optimizer.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
    assert jnp.max(jnp.abs(x)) < 1
    if schedule == "cosine":
        with optax_promotion():
            updates, _ = optimizer.update(2 * x, state, x)
        assert jnp.max(jnp.abs(updates)) < 1e-6


def test_learning_rates():
    """The rate is linear in the warm-up and then follows the schedule, by updates."""
    step = OptimizerConfig(learning_rate=2.0, warmup=4, schedule="step", milestones=(6, 8), decay=0.5)
    rates = [float(step.learning_rates(20)(n)) for n in range(10)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1.5, 2, 2, 1, 1, 0.5, 0.5])
    cosine = OptimizerConfig(learning_rate=2.0, warmup=0, accumulate=2).learning_rates(8)
    np.testing.assert_allclose([float(cosine(n)) for n in (0, 2, 4)], [2, 1, 0], atol=1e-7)
