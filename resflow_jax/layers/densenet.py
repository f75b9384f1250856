"""The contraction of an invertible DenseNet: every layer is concatenated to what came before it.

    h_0 = x (or W_0 x + b_0),   h_i = c [eta1 h_(i-1), eta2 phi(W_i h_(i-1) + b_i)],   g = W_(n+1) h_n + b_(n+1)
    eta1 = s1 / sqrt(s1^2 + s2^2),   eta2 = s2 / sqrt(s1^2 + s2^2),   s = softplus(learnable) + 0.1

Perugachi-Diaz et al. (2021, arXiv 2102.02694), section 3: a concatenation [h_1, h_2] has Lipschitz
constant at most sqrt(L_1^2 + L_2^2), so the normalised weights keep that of each dense layer at or below
one. The coefficient c and the offset 0.1 are those of the authors' implementation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.activations import Activation
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.functional.texts import constructor
from resflow_jax.layers.conditioning import Conditioning, Gate
from resflow_jax.layers.contraction import Contraction, constrained, learnable
from resflow_jax.layers.lipschitz import LipschitzLinear
from resflow_jax.layers.module import List

Array = jax.Array

_OFFSET = 0.1


class DenseNetOfMaps(Contraction):
    """g of dense layers with learnable concatenation, and a final linear layer that returns to the shape of x."""

    def __init__(
        self,
        first: LinearMap | None,
        dense: Sequence[LinearMap],
        last: LinearMap,
        activation: Activation,
        coefficient: float,
        *,
        condition_shape: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        """Takes the maps of the layer before the dense layers (if any), of the dense layers, and of the last layer.

        coefficient: bound on each linear layer's norm and on each dense layer's Lipschitz constant.
        """
        maps = [*([first] if first else []), *dense, last]
        # A steep activation lowers the bound on the layer before it: phi(W_i h) then keeps the constant c.
        slopes = [((1.0,),)] * (len(maps) - len(dense) - 1) + [activation.steepest] * len(dense) + [((1.0,),)]
        self.linears = List(
            LipschitzLinear(linear_map, coefficient, slopes=s, rngs=rngs)
            for linear_map, s in zip(maps, slopes, strict=True)
        )
        self.activation = activation
        self.activation_params = learnable(activation, len(dense))
        self.concatenation = nnx.Param(jnp.ones((len(dense), 2)))
        self.coefficient = coefficient
        self.lipschitz = coefficient ** len(maps)
        self.event_shape = last.example_shape
        self.condition_shape = condition_shape
        channels = [linear_map.kernel_shape[-1] for linear_map in maps]
        self.conditioning = Conditioning(condition_shape, channels, rngs=rngs) if condition_shape is not None else None

    def condition_features(self, condition: Array | None) -> list[Gate] | None:
        return None if self.conditioning is None else self.conditioning(condition)

    def weights(self) -> Any:
        linears = [linear.weights() for linear in self.linears]
        etas = self.coefficient * normalized_concatenation(self.concatenation[...])
        channels = [linear.linear_map.kernel_shape[-1] for linear in self.linears[-1 - len(etas) : -1]]
        return linears, constrained(self.activation, self.activation_params, channels), etas

    def apply(self, weights: Any, x: Array, features: list[Gate] | None = None) -> Array:
        linears, activations, etas = weights
        gates = [None] * len(linears) if features is None else features
        before = len(linears) - len(activations) - 1
        for layer, linear, gate in zip(self.linears[:before], linears, gates, strict=False):
            x = layer.apply(linear, x, gate)
        inside = slice(before, -1)
        parts = self.linears[inside], linears[inside], activations, etas, gates[inside]
        for layer, linear, params, eta, gate in zip(*parts, strict=True):
            new = self.activation.function(params, layer.apply(linear, x, gate))
            x = jnp.concatenate([eta[0] * x, eta[1] * new], axis=-1)
        return self.linears[-1].apply(linears[-1], x, gates[-1])

    def _repr_text(self, text: Callable[[Any], str]) -> str:
        if type(self).__init__ is not DenseNetOfMaps.__init__:  # a subclass with other arguments
            return constructor(self, text)
        kernels = [linear.linear_map.kernel_shape for linear in self.linears]
        depth = len(self.activation_params)
        features, growth = kernels[0][-2], kernels[-1][-2] - kernels[-2][-2]
        before = f"{features} -> {kernels[0][-1]}" if len(kernels) > depth + 1 else features
        sides = f" by {'x'.join(map(str, kernels[-2][:-2]))}" if kernels[-2][:-2] else ""
        maps = f"{before} + {depth} x {growth} -> {kernels[-1][-1]}{sides}"
        return f"{type(self).__name__}({maps}, {text(self.activation)}, {text(self.coefficient)})"

    def bound(self, norms: Sequence[float], orders: Sequence[float]) -> float:
        """As in the interface; all orders are 2. Each dense layer counts with its own weights."""
        etas = self.coefficient * normalized_concatenation(np.asarray(self.concatenation[...], np.float64))
        before = len(norms) - len(etas) - 1
        new = [self.activation.lipschitz * norm for norm in norms[before:-1]]
        dense = [math.hypot(eta1, eta2 * lipschitz) for (eta1, eta2), lipschitz in zip(etas, new, strict=True)]
        return math.prod([*norms[:before], *dense, norms[-1]])


def normalized_concatenation(raw: Array) -> Array:
    """(eta1, eta2) of unit length, [..., 2], from the learnable parameters [..., 2]; for arrays of JAX or NumPy."""
    xp = np if isinstance(raw, np.ndarray) else jnp
    positive = xp.logaddexp(raw, 0) + _OFFSET
    return positive / xp.linalg.norm(positive, axis=-1, keepdims=True)
