"""Contractions with centering inside: the places of the centres, their updates, and that Lip(g) does not change."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax.functional.linear_maps import ConvMap
from resflow_jax.functional.solvers import Anderson
from resflow_jax.layers.block_certificate import certify_contraction
from resflow_jax.layers.monotone import MonotoneBlock
from resflow_jax.layers.normalization import MovingCentering
from resflow_jax.layers.residual import ResidualBlock
from tests.layers.blocks import WIDENING, layered, numpy_activation, numpy_affine, scramble_centers

# name: (constructor from rngs, shape of one example, channels after the linear layers)
CONV = [ConvMap((3, 2), 2, 3), ConvMap((3, 2), 3, 2, 1)]
CENTRED = {
    "dense, preactivation": (layered(WIDENING, "clipswish", preactivation=True, centering=True), (4,), (3, 4)),
    "convolutions": (layered(CONV, centering=True), (3, 2, 2), (3, 2)),
}


def make(name):
    """A centred contraction away from its start, its kernels within their coefficients; and x [40, ...]."""
    constructor, shape, _ = CENTRED[name]
    contraction, rng = constructor(nnx.Rngs(1)), np.random.default_rng(2)
    for linear in contraction.linears:
        linear.kernel[...] *= 0.5
    for params in contraction.activation_params:
        params["beta"][...] += rng.normal()
    scramble_centers(contraction, rng)
    return contraction, rng.normal(size=(40, *shape))


def step_by_step(contraction, x, share):
    """g(x) with every mean moved by a share towards that of its own input, and these means in the order of g."""
    betas = iter(float(params["beta"][...]) for params in contraction.activation_params)
    means = []

    def centred(center, h):
        mean = np.asarray(center.mean[...])
        means.append(mean + share * (h.reshape(-1, h.shape[-1]).mean(0) - mean))
        return h - means[-1] + np.asarray(center.bias[...])

    for n, linear in enumerate(contraction.linears):
        if contraction.preactivation and n == 0:
            x = centred(contraction.pre_center, x)
        if contraction.preactivation or n:
            x = numpy_activation(contraction.activation.name, x, next(betas))
        x = centred(contraction.centers[n], numpy_affine(linear, x))
    return x, means


def found_means(contraction):
    centers = [contraction.pre_center] if contraction.preactivation else []
    return [np.asarray(center.mean[...]) for center in (*centers, *contraction.centers)]


@pytest.mark.parametrize("name", CENTRED)
def test_means_move_step_by_step(name):
    """Each sees what the moved centres before it put out; the block's output, and g's, are those of the moved means.

    By a tenth where statistics are updated, all the way at initialisation, when g's mean is its last bias; not at all
    where the block is applied.
    """
    contraction, x = make(name)
    graphdef, state = nnx.split(ResidualBlock(contraction))

    @partial(jax.jit, static_argnames="method")
    def run(state, x, method):
        block = nnx.merge(graphdef, state)
        return getattr(block, method)(x), nnx.state(block)

    for method, share in (("__call__", 0.0), ("update_statistics", 0.1), ("initialize", 1.0)):
        expected, means = step_by_step(contraction, x, share)
        y, state = run(state, x, method)
        nnx.update(contraction, state["contraction"])
        for found, mean in zip(found_means(contraction), means, strict=True):
            np.testing.assert_allclose(found, mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(y, x + expected, rtol=1e-10, atol=1e-12)
    axes = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(np.mean(y - x, axes), contraction.centers[-1].bias[...], rtol=1e-10)


@pytest.mark.parametrize("name", CENTRED)
def test_places(name):
    """One per channel after every linear layer, and one before the activation of a pre-activation."""
    contraction, x = make(name)
    channels = CENTRED[name][-1]
    assert [center.mean.shape for center in contraction.centers] == [(c,) for c in channels]
    assert (contraction.pre_center is not None) == contraction.preactivation
    assert contraction.pre_center is None or contraction.pre_center.bias.shape == x.shape[-1:]


def test_means_of_a_monotone_block():
    """They are those where g is evaluated: at w with w + g(w) = sqrt(2) x, for the g of before."""
    contraction, x = make("dense, preactivation")
    block = MonotoneBlock(contraction, solver=Anderson(tolerance=1e-12))
    w = (np.asarray(block(x)) + x) / np.sqrt(2)
    _, expected = step_by_step(nnx.clone(contraction), w, 0.1)
    y = block.update_statistics(jnp.asarray(x))
    for found, mean in zip(found_means(contraction), expected, strict=True):
        np.testing.assert_allclose(found, mean, atol=1e-9)
    np.testing.assert_allclose(y, block(x))
    block.initialize(jnp.asarray(x))
    assert np.isfinite(block(x)).all()


def test_without_centering_nothing_moves():
    """No centres, no statistics; `move_statistics` leaves the contraction as it is."""
    contraction = layered()(nnx.Rngs(0))
    assert contraction.pre_center is None and not contraction.centers
    assert not any(isinstance(module, MovingCentering) for _, module in nnx.iter_modules(contraction))
    contraction.move_statistics(jnp.ones((2, 4)))
    assert not nnx.state(contraction, nnx.BatchStat)


def test_the_certificate_knows_no_shifts():
    """The same to the last bit without centres and with any: a shift is an isometry."""
    contraction, _ = make("dense, preactivation")
    block = certify_contraction(contraction)
    scramble_centers(contraction, np.random.default_rng(5))
    assert certify_contraction(contraction) == block
    contraction.pre_center, contraction.centers = None, nnx.List()
    assert certify_contraction(contraction) == block
