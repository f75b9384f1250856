"""Padding with noise: what is appended, and that the estimates of p(x) are unbiased where they say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.stats import norm

import resflow_jax as rf
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.padding import ChannelPadding
from tests.functional.contractions import z_scores

NOISES = ["uniform", "gaussian"]
SCALES = [(1.0, 0.0), (4.0, -3.0)]  # and shifts


def log_prob(flow, x, key):
    """log N(z; 0, I) + log_det [B], with fresh noise for every example."""
    z, log_det = flow.forward(x, key=key, estimator=rf.Exact())
    return jnp.sum(norm.logpdf(z), axis=tuple(range(1, z.ndim))) + log_det


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("shape", "scale", "shift"), [((3,), 1.0, 0.0), ((3,), 4.0, -3.0), ((4, 4, 3), 1.0, 0.0)])
def test_appends_noise_and_drops_it(noise, shape, scale, shift):
    """x comes first, then noise of the law asked for; log_det = -log q; the inverse gives x back."""
    layer = ChannelPadding(2, noise, scale, shift)
    x = jax.random.normal(jax.random.key(0), (500, *shape), jnp.float32)
    y, log_det, diagnostics = layer.forward(x, key=jax.random.key(1), return_diagnostics=True)
    assert y.shape == (500, *shape[:-1], 5) and y.dtype == log_det.dtype == jnp.float32
    assert diagnostics.length.shape == (0,)
    np.testing.assert_array_equal(y[..., :3], x)
    e = (np.asarray(y[..., 3:], float) - shift) / scale
    moments = {"uniform": (1 / 2, 1 / 3), "gaussian": (0, 1)}[noise]
    assert np.abs(z_scores(np.stack([e.ravel(), e.ravel() ** 2], axis=1), moments)).max() < 4
    assert noise == "gaussian" or (e.min() >= 0 and e.max() <= 1)
    density = {"uniform": np.zeros_like, "gaussian": norm.logpdf}[noise](e) - np.log(scale)
    np.testing.assert_allclose(log_det, -density.reshape(500, -1).sum(1), rtol=1e-5, atol=1e-6)
    back, status = layer.inverse(y, return_status=True)
    np.testing.assert_array_equal(back, x)
    assert status.converged.shape == (0, 500)
    assert not np.allclose(e[0], e[1]), "every example has noise of its own"


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("scale", "shift"), SCALES)
def test_without_a_key(noise, scale, shift):
    """A call appends the noise's mean; initialisation and statistics see spread noise, the same every time."""
    layer, x = ChannelPadding(2, noise, scale, shift), jnp.ones((300, 3))
    mean = shift + scale * {"uniform": 0.5, "gaussian": 0.0}[noise]
    np.testing.assert_array_equal(layer(x)[:, 3:], mean)
    y = layer.initialize(x)
    np.testing.assert_array_equal(layer.update_statistics(x), y)
    np.testing.assert_array_equal(y[:, :3], x)
    deviation = scale * {"uniform": 12**-0.5, "gaussian": 1.0}[noise]
    np.testing.assert_allclose(jnp.std(y[:, 3:], 0), deviation, rtol=0.1)
    np.testing.assert_allclose(jnp.mean(y[:, 3:], 0), mean, atol=0.2 * deviation)
    with pytest.raises(ValueError, match="key: expected a PRNG key to draw the padding's noise, got None"):
        layer.forward(x)


def test_gaussian_padding_of_the_identity_is_exact():
    """p(x, e) / q(e) = N(x) for every e: no bound, no variance."""
    x = jax.random.normal(jax.random.key(0), (5, 3))
    estimate = log_prob(ChannelPadding(2, "gaussian"), x, jax.random.key(1))
    np.testing.assert_allclose(estimate, jnp.sum(norm.logpdf(x), axis=1), rtol=1e-12)


def linear_flow(*padding):
    """[x, e] W is standard normal, so [x, e] is normal of precision W W^T: the flow, and its p(x) for e in a box."""
    linear = InvertibleLinear(2, rngs=nnx.Rngs(0))
    linear.log_scale[...] += jnp.asarray([0.1, 0.2])
    linear.upper[...] += 0.2
    precision = linear.weight() @ linear.weight().T

    def density(x, low, high):
        a, b, c = precision[0, 0], precision[0, 1], precision[1, 1]
        marginal = norm.pdf(x, scale=(a - b**2 / c) ** -0.5)
        ends = [norm.cdf(end, loc=-b / c * x, scale=c**-0.5) for end in (low, high)]  # e given x
        return marginal * (ends[1] - ends[0])

    return Chain([ChannelPadding(1, *padding), linear]), density


EVERYWHERE = -np.inf, np.inf


@pytest.mark.parametrize(
    ("padding", "box"),
    [
        (("uniform",), (0.0, 1.0)),
        (("gaussian",), EVERYWHERE),
        (("uniform", 2.0, -0.5), (-0.5, 1.5)),
        (("gaussian", 1.5, 0.4), EVERYWHERE),
    ],
)
@pytest.mark.parametrize("value", [-1.0, 0.3])
def test_mean_density_over_noise_is_that_of_the_model(padding, box, value):
    """E_q[p(x, e) / q(e)] is p(x) of a normal model; with uniform noise that of e in its box. The mean log is lower."""
    flow, density = linear_flow(*padding)
    samples = log_prob(flow, jnp.full((40_000, 1), value), jax.random.key(2))
    expected = density(value, *box)
    assert abs(z_scores(jnp.exp(samples), expected)) < 4
    assert jnp.std(samples) > 0.01 and jnp.mean(samples) < jnp.log(expected)
    assert expected <= density(value, *EVERYWHERE)


@pytest.mark.parametrize("layer", [ChannelPadding(2), rf.ZeroPadding(2)])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 2)])
def test_an_inverse_needs_more_channels_than_were_appended(layer, shape):
    """No x has so few."""
    with pytest.raises(ValueError, match=r"^y: expected events of more than 2 channels, got shape \("):
        layer.inverse(jnp.ones((4, *shape)))
    assert rf.Chain([layer]).inverse(jnp.ones((4, *shape[:-1], 3))).shape == (4, *shape[:-1], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "channels: expected an integer of at least 1, got 0"),
        ((1, "normal"), "noise: expected one of uniform, gaussian; got 'normal'"),
        ((1, "uniform", 0.0), "scale: expected a positive number, got 0.0"),
    ],
)
def test_bad_input(arguments, message):
    """The error names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        ChannelPadding(*arguments)
