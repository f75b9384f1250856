"""Channels of noise beside those of x: an injective layer that gives a flow more room.

    y = [x, e],   e = shift + scale * n,   n ~ U(0, 1) or N(0, 1),   log_det = -log q(e)

of every added element, q the density of e.

For a bijection f of [x, e], log N(f(x, e)) + log|det df| + log_det = log p(x, e) / q(e), with p(x, e)
the density that f models:

    E_q[p(x, e) / q(e)] = p(x),   E_q[log p(x, e) / q(e)] <= log p(x)

the first by integration over e, the second by Jensen's inequality: what a flow with this layer returns
as log p(x) is a lower bound in expectation, and the mean of its exponential over draws of the noise is an
unbiased estimate of p(x) (Huang et al. 2020, arXiv 2002.07101). Uniform noise covers only part of the
space of e: there p(x) stands for p(x, e in that part) <= p(x), with equality where p(x, e) is zero outside.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from resflow_jax.functional.batch_axes import example_keys
from resflow_jax.functional.checks import check_choice, check_count, check_positive
from resflow_jax.functional.estimators import Estimator
from resflow_jax.layers.bijector import Bijector, Forward, Shape

Array = jax.Array

Noise = Literal["uniform", "gaussian"]
NOISES = get_args(Noise)


class ChannelPadding(Bijector):
    """[B, ..., C] -> [B, ..., C + channels] by noise; its inverse drops it. See the module's head.

    `forward` draws the noise with its key, whatever the estimator. `__call__` takes the noise's mean
    in its place; `initialize` and `update_statistics` one fixed draw.
    """

    takes_noise = True
    pads = True

    def __init__(self, channels: int, noise: str = "uniform", scale: float = 1.0, shift: float = 0.0):
        """channels: how many are added; noise: of n, "uniform" on [0, 1] or standard "gaussian"."""
        check_count("channels", channels, 1)
        check_choice("noise", noise, NOISES)
        check_positive("scale", scale)
        self.channels = channels
        self.noise = noise
        self.scale = scale
        self.shift = shift

    def _draw(self, key: Array, x: Array) -> Array:
        """n for every example."""
        draw = jax.random.uniform if self.noise == "uniform" else jax.random.normal
        shape = *x.shape[1:-1], self.channels
        return jax.vmap(lambda key: draw(key, shape, x.dtype))(example_keys(key, x))

    def output_shape(self, shape: Shape) -> Shape:
        return *shape[:-1], shape[-1] + self.channels

    def input_shape(self, shape: Shape) -> Shape:
        return *shape[:-1], shape[-1] - self.channels

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
        """Of f for given noise, and of dropping it."""
        return 1.0, 1.0

    def _append(self, x: Array, noise: Array) -> Array:
        return jnp.concatenate([x, self.shift + self.scale * noise], axis=-1)
