"""Bits/dim: the formula, and an evaluation that counts every image once and states its error."""

import tracemalloc
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.data.images import dequantize
from resflow_jax.training.evaluation import Estimate, evaluate_bits_per_dim
from resflow_jax.training.forms import batches_in_order
from resflow_jax.training.losses import dequantized_bits_per_dim, negative_log_likelihood
from resflow_jax.training.scores import bits_per_dim


def test_bits_per_dim_of_a_uniform_density():
    """A uniform density on [0, 1]^D spends log2 L bits on each of L levels; doubling it saves 1/D bits."""
    np.testing.assert_allclose(bits_per_dim(jnp.asarray([0.0, np.log(2)]), 4, 256), [8.0, 7.75])


class KnownDensity(nnx.Module):
    """log p(x) = mean level of the image, which shows how often each image was counted."""

    config = rf.VectorFlowConfig(dim=4)
    event_shape = (2, 2, 1)

    def log_prob(self, x, *, key, estimator, return_diagnostics):
        assert return_diagnostics
        return jnp.floor(x * 16 + 1e-9).mean((1, 2, 3)) + 0.1 * jax.random.normal(key, x.shape[:1]), ()


def test_every_image_counts_once():
    """A ragged last batch adds no image twice; the standard error covers images and draws."""
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    arguments = {"levels": 16, "estimator": rf.Roulette(), "batch_size": 4}
    estimate = evaluate_bits_per_dim(KnownDensity(), images, jax.random.key(0), draws=400, **arguments)
    values = -np.arange(10) / (4 * np.log(2)) + 4
    np.testing.assert_allclose(estimate.mean, values.mean(), atol=4 * 0.1 / (4 * np.log(2)) / 4000**0.5)
    np.testing.assert_allclose(estimate.stderr, values.std(ddof=1) / 10**0.5, rtol=0.05)
    np.testing.assert_allclose(estimate.data_stderr, values.std(ddof=1) / 10**0.5, rtol=0.05)
    np.testing.assert_allclose(estimate.noise_stderr, 0.1 / (4 * np.log(2)) / 4000**0.5, rtol=0.15)
    np.testing.assert_allclose(estimate.stderr**2, estimate.data_stderr**2 + estimate.noise_stderr**2, rtol=1e-12)
    single = evaluate_bits_per_dim(KnownDensity(), images, jax.random.key(0), draws=1, **arguments)
    assert np.isnan(single.noise_stderr) and single.stderr == single.data_stderr > 0


class SharedError(KnownDensity):
    """The same with an error that all images of a call have in common, larger than their differences."""

    def log_prob(self, x, *, key, estimator, return_diagnostics):
        values, _ = super().log_prob(x, key=key, estimator=estimator, return_diagnostics=return_diagnostics)
        return values + 10 * jax.random.normal(jax.random.fold_in(key, 1)), ()


def test_an_error_in_common_is_noise_and_not_data():
    """The data's part stays what it is, on average over runs, and the noise is that of the common error."""
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    arguments = {"levels": 16, "estimator": rf.Roulette(), "draws": 4}
    runs = [evaluate_bits_per_dim(SharedError(), images, jax.random.key(n), **arguments) for n in range(50)]
    _, _, data, noise = np.asarray(runs).T
    unit = 4 * np.log(2)
    np.testing.assert_allclose((data**2).mean(), (np.arange(10) / unit).var(ddof=1) / 10, rtol=0.05)
    np.testing.assert_allclose((noise**2).mean(), (10 / unit) ** 2 / 4, rtol=0.4)


