"""Channels of noise appended to x: an injective layer that gives a flow more dimensions.

    y = [x, e],   e = shift + scale * n,   n ~ U(0, 1) or N(0, 1),   log_det = -log q(e)

for all appended elements, q the density of e.

For a bijection f of [x, e], log N(f(x, e)) + log|det df| + log_det = log p(x, e) / q(e), with p(x, e)
the density that f models:

    E_q[p(x, e) / q(e)] = p(x),   E_q[log p(x, e) / q(e)] <= log p(x)

The first follows by integration over e, the second by Jensen's inequality. So the log p(x) of a flow with this layer
is a lower bound in expectation, and the mean of its exponential over draws of the noise is an unbiased estimate of
p(x) (Huang et al. 2020, arXiv 2002.07101). Uniform noise covers only part of the space of e. There p(x) is replaced by
p(x, e in that part) <= p(x), with equality if p(x, e) is zero outside.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from resflow_jax.functional.batch_axes import example_keys
from resflow_jax.functional.checks import check_choice, check_count, check_finite, check_positive
from resflow_jax.functional.estimators import Estimator
from resflow_jax.layers.bijector import Bijector, Forward, Shape
from resflow_jax.layers.without_log_det import NoBijection

Array = jax.Array

Noise = Literal["uniform", "gaussian"]
NOISES = get_args(Noise)


class ChannelPadding(Bijector):
    """Appends channels of noise to x: [B, ..., C] -> [B, ..., C + channels].

        y = [x, e],   e = shift + scale * n,   x = y without the last channels,   log_det = -log q(e)

    It is not a bijection: see `layers.padding` for the density of a flow with this layer.

    Args:
      channels: number of channels to append.
      noise: distribution of n: "uniform" on [0, 1] or "gaussian" (standard normal).
      scale: positive factor on n.
      shift: added to scale * n.

    Randomness: `forward` draws the noise with its key, whatever the estimator. `__call__` appends the mean of the
    noise; `initialize` and `update_statistics` use one fixed draw. log_det [B] in nats makes the flow's log p(x) a
    lower bound in expectation. Cost: one draw for each appended element.

    Raises:
      ValueError: for fewer than one channel, an unknown noise, a scale that is not positive; from `forward` without
        key.

    Source: Huang et al. (2020, arXiv 2002.07101).

    Example:
      >>> layer = rf.ChannelPadding(2)
      >>> y, log_det = layer.forward(jnp.zeros((3, 4)), key=jax.random.key(0))
      >>> y.shape, log_det.tolist(), layer.inverse(y).shape
      ((3, 6), [0.0, 0.0, 0.0], (3, 4))
    """

    takes_noise = True
    pads = True

    def __init__(self, channels: int, noise: str = "uniform", scale: float = 1.0, shift: float = 0.0):
        check_count("channels", channels, 1)
        check_choice("noise", noise, NOISES)
        check_positive("scale", scale)
        check_finite("shift", shift)
        self.channels = channels
        self.noise = noise
        self.scale = scale
        self.shift = shift

    def _draw(self, key: Array, x: Array) -> Array:
        """n [B, ..., channels], from one key for each example."""
        draw = jax.random.uniform if self.noise == "uniform" else jax.random.normal
        shape = *x.shape[1:-1], self.channels
        return jax.vmap(lambda key: draw(key, shape, x.dtype))(example_keys(key, x))

    def output_shape(self, shape: Shape) -> Shape:
        return *shape[:-1], shape[-1] + self.channels

    def input_shape(self, shape: Shape) -> Shape:
        return _without_padding(shape, self.channels)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        mean = 0.5 if self.noise == "uniform" else 0.0
        return self._append(x, jnp.full((*x.shape[:-1], self.channels), mean, x.dtype))

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        if key is None:
            raise ValueError("key: expected a PRNG key to draw the padding's noise, got None")
        noise = self._draw(key, x)
        log_det = jnp.full(x.shape[0], math.prod(noise.shape[1:]) * math.log(self.scale), x.dtype)
        if self.noise == "gaussian":
            log_det += 0.5 * jnp.sum(noise**2 + math.log(2 * math.pi), axis=tuple(range(1, x.ndim)))
        return self._append(x, noise), log_det, []

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return y[..., : -self.channels]

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        return self._append(x, self._draw(jax.random.key(0), x))

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        return self.initialize(x)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """Bounds for f with given noise, and for its inverse, which drops the noise."""
        return 1.0, 1.0

    def _append(self, x: Array, noise: Array) -> Array:
        return jnp.concatenate([x, self.shift + self.scale * noise], axis=-1)


class ZeroPadding(NoBijection):
    """Appends channels of zeros to x: [B, ..., C] -> [B, ..., C + channels]. An injective map, for classifiers.

        y = [x, 0],   x = y without the last channels

    Every x is recovered from y, but most y belong to no x: y has no density, and there is no log-det. `ChannelPadding`
    appends noise in their place, for densities.

    Args:
      channels: number of channels to append.

    Randomness: none. Cost: one copy of x.

    Raises:
      ValueError: for fewer than one channel; from `forward` and the log-densities of a flow, which do not exist.

    Source: Behrmann et al. (2019, arXiv 1811.00995), section 4.1; injective padding: Jacobsen et al. (2018, arXiv
    1802.07088).

    Example:
      >>> layer = rf.ZeroPadding(2)
      >>> y = layer(jnp.ones((3, 1)))
      >>> y[0].tolist(), layer.inverse(y)[0].tolist()
      ([1.0, 0.0, 0.0], [1.0])
    """

    reason = "appended zeros make it an injective map, onto a set of volume zero; ChannelPadding has a density"

    def __init__(self, channels: int):
        check_count("channels", channels, 1)
        self.channels = channels

    def output_shape(self, shape: Shape) -> Shape:
        return *shape[:-1], shape[-1] + self.channels

    def input_shape(self, shape: Shape) -> Shape:
        return _without_padding(shape, self.channels)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.channels)])

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return y[..., : -self.channels]

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


def _without_padding(shape: Shape, channels: int) -> Shape:
    """The shape of one x of events y with so many appended channels."""
    if not shape or shape[-1] <= channels:
        raise ValueError(f"expected events of more than {channels} channels, got shape {tuple(shape)}")
    return *shape[:-1], shape[-1] - channels
