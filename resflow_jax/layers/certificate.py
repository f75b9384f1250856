"""Certified Lipschitz bounds of residual blocks, and the rescaling that brings a block within its promise.

    |g(a) - g(b)|_p <= L |a - b|_p,   L < 1:   f(x) = x + g(x) is invertible, with
    Lip(f) <= 1 + L,   Lip(f^-1) <= 1 / (1 - L)

(Behrmann et al. 2019, arXiv 1811.00995, theorem 1 and lemma 2). Power iteration knows norms from
below, and only as well as it has converged; here every norm is bounded from above
(`functional.certificate`), in float64 on the host, from the kernels as the layers apply them.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.certificate import induced_norm_bound
from resflow_jax.layers.bijector import Bijector, Chain
from resflow_jax.layers.contraction import Contraction
from resflow_jax.layers.residual import ResidualBlock, ResidualStack


@dataclass(frozen=True)
class LayerCertificate:
    """The bound of one linear layer.

    Attributes:
      norm: upper bound on the norm of the normalised kernel, from order `domain` to order `codomain`.
      coefficient: what the layer promises for it.
      domain: order of the norm on the layer's input; 2 for the spectral norm.
      codomain: order of the norm on its output.
    """

    norm: float
    coefficient: float
    domain: float
    codomain: float


@dataclass(frozen=True)
class BlockCertificate:
    """The bound of one residual block.

    Attributes:
      bound: L, upper bound on Lip(g) in the norm of order `order`; the block is invertible if L < 1.
      promised: what the coefficients promise for Lip(g).
      order: of the norm in which g has this constant.
      dim: number of elements of the block's input.
      layers: the linear layers, from the input to the output.
    """

    bound: float
    promised: float
    order: float
    dim: int
    layers: tuple[LayerCertificate, ...]

    @property
    def lipschitz(self) -> float:
        """Bound on Lip(f) in the 2-norm."""
        return (1 + self.bound) * self._conversion

    @property
    def inverse_lipschitz(self) -> float:
        """Bound on Lip(f^-1) in the 2-norm; infinite if the block is not certified."""
        return self._conversion / (1 - self.bound) if self.bound < 1 else math.inf

    @property
    def _conversion(self) -> float:
        # |x|_2 <= D^max(0, 1/2 - 1/p) |x|_p and |x|_p <= D^max(0, 1/p - 1/2) |x|_2: one exponent is zero.
        return self.dim ** abs(0.5 - 1 / self.order)


def certify_contraction(contraction: Contraction) -> BlockCertificate:
    """The bound of one contraction g, in its own norms or in the 2-norm, whichever is smaller."""
    linears = list(contraction.linears)
    own = (linears[0].orders()[0], *(linear.orders()[1] for linear in linears))
    dim = linears[-1].linear_map.copies * math.prod(linears[-1].linear_map.output_shape)
    kernels = [np.asarray(linear.weights()[0], np.float64) for linear in linears]
    candidates = []
    for orders in {own, (2.0,) * len(own)}:
        layers = tuple(
            LayerCertificate(induced_norm_bound(linear.linear_map, kernel, p, q), linear.coefficient, p, q)
            for linear, kernel, p, q in zip(linears, kernels, orders[:-1], orders[1:], strict=True)
        )
        bound = contraction.bound([layer.norm for layer in layers], orders)
        # |g(a) - g(b)| is bounded in the last norm and wanted in the first.
        bound *= dim ** max(0.0, 1 / orders[0] - 1 / orders[-1])
        candidates.append(BlockCertificate(bound, contraction.lipschitz, orders[0], dim, layers))
    return min(candidates, key=lambda block: block.bound)


def lipschitz_bounds(bijector: Bijector, blocks: list[BlockCertificate]) -> tuple[float, float]:
    """Bounds on Lip(f) and Lip(f^-1) in the 2-norm; appends the certificates of all residual blocks inside."""
    if isinstance(bijector, ResidualBlock):
        block = certify_contraction(bijector.contraction)
        blocks.append(block)
        return block.lipschitz, block.inverse_lipschitz
    if isinstance(bijector, Chain | ResidualStack):
        parts = bijector.bijectors if isinstance(bijector, Chain) else bijector.unstacked()
        bounds = [lipschitz_bounds(part, blocks) for part in parts]
        return math.prod(forward for forward, _ in bounds), math.prod(inverse for _, inverse in bounds)
    return bijector.lipschitz_bounds()


def tighten(bijector: Bijector) -> None:
    """Rescales the kernels of all residual blocks inside, in place, so that each is certified within its promise."""
    if isinstance(bijector, ResidualBlock):
        tighten_contraction(bijector.contraction)
    elif isinstance(bijector, Chain):
        for part in bijector.bijectors:
            tighten(part)
    elif isinstance(bijector, ResidualStack):
        parts = bijector.unstacked()
        for part in parts:
            tighten(part)
        bijector.restack(parts)


def tighten_contraction(contraction: Contraction) -> None:
    """Unless it is within its promise: rescales each kernel to its coefficient, and the last as far as is left."""
    block = certify_contraction(contraction)
    if block.bound <= block.promised:
        return
    factors = [layer.coefficient / max(layer.coefficient, layer.norm) for layer in block.layers]
    orders = [block.order, *(layer.codomain for layer in block.layers)]
    norms = [factor * layer.norm for factor, layer in zip(factors, block.layers, strict=True)]
    scaled = contraction.bound(norms, orders) * block.dim ** max(0.0, 1 / orders[0] - 1 / orders[-1])
    factors[-1] *= min(1.0, block.promised / scaled)
    for linear, factor in zip(contraction.linears, factors, strict=True):
        if factor < 1:
            rounding = 64 * float(jnp.finfo(linear.kernel[...].dtype).eps)
            linear.rescale(factor * (1 - rounding))
