"""The contraction g inside a residual block: its interface, and the chain of layers of the papers.

    g = h_n o phi o ... o phi o h_1 (o phi with pre-activation),   Lip(g) <= prod_i |W_i| * prod_i Lip(phi_i)

(Chen et al. 2019, arXiv 1906.02735, section 3.2 and appendix E; pre-activation as in He et al.
2016). With mixed norms (section 3.3) layer i maps the norm of order p_i to that of order p_(i+1),
and each activation acts in the norm of its place.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.activations import Activation
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.layers.lipschitz import LipschitzLinear, Order
from resflow_jax.layers.module import Dict, List, Module
from resflow_jax.layers.normalization import MovingCentering

Array = jax.Array
Params = dict[str, Array]

_CACHED = 2**16  # numbers: a quarter of a MB in float32, a few of which the one or two MB of a core's L2 cache hold


class Contraction(Module):
    """Interface of g on [B, ...], which keeps the shape; subclasses are final.

    Attributes:
      linears: its Lipschitz layers, from the input to the output.
      promised: what their coefficients promise for the norm of g from the first order to the last, in (0, 1).
      is_closed: whether that is a promise for Lip(g): unless the last order is above the first.
    """

    linears: Sequence[LipschitzLinear]
    promised: float
    is_closed: bool = True

    @property
    def chunk_size(self) -> int:
        """How many examples to take at a time on a CPU, for its cache to hold a layer's output."""
        widest = max(math.prod(linear.linear_map.example_shape) for linear in self.linears)
        return max(1, _CACHED // widest)

    def weights(self) -> Any:
        """Normalised kernels, biases and all other parameters in the form that `apply` takes, the same for every x."""
        raise NotImplementedError

    def apply(self, weights: Any, x: Array) -> Array:
        """g(x) with given weights; depends on no parameter of the module itself."""
        raise NotImplementedError

    def move_statistics(self, x: Array, share: float | None = None) -> None:
        """Moves running statistics inside towards those of a batch, in place, by their own share or the given one."""

    def bound(self, norms: Sequence[float], orders: Sequence[float]) -> float:
        """Bound on Lip(g) from bounds on the layers' norms, layer i between orders i and i + 1; on the host."""
        raise NotImplementedError


class Layered(Contraction):
    """Lipschitz layers with an activation between any two, and before the first with pre-activation.

    With centering a `MovingCentering` per channel stands before the first activation of a pre-activation, and behind
    every linear layer.
    """

    def __init__(
        self,
        linear_maps: Sequence[LinearMap],
        activation: Activation,
        coefficient: float,
        *,
        preactivation: bool,
        norms: Sequence[Order] | None = None,
        centering: bool = False,
        rngs: nnx.Rngs,
    ):
        """coefficient: bound on each layer's norm; norms: the orders, one more than layers, all 2 by default."""
        norms = [2.0] * (len(linear_maps) + 1) if norms is None else norms
        slopes = [activation.slopes if n or preactivation else (1.0,) for n in range(len(linear_maps))]
        self.linears = List(
            LipschitzLinear(linear_map, coefficient, domain=p, codomain=q, slopes=s, rngs=rngs)
            for linear_map, p, q, s in zip(linear_maps, norms[:-1], norms[1:], slopes, strict=True)
        )
        self.activation = activation
        self.preactivation = preactivation
        self.activation_params = learnable(activation, len(linear_maps) - (not preactivation))
        self.pre_center = MovingCentering(linear_maps[-1].kernel_shape[-1:]) if centering and preactivation else None
        self.centers = List(MovingCentering(m.kernel_shape[-1:]) for m in linear_maps if centering)
        self.promised = coefficient ** len(self.linears) * min(1.0, activation.lipschitz) ** len(self.activation_params)
        fixed = not isinstance(norms[0], nnx.Param)
        self.is_closed = norms[0] is norms[-1] or (fixed and norms[0] >= norms[-1])

    def weights(self) -> tuple[Array | None, list[tuple[Array, Array]], list[Params]]:
        behind = self.linears[not self.preactivation :]
        channels = [linear.linear_map.kernel_shape[-2] // self.activation.expansion for linear in behind]
        activations = constrained(self.activation, self.activation_params, channels)
        linears = [linear.weights() for linear in self.linears]
        if self.centers:
            shifts = [center.shift() for center in self.centers]
            linears = [(kernel, bias + shift) for (kernel, bias), shift in zip(linears, shifts, strict=True)]
        return self.pre_center and self.pre_center.shift(), linears, activations

    def apply(self, weights: tuple[Array | None, list[tuple[Array, Array]], list[Params]], x: Array) -> Array:
        shift, linears, activations = weights
        if shift is not None:
            x = x + trailing(shift, x)
        if self.preactivation:
            x, activations = self.activation.function(activations[0], x), activations[1:]
        x = self.linears[0].apply(linears[0], x)
        for layer, linear, params in zip(self.linears[1:], linears[1:], activations, strict=True):
            x = layer.apply(linear, self.activation.function(params, x))
        return x

    def move_statistics(self, x: Array, share: float | None = None) -> None:
        if not self.centers:
            return
        activations = iter(self.weights()[2])
        if self.preactivation:
            self.pre_center.move(x, share)
            x = self.activation.function(next(activations), self.pre_center(x))
        for layer, center in zip(self.linears, self.centers, strict=True):
            x = layer(x)
            center.move(x, share)
            x = center(x)
            if layer is not self.linears[-1]:
                x = self.activation.function(next(activations), x)

    def bound(self, norms: Sequence[float], orders: Sequence[float]) -> float:
        places = orders[not self.preactivation : -1]
        return math.prod(norms) * math.prod(self.activation.lipschitz_in(p) for p in places)


def learnable(activation: Activation, number: int) -> List:
    """The learnable parameters of so many activations, at their initial values."""
    return List(
        Dict({name: nnx.Param(jnp.asarray(value, float)) for name, value in activation.initial}) for _ in range(number)
    )


def constrained(activation: Activation, params: List, channels: Sequence[int]) -> list[Params]:
    """What `activation.function` takes for inputs of so many channels each, of what `learnable` made."""
    raw = [{name: by_name[name][...] for name, _ in activation.initial} for by_name in params]
    return [activation.constrain(*pair) for pair in zip(raw, channels, strict=True)]
