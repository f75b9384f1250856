"""Variational dequantisation: log q is the density of the noise, and the bound is exact in expectation."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.training.scores import bits_per_dim_of
from tests.moving import add_noise

SHAPE, LEVELS = (1, 2, 1), 2


@pytest.fixture(scope="module")
def noise():
    """q(u | k), away from its start."""
    module = rf.VariationalDequantization(SHAPE, couplings=2, width=4, rngs=nnx.Rngs(0))
    add_noise(module, 0.2)
    return module


def test_log_q(noise):
    """It is the density of the sampled u: that of the inverse, and it integrates to one for each image."""
    x = jnp.asarray([0.25, 0.75, 0.75, 0.75]).reshape(2, *SHAPE)
    u, log_q = jax.jit(noise.sample)(x, jax.random.key(0))
    assert ((u > 0) & (u < 1)).all()
    np.testing.assert_allclose(jax.jit(noise.log_prob)(u, x), log_q, rtol=1e-9)
    grid = jnp.asarray((np.arange(200) + 0.5) / 200)
    cells = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, *SHAPE)
    for image in x:
        density = jnp.exp(jax.jit(noise.log_prob)(cells, jnp.broadcast_to(image, cells.shape)))
        np.testing.assert_allclose(density.mean(), 1, atol=2e-3)
    first, second = (jax.jit(noise.sample)(x, jax.random.key(seed))[0] for seed in (0, 1))
    assert not np.allclose(first, second)


def test_bound_on_the_discrete_likelihood(noise):
    """E[log p(x) - log q(u)] is below the log of the mass of a cell, and E[p / q] equals it, for a known density."""
    flow = rf.Flow(rf.Chain([rf.Logit(0.05), rf.Flatten(SHAPE)]), dequantizer=noise)
    images = np.asarray([0, 1]).reshape(1, *SHAPE)
    draws = jnp.asarray(np.repeat(images, 4000, axis=0))

    @jax.jit
    def score(draws, key):
        return bits_per_dim_of(LEVELS)(flow, draws, key, rf.Exact())[:2]

    x, bits = score(draws, jax.random.key(1))
    assert (jnp.floor(x * LEVELS).astype(int) == draws).all()
    log_bound = -bits * 2 * math.log(2)
    grid = (np.arange(400) + 0.5) / 400
    cells = (images + np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, *SHAPE)) / LEVELS
    mass = np.exp(flow.log_prob(cells)).mean() / LEVELS**2
    error = 4 * np.exp(log_bound).std() / math.sqrt(len(draws))
    np.testing.assert_allclose(np.exp(log_bound).mean(), mass, atol=error)
    assert error < 0.1 * mass and log_bound.mean() < math.log(mass)
    uniform = rf.Flow(rf.Chain([rf.Logit(0.05), rf.Flatten(SHAPE)]))
    without = bits_per_dim_of(LEVELS)(uniform, draws, jax.random.key(1), rf.Exact())[1]
    assert not np.allclose(without.mean(), bits.mean(), atol=1e-3)


def test_training_improves_the_bound():
    """The parameters of the noise are trained with a residual flow, and the bits fall."""
    data = rf.ImageTransform(logit_alpha=0.05, dequantization=rf.Dequantization(1, 3))
    config = rf.ImageFlowConfig((2, 2, 1), (1,), 4, (3, 3), data=data, tail=rf.DenseTail(0))
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(flow, nnx.Param, ...)[0], nnx.split(flow, nnx.Param, ...)[1:]
    images = jnp.asarray(list(itertools.product([0, 3], repeat=4))).reshape(-1, 2, 2, 1)

    @jax.jit
    def loss(params, rest, key):
        return bits_per_dim_of(4)(nnx.merge(graphdef, params, rest), images, key, rf.Exact())[1].mean()

    gradient = jax.jit(jax.grad(loss))(*state, jax.random.key(0))
    for part in (gradient["dequantizer"], gradient["bijector"]):
        assert any(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(part))
    moved = jax.tree.map(lambda p, g: p - 0.05 * g, state[0], gradient)
    assert loss(moved, state[1], jax.random.key(0)) < loss(*state, jax.random.key(0))


@pytest.mark.parametrize("is_argument", [True, False])
def test_files(noise, is_argument, tmp_path):
    """A flow is saved with its noise, given to it or set later; that of a config has the noise of the config alone."""
    flow = rf.Flow(rf.Chain([rf.Logit(0.05), rf.Flatten(SHAPE)]), dequantizer=noise if is_argument else None)
    flow.dequantizer = noise
    rf.save(tmp_path / "flow.safetensors", flow)
    loaded = rf.load(tmp_path / "flow.safetensors")
    assert nnx.graphdef(loaded) == nnx.graphdef(flow)
    x, key = jnp.full((2, *SHAPE), 0.25), jax.random.key(0)
    for found, expected in zip(loaded.dequantizer.sample(x, key), noise.sample(x, key), strict=True):
        np.testing.assert_array_equal(found, expected)

    config = rf.CouplingFlowConfig(SHAPE, "additive", couplings=2, conditioner=rf.MLPConditioner((2,)))
    recipe = rf.CouplingFlow(config, rngs=nnx.Rngs(0))
    recipe.dequantizer = noise
    with pytest.raises(ValueError, match=r"the dequantizer that its config.*other parts; save rf.Flow\(.*dequantizer="):
        rf.save(tmp_path / "recipe.safetensors", recipe)
    rf.save(tmp_path / "recipe.safetensors", rf.Flow(recipe.bijector, recipe.base, dequantizer=recipe.dequantizer))
    assert rf.load(tmp_path / "recipe.safetensors").dequantizer.couplings == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rf.Flow(rf.Logit(0.05), event_shape=(2, 2, 1), dequantizer=3),
            r"dequantizer: .*sample.*, got 3",
        ),
        (
            lambda: rf.Flow(
                rf.Logit(0.05),
                event_shape=(2, 2, 1),
                dequantizer=rf.VariationalDequantization((4, 2, 1), 1, 2, rngs=nnx.Rngs(0)),
            ),
            r"dequantizer: expected images of shape \(2, 2, 1\), got shape \(4, 2, 1\)",
        ),
        (lambda: rf.VariationalDequantization((4,), rngs=nnx.Rngs(0)), r"shape: expected \(H, W, C\)"),
        (lambda: rf.VariationalDequantization((1, 1, 3), rngs=nnx.Rngs(0)), "shape: expected at least 2 pixels"),
        (lambda: rf.VariationalDequantization((2, 2, 3), 0, rngs=nnx.Rngs(0)), "couplings: expected"),
        (lambda: rf.VariationalDequantization((2, 2, 3), 1, 0, rngs=nnx.Rngs(0)), "width: expected"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
