"""`VariationalDequantization`: the noise of integer pixels from a small conditional flow.

For a density p of x = (k + u) / L, and any density q(u | k) on [0, 1)^D,

    log P(k) >= E_q[log p(x) - log q(u | k)] - D log L,   P(k) = integral of p over the cell of k

with equality where q is the posterior of u. Uniform noise has log q = 0. The bound is exact for the draw of u: q is a
flow u = sigmoid(h(e; k)), e from N(0, I), whose log-density comes with its sample. Ho et al. (2019, arXiv 1902.00275),
section 3.1 and equation 11.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.batch_axes import example_keys
from resflow_jax.functional.checks import as_float_batch, as_shape, check_count, check_key, check_type, shown
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.couplings.affine import AffineCoupling
from resflow_jax.layers.couplings.conditioners import ResNetConditioner
from resflow_jax.layers.diagonal_affine import Affine
from resflow_jax.layers.module import Module
from resflow_jax.models.bases import standard_normal_log_prob

Array = jax.Array

_SPREAD = 0.5  # log of the factor on e: a sigmoid of 1.65 e is close to uniform


class VariationalDequantization(Module):
    """The noise u in [0, 1] of images k / L, by a conditional flow q(u | k) of coupling layers.

    It belongs to a flow as `flow.dequantizer`, residual or not: `rf.Flow(..., dequantizer=...)`, or in a config
    `ImageTransform(dequantization=rf.Dequantization(...))`. Losses and evaluations of integer images then draw their
    noise from it, and subtract log q(u | k). Its parameters are trained with those of the flow.

        u = sigmoid(h(e; features(k))),   log q(u | k) = log N(e) - log|det du/de|

    Args:
      shape: (H, W, C) of one image, with at least two pixels.
      couplings: number of affine coupling layers, with alternating checkerboards.
      width: number of channels of their networks, and of the features of k.
      rngs: draws the parameters.

    Randomness: `rngs`; samples are drawn with a key, each example with its own. log q [B] is exact, in nats. Cost: one
    network for the features, and one for each coupling layer. No contraction is evaluated.

    Raises:
      ValueError: for another shape, fewer than two pixels, and numbers below one.

    Source: Ho et al. (2019, arXiv 1902.00275), section 3.1.

    Example:
      >>> noise = rf.VariationalDequantization((2, 2, 1), couplings=2, width=4, rngs=nnx.Rngs(0))
      >>> flow = rf.Flow(rf.Chain([rf.Logit(0.05), rf.Flatten((2, 2, 1))]), dequantizer=noise)
      >>> images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
      >>> found = rf.evaluate_bits_per_dim(flow, images, jax.random.key(0), levels=8)
      >>> bool(np.isfinite(found.mean))
      True
    """

    def __init__(self, shape: tuple[int, int, int], couplings: int = 4, width: int = 32, *, rngs: nnx.Rngs):
        self.shape = as_shape("shape", shape)
        if len(self.shape) != 3:
            raise ValueError(f"shape: expected (H, W, C), got {self.shape}")
        check_count("couplings", couplings, 1)
        check_count("width", width, 1)
        check_type("rngs", rngs, nnx.Rngs)
        self.couplings, self.width = couplings, width
        features = (*self.shape[:2], width)
        self.encoder = ResNetConditioner(width, 1, zero=False).build(self.shape, features, None, rngs=rngs)
        start = Affine(self.shape)
        start.log_scale[...] = jnp.full_like(start.log_scale[...], _SPREAD)
        network = ResNetConditioner(width, 1)
        layers = [
            AffineCoupling(self.shape, network, "checkerboard", bool(n % 2), features, rngs=rngs)
            for n in range(couplings)
        ]
        self.layers = Chain([start, *layers])

    @classmethod
    def of(cls, config: Any, *, rngs: nnx.Rngs) -> "VariationalDequantization":
        """The noise that `config.data.dequantization` selects, for a config of a flow of images."""
        settings = config.data.dequantization
        return cls(config.shape, settings.couplings, settings.width, rngs=rngs)

    def sample(self, x: Array, key: Array) -> tuple[Array, Array]:
        """Draws u for images x [B, H, W, C] in [0, 1], the middles of the pixels' cells, with one key for each.

        Returns:
          (u, log_q): u [B, H, W, C] in [0, 1], and log q(u | x) [B] in nats.
        """
        x = as_float_batch("x", x, self.shape)
        check_key("key", key)
        dtype = self.layers.bijectors[0].shift.dtype
        draw = jax.vmap(lambda key: jax.random.normal(key, self.shape, dtype))
        e = draw(example_keys(key, x))
        h, log_det = self.layers.forward(e, condition=self._features(x.astype(dtype)))
        return jax.nn.sigmoid(h), standard_normal_log_prob(e) - log_det - _log_slope(h)

    def log_prob(self, u: Array, x: Array) -> Array:
        """log q(u | x) [B] in nats of u [B, H, W, C] in (0, 1), for images x as in `sample`."""
        u, x = as_float_batch("u", u, self.shape), as_float_batch("x", x, self.shape)
        h = jnp.log(u) - jnp.log1p(-u)
        e = self.layers.inverse(h, condition=self._features(x))
        log_det = self.layers.forward(e, condition=self._features(x))[1]
        return standard_normal_log_prob(e) - log_det - _log_slope(h)

    def _features(self, x: Array) -> Array:
        return self.encoder(2 * x - 1)


def _log_slope(h: Array) -> Array:
    """log|det| of the sigmoid at h, [B]."""
    return jnp.sum(jax.nn.log_sigmoid(h) + jax.nn.log_sigmoid(-h), axis=tuple(range(1, h.ndim)))


def check_dequantizer(dequantizer: Any, event_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless it can draw noise and, if it has a shape, takes images of this shape."""
    if isinstance(dequantizer, type) or not callable(getattr(dequantizer, "sample", None)):
        raise ValueError(
            f"dequantizer: expected an rf.VariationalDequantization, or a module with its method sample(x, key), got "
            f"{shown(dequantizer)}"
        )
    shape = getattr(dequantizer, "shape", event_shape)
    if tuple(shape) != event_shape:
        raise ValueError(f"dequantizer: expected images of shape {event_shape}, got shape {shape}")
