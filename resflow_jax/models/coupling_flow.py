"""`CouplingFlow`: the flow of coupling layers that a config describes."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.couplings.affine import AdditiveCoupling, AffineCoupling
from resflow_jax.layers.couplings.coupling import Coupling
from resflow_jax.layers.couplings.masks import checkerboard
from resflow_jax.layers.couplings.mixture import MixtureCoupling
from resflow_jax.layers.couplings.spline import SplineCoupling
from resflow_jax.layers.diagonal_affine import Affine
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.multi_scale import MultiScale
from resflow_jax.layers.residual import ResidualStack
from resflow_jax.layers.shapes import Flatten, Permutation, Squeeze
from resflow_jax.models.coupling_config import CouplingFlowConfig
from resflow_jax.models.recipe import RecipeFlow, first_layers
from resflow_jax.models.residual_flow import flow_from_config

Array = jax.Array
Shape = tuple[int, ...]


class CouplingFlow(RecipeFlow):
    """The flow of coupling layers of a config: z = f(x; c) [B, D] from N(0, I).

    Its inverse is as fast as f, and exact but for the layers of "mixture", which report a status. It needs no
    estimator: log-densities are exact, in nats, and take no key unless the flow pads x. There is no bound on its
    Lipschitz constants (`certify`). z is ordered as that of a `ResidualFlow`. Methods and errors are those of `Flow`.

    Args:
      config: a `CouplingFlowConfig`, for example one of its presets.
      rngs: `rngs.params` draws the parameters.

    Randomness: none but in samples and padding. Cost: one pass through every network, in either direction.

    Raises:
      ValueError: for another config, and for rngs without a stream for parameters.

    Source: see `CouplingFlowConfig`.

    Example:
      >>> flow = rf.CouplingFlow(rf.CouplingFlowConfig.real_nvp((2,), couplings=2), rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (8, 2))
      >>> flow.initialize(x)
      >>> flow.log_prob(x).shape, flow.sample(jax.random.key(1), 3).shape
      ((8,), (3, 2))
    """

    _config_type = CouplingFlowConfig

    @staticmethod
    def _build(config: CouplingFlowConfig, rngs: nnx.Rngs) -> Bijector:
        layers, shape = first_layers(config)
        if not config.is_flat:
            return _image_bijector(config, layers, shape, rngs)
        if len(shape) > 1:
            even = checkerboard(shape).ravel()
            layers += [Flatten(shape), Permutation(np.argsort(~even, kind="stable"))]
            shape = (even.size,)
        layers += [ActNorm(shape), *_couplings(config, shape, "halves", config.couplings, rngs)]
        return Chain(layers + _last(config, shape))


@flow_from_config.register
def _(config: CouplingFlowConfig, *, rngs: nnx.Rngs) -> CouplingFlow:
    return CouplingFlow(config, rngs=rngs)


def _image_bijector(config: CouplingFlowConfig, layers: list[Bijector], shape: Shape, rngs: nnx.Rngs) -> Bijector:
    """The scales of a flow of images; `layers` come before all others."""
    scales, settings = [], config.scales
    for n in range(settings.squeezes):
        layers += _couplings(config, shape, "checkerboard", settings.checkerboard, rngs)
        squeeze = Squeeze(shape)
        shape = squeeze.output_shape(shape)
        layers += [squeeze, *_couplings(config, shape, "halves", config.couplings, rngs)]
        is_last = n == settings.squeezes - 1 and not settings.last
        scales.append(Chain(layers + (_last(config, shape) if is_last else [])))
        layers = []
        if settings.factor_out and not is_last:
            shape = (*shape[:2], shape[2] // 2)
    if settings.last:
        layers += _couplings(config, shape, "checkerboard", settings.last, rngs)
        scales.append(Chain(layers + _last(config, shape)))
    if settings.factor_out and len(scales) > 1:
        return MultiScale(scales, config.shape)
    return Chain([*scales, Flatten(shape)])


def _last(config: CouplingFlowConfig, shape: Shape) -> list[Bijector]:
    return [] if config.actnorm else [Affine(shape)]


def _couplings(config: CouplingFlowConfig, shape: Shape, mask: str, number: int, rngs: nnx.Rngs) -> list[Bijector]:
    """Coupling layers with the layers before each; equal ones run as one scan."""
    # A linear layer mixes halves. It does not mix pixels.
    flips = (False,) if config.linear and mask == "halves" else (False, True)
    repeats, rest = divmod(number, len(flips))

    def step(flips: tuple[bool, ...]) -> Callable[[nnx.Rngs], Chain]:
        def make(rngs: nnx.Rngs) -> Chain:
            layers: list[Bijector] = []
            for flipped in flips:
                layers += [ActNorm(shape[-1:])] if config.actnorm else []
                layers += [InvertibleLinear(shape[-1], rngs=rngs)] if config.linear and shape[-1] > 1 else []
                layers.append(_coupling(config, shape, mask, flipped, rngs))
            return Chain(layers)

        return make

    layers = [ResidualStack(step(flips), repeats, rngs=rngs)] if repeats else []
    return layers + ([step(flips[:rest])(rngs)] if rest else [])


def _coupling(config: CouplingFlowConfig, shape: Shape, mask: str, flipped: bool, rngs: nnx.Rngs) -> Coupling:
    kinds = {
        "additive": (AdditiveCoupling, {}),
        "affine": (AffineCoupling, {"scale": config.scale}),
        "spline": (SplineCoupling, {"bins": config.pieces}),
        "mixture": (MixtureCoupling, {"components": config.pieces}),
    }
    make, options = kinds[config.coupling]
    return make(shape, config.conditioner, mask, flipped, config.condition_dim, **options, rngs=rngs)
