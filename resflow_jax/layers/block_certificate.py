"""Certified Lipschitz bounds of residual blocks, and the rescaling that brings a block within its target.

    |g(a) - g(b)|_p <= L |a - b|_p,   L < 1:   f(x) = x + g(x) is invertible, with
    Lip(f) <= 1 + L,   Lip(f^-1) <= 1 / (1 - L)

(Behrmann et al. 2019, arXiv 1811.00995, theorem 1 and lemma 2). For a monotone block, x = (w + g(w)) / sqrt(2) and
y = (w - g(w)) / sqrt(2), both constants are at most (1 + L) / (1 - L), in every norm (Ahn et al. 2022, arXiv
2210.08176): |dy| <= (1 + L) |dw| / sqrt(2) and |dx| >= (1 - L) |dw| / sqrt(2), and the same for the inverse.

Power iteration underestimates norms, by more if it has converged less. Here every norm is bounded from above
(`functional.norm_bounds`), in float64 on the host, for the kernels as the layers apply them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.norm_bounds import induced_norm_bound
from resflow_jax.functional.texts import constructor, is_number, number, upper
from resflow_jax.layers.contraction import Contraction, Layered
from resflow_jax.layers.lipschitz import LipschitzLinear

Array = jax.Array

_ROUNDS = 10  # of `tighten_contraction`


@dataclass(frozen=True)
class LayerCertificate:
    """The certified norm of one linear layer inside a `BlockCertificate`. All values are Python floats without a unit.

    Attributes:
      norm: upper bound on the norm of the normalised kernel, from order `domain` to order `codomain`.
      coefficient: the largest norm that the normalisation aims at.
      domain: order of the norm on the layer's input; 2 for the spectral norm.
      codomain: order of the norm on its output.

    Randomness and cost: none; `certify` computes the values.

    Example:
      >>> rf.LayerCertificate(norm=0.9, coefficient=0.98, domain=2.0, codomain=2.0).norm
      0.9
    """

    norm: float
    coefficient: float
    domain: float
    codomain: float

    def __repr__(self) -> str:
        if not all(map(is_number, vars(self).values())):
            return constructor(self)
        orders = "" if self.domain == self.codomain == 2 else f" from order {self.domain:g} to {self.codomain:g}"
        return f"LayerCertificate: norm{orders} <= {upper(self.norm)} (coefficient {number(self.coefficient)})"


@dataclass(frozen=True)
class BlockCertificate:
    """The certified Lipschitz bound of one residual or monotone block f, as `certify` returns it.

    All numbers are Python floats without a unit.

    Attributes:
      bound: L, upper bound on Lip(g) in the norm of order `order`; the block is invertible if L < 1. It is infinite for
        an `UnconstrainedBlock` and a `StridedBlock`.
      target_bound: the bound that the coefficients of its layers set, which `tighten` enforces.
      order: order of the norm in which g has this constant.
      lipschitz: bound on Lip(f) in the 2-norm.
      inverse_lipschitz: bound on Lip(f^-1) in the 2-norm; infinite if the block is not certified.
      layers: a `LayerCertificate` for each linear layer, from the input to the output; empty if `bound` is infinite or
        stated by the user.
      is_proved: whether the bound is computed from the kernels, by `Contraction.bound`. Otherwise the user states it.

    Source: Behrmann et al. (2019, arXiv 1811.00995), theorem 1 and lemma 2.

    Example:
      >>> flow = rf.Flow(rf.ResidualBlock(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lipschitz=0.5, event_shape=(2,)))
      >>> block = rf.certify(flow).blocks[0]
      >>> block.bound, block.lipschitz, block.inverse_lipschitz, block.is_proved
      (0.5, 1.5, 2.0, False)
    """

    bound: float
    target_bound: float
    order: float
    lipschitz: float
    inverse_lipschitz: float
    layers: tuple[LayerCertificate, ...]
    is_proved: bool = True

    def __repr__(self) -> str:
        known = self.bound, self.target_bound, self.order, self.lipschitz, self.inverse_lipschitz
        if not all(map(is_number, known)) or not isinstance(self.layers, tuple):
            return constructor(self)
        order = "" if self.order == 2 else f" in the norm of order {self.order:g}"
        if not self.is_proved:
            reason = " (stated by the user, not proved)"
        elif not self.layers:
            reason = ""
        else:
            norms = ", ".join(upper(layer.norm) for layer in self.layers[:8])
            reason = f" (target {upper(self.target_bound)}) from norms {norms}{', ...' if len(self.layers) > 8 else ''}"
        return (
            f"BlockCertificate: Lip(g) <= {upper(self.bound)}{order}{reason}; "
            f"Lip(f) <= {upper(self.lipschitz)}, Lip(f^-1) <= {upper(self.inverse_lipschitz)}"
        )


def residual_bounds(bound: float) -> tuple[float, float]:
    """(Lip(f), Lip(f^-1)) of f(x) = x + g(x) with Lip(g) <= bound, in the norm of g."""
    return 1 + bound, 1 / (1 - bound) if bound < 1 else math.inf


def monotone_bounds(bound: float) -> tuple[float, float]:
    """(Lip(f), Lip(f^-1)) of the monotone map of g with Lip(g) <= bound, in the norm of g."""
    both = (1 + bound) / (1 - bound) if bound < 1 else math.inf
    return both, both


def certify_contraction(
    contraction: Contraction, bounds_of_map: Callable[[float], tuple[float, float]] = residual_bounds
) -> BlockCertificate:
    """The bounds of one contraction g and of f, in its own norms and in the 2-norm, and the smaller of both."""
    linears = list(contraction.linears)
    if not linears or contraction.bound([1.0] * len(linears), [2.0] * (len(linears) + 1)) is None:
        bound = contraction.lipschitz
        return BlockCertificate(bound, bound, 2.0, *bounds_of_map(bound), (), is_proved=False)
    own = (linears[0].orders()[0], *(linear.orders()[1] for linear in linears))
    kernels, limits = _kernels_and_limits(*nnx.split(linears))
    dim = _dim(contraction)
    candidates = []
    for orders in {own, (2.0,) * len(own)} if _holds_for_events(contraction, own) else {(2.0,) * len(own)}:
        layers = tuple(
            LayerCertificate(
                induced_norm_bound(linear.linear_map, np.asarray(kernel, np.float64), p, q), float(limit), p, q
            )
            for linear, kernel, limit, (p, q) in zip(linears, kernels, limits, pairwise(orders), strict=True)
        )
        bound = _closed_bound(contraction, [layer.norm for layer in layers], orders)
        # |x|_2 <= D^max(0, 1/2 - 1/p) |x|_p and |x|_p <= D^max(0, 1/p - 1/2) |x|_2: one exponent is zero.
        to_two_norm = dim ** abs(0.5 - 1 / orders[0])
        of_map = (to_two_norm * constant for constant in bounds_of_map(bound))
        candidates.append(BlockCertificate(bound, contraction.lipschitz, orders[0], *of_map, layers))
    return replace(
        min(candidates, key=lambda block: block.bound),
        lipschitz=min(block.lipschitz for block in candidates),
        inverse_lipschitz=min(block.inverse_lipschitz for block in candidates),
    )


# Compiled once for all blocks of one structure: one program instead of many small ones. It takes only the linear
# layers. A user's contraction may keep them where no graph of modules finds them, or have parts that do not hash.
@partial(jax.jit, static_argnums=0)
def _kernels_and_limits(graphdef: Any, state: Any) -> tuple[list[Array], list[Array]]:
    """The kernels of linear layers as they are applied, and the bounds on their norms."""
    linears = nnx.merge(graphdef, state)
    return [linear.weights()[0] for linear in linears], [linear.limit() for linear in linears]


def tighten_contraction(contraction: Contraction) -> None:
    """Scales each kernel to its limit, then the last by any remaining excess; no change if the bound is met already.

    Raises:
      RuntimeError: if the block is above its target bound after ten rounds. One or two rounds usually suffice. It
        fails if the dtype of the kernels is too coarse, or if `bound` does not fall with the norms of the layers.
    """
    block = certify_contraction(contraction)
    for _ in range(_ROUNDS):
        if block.bound <= block.target_bound:
            return
        factors = [layer.coefficient / max(layer.coefficient, layer.norm) for layer in block.layers]
        norms = [factor * layer.norm for factor, layer in zip(factors, block.layers, strict=True)]
        orders = [block.order, *(layer.codomain for layer in block.layers)]
        factors[-1] *= min(1.0, block.target_bound / _closed_bound(contraction, norms, orders))
        rounding = 64 * float(jnp.finfo(contraction.linears[0].kernel[...].dtype).eps)
        linears = list(contraction.linears)
        applied, _ = _kernels_and_limits(*nnx.split(linears))
        for linear, kernel, factor in zip(linears, applied, factors, strict=True):
            if factor < 1:
                _rescale(linear, kernel, factor * (1 - rounding))
        block = certify_contraction(contraction)
    if block.bound > block.target_bound:
        norms = ", ".join(f"{layer.norm:.6f}" for layer in block.layers)
        raise RuntimeError(
            f"tighten: expected a bound of at most {block.target_bound} after {_ROUNDS} rounds, got {block.bound} "
            f"(norms of its layers: {norms})"
        )


def _rescale(linear: LipschitzLinear, applied: Array, factor: float) -> None:
    """Replaces the kernel of a layer by `factor` <= 1 times the kernel that it applies, in place."""
    linear.kernel[...] = factor * applied


def _closed_bound(contraction: Contraction, norms: Sequence[float], orders: Sequence[float]) -> float:
    """Lip(g) in the norm of the first order, from the bound into the norm of the last order."""
    return contraction.bound(norms, orders) * _dim(contraction) ** max(0.0, 1 / orders[0] - 1 / orders[-1])


def _holds_for_events(contraction: Contraction, orders: Sequence[float]) -> bool:
    """Whether the norms of the layers are norms of maps of whole events.

    A user's contraction may apply a dense layer to each row of an event. From order p to q the map of the event has the
    norm of the layer only if p <= q.
    """
    return isinstance(contraction, Layered) or all(p <= q for p, q in pairwise(orders))


def _dim(contraction: Contraction) -> float:
    """Number of elements of g(x); infinite where it is not known."""
    return math.inf if contraction.event_shape is None else math.prod(contraction.event_shape)