@pytest.mark.parametrize("scores", [[[2.0], [2.1], [1.9]], [[2.0]]], ids=["three draws", "one draw"])
def test_one_image_tells_nothing_of_others(scores):
    """The data's part of the error is infinite, and so is the total; the part of the draws is finite or unknown."""
    estimate = Estimate.from_scores(np.asarray(scores))
    assert estimate.data_stderr == estimate.stderr == np.inf
    np.testing.assert_allclose(estimate.mean, 2.0)
    expected = np.std(scores, ddof=1) / 3**0.5 if len(scores) == 3 else np.nan
    np.testing.assert_allclose(estimate.noise_stderr, expected)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_errors_of_scores_that_are_not_finite(draws, bad):
    """The mean and all errors are NaN, in particular not 0."""
    scores = np.random.default_rng(0).normal(size=(draws, 4))
    scores[0, 2] = bad
    assert not np.isfinite(Estimate.from_scores(scores)).any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (1, 2, 3)])
def test_scores_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"scores: expected \[draws, N\] with at least one of each, got shape"):
        Estimate.from_scores(np.zeros(shape))


@pytest.mark.parametrize("exact_terms", [0, 5])
def test_standard_error_covers_the_shared_length(exact_terms):
    """Means of repeated evaluations scatter by the stated noise, also where one long series moves a whole batch."""
    same = np.full((50, 2, 2, 1), 3, np.uint8)  # equal images: only noise and estimator vary
    config = rf.ImageFlowConfig(
        (2, 2, 1),
        blocks=(2,),
        hidden_channels=4,
        kernels=(1, 1),
        activation="identity",
        data=rf.ImageTransform(logit_alpha=0.05),
        tail=rf.DenseTail(0),
    )
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    kernels = nnx.state(flow, nnx.Param)
    nnx.update(flow, jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 2 else leaf, kernels))
    flow.converge_norms()
    estimator = rf.Roulette(rf.Poisson(2.0), exact_terms=exact_terms, minres_steps=0)
    arguments = {"levels": 8, "estimator": estimator, "batch_size": 50, "draws": 10}
    with pytest.warns(RuntimeWarning, match="infinite variance"):
        runs = [evaluate_bits_per_dim(flow, same, jax.random.key(n), **arguments) for n in range(40)]
    means, _, data, noise = np.asarray(runs).T
    assert 0.6 < means.std(ddof=1) / np.sqrt((noise**2).mean()) < 1.4
    assert (data**2).mean() < 0.5 * (noise**2).mean()  # the images are the same


def test_exact_and_roulette_agree():
    """The exact mode leaves only dequantisation; both means agree within their stated noise."""
    config = rf.ImageFlowConfig(
        (4, 4, 1),
        blocks=(2,),
        hidden_channels=8,
        data=rf.ImageTransform(logit_alpha=0.05),
        tail=rf.DenseTail(0),
    )
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    kernels = nnx.state(flow, nnx.Param)
    nnx.update(flow, jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, kernels))
    flow.converge_norms()
    images = np.random.default_rng(0).integers(0, 16, (12, 4, 4, 1))
    exact, estimated = (
        rf.evaluate_bits_per_dim(flow, images, jax.random.key(1), levels=16, estimator=e, draws=30, batch_size=5)
        for e in (rf.Exact(), rf.Roulette())
    )
    noise = np.hypot(exact.noise_stderr, estimated.noise_stderr)
    assert abs(exact.mean - estimated.mean) < 4 * noise
    assert noise < 0.05 and exact.noise_stderr < 1.1 * estimated.noise_stderr
    np.testing.assert_allclose(exact.data_stderr, estimated.data_stderr, rtol=0.2)


def test_batches_in_order():
    """All have one size, the first examples come again after the last, and the data set is not copied."""
    x, condition = np.arange(500_000.0).reshape(5, -1), np.arange(5)
    for size, rows in ((2, [[0, 1], [2, 3], [4, 0]]), (12, [[*range(5), *range(5), 0, 1]])):
        found = batches_in_order((x, condition), size, None)
        for (first, second), expected in zip(found, rows, strict=True):
            np.testing.assert_array_equal(first, x[expected])
            np.testing.assert_array_equal(second, expected)
    tracemalloc.start()
    try:
        for _ in batches_in_order(x, 1, None):
            pass
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 2
    finally:
        tracemalloc.stop()


def test_bad_images_are_named():
    """Floats, levels out of range and an empty split are refused."""
    flow, arguments = KnownDensity(), {"levels": 16, "estimator": rf.Roulette()}
    for images, message in [
        (np.zeros((2, 2, 2, 1)), "images: expected integer pixels"),
        (np.full((2, 2, 2, 1), 16), "images: expected pixels in 0..15"),
        (np.zeros((0, 2, 2, 1), int), "images: expected images .* with N > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_bits_per_dim(flow, images, jax.random.key(0), **arguments)
    for name in ("draws", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1, got 0"):
            evaluate_bits_per_dim(flow, np.zeros((2, 2, 2, 1), int), jax.random.key(0), **arguments, **{name: 0})


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py, not another platform")
def test_two_devices_give_the_evaluation_of_one():
    """The same noise by example, also where the last batch is ragged; other batches are rounded up.

    The estimator goes on for one example of two by default, so that each device has a multiple of two.
    """
    config = rf.ImageFlowConfig((4, 4, 1), blocks=(1,), hidden_channels=4, kernels=(3, 3), tail=rf.DenseTail(0))
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 16, (10, 4, 4, 1))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    arguments = {"levels": 16, "draws": 2}
    for estimator, size, rounded in ((None, 4, (2, 3, 4)), (rf.Roulette(subsample=1), 4, (3, 4))):
        arguments["estimator"] = estimator
        one = rf.evaluate_bits_per_dim(flow, images, jax.random.key(1), batch_size=size, **arguments)
        for batch_size in rounded:
            options = arguments | {"batch_size": batch_size, "mesh": mesh}
            two = rf.evaluate_bits_per_dim(flow, images, jax.random.key(1), **options)
            np.testing.assert_allclose(two, one, rtol=1e-10)


@pytest.mark.parametrize("of_images", [True, False])
def test_annealing_weighs_the_log_det_in_the_gradient_alone(of_images):
    """The value is that of weight 1 at every step; the gradient that of log N(z) + weight * log-det."""
    if of_images:
        flow = rf.ResidualFlow(
            rf.ImageFlowConfig((2, 2, 1), blocks=(1,), hidden_channels=3, tail=rf.DenseTail(0)), rngs=nnx.Rngs(0)
        )
        batch, make = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), partial(dequantized_bits_per_dim, 16)
        scale = -1 / (4 * np.log(2))
    else:
        flow = rf.ResidualFlow(rf.VectorFlowConfig(3, blocks=2, hidden=(4,)), rngs=nnx.Rngs(0))
        batch, make, scale = jax.random.normal(jax.random.key(1), (3, 3)), negative_log_likelihood, -1
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
    key, estimator = jax.random.key(2), rf.Exact()
    x = dequantize(batch, jax.random.split(key)[0], 16) if of_images else batch

    def part(which):
        def mean(params):
            z, log_det = nnx.merge(graphdef, params, rest).forward(x, estimator=estimator)
            return scale * jnp.mean([-0.5 * jnp.sum(z**2, axis=1), log_det][which])

        return jax.jit(jax.grad(mean))(params)

    def loss(params, step, *weight):
        return make(*weight)(nnx.merge(graphdef, params, rest), batch, key, estimator, step)[0]

    schedule = optax.linear_schedule(0.0, 1.0, 4)
    annealed = jax.jit(jax.value_and_grad(lambda params, step: loss(params, step, schedule)))
    plain = jax.jit(loss)

    prior, log_det = part(0), part(1)
    for step, weight in ((0, 0.0), (1, 0.25), (8, 1.0)):
        value, gradient = annealed(params, step)
        np.testing.assert_allclose(value, plain(params, step), rtol=1e-12)
        expected = jax.tree.map(lambda a, b, weight=weight: a + weight * b, prior, log_det)
        chex.assert_trees_all_close(gradient, expected, rtol=1e-8, atol=1e-12)
