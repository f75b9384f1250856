"""Ordinary networks: linear layers or convolutions without a bound, for the parameters of other layers.

A condition enters in one of two ways. A vector c gives every hidden layer a gate and a shift for each channel, as in
`layers.conditioning`. A condition on the grid of the input joins its channels. Convolutions have the fast form of
`functional.primitives.convolution`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.activations import Activation
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.primitives.convolution import convolve
from resflow_jax.layers.conditioning import Conditioning, gated
from resflow_jax.layers.contraction import learnable
from resflow_jax.layers.initial import fan_in_uniform
from resflow_jax.layers.module import Dict, List, Module

Array = jax.Array
Shape = tuple[int, ...]


class PlainLinear(Module):
    """A dense layer on [B, ..., I], or a convolution on [B, *size, I] if there are sides of a kernel."""

    def __init__(self, inputs: int, outputs: int, sides: Shape = (), *, zero: bool = False, rngs: nnx.Rngs):
        """zero: whether kernel and bias start at zero."""
        shape = (*sides, inputs, outputs)
        fan_in = math.prod(shape[:-1])
        self.sides = sides
        self.kernel = nnx.Param(jnp.zeros(shape) if zero else fan_in_uniform(rngs, shape))
        self.bias = nnx.Param(jnp.zeros((outputs,)) if zero else fan_in_uniform(rngs, (outputs,), fan_in))

    def __call__(self, x: Array) -> Array:
        y = convolve(x, self.kernel[...]) if self.sides else x @ self.kernel[...]
        return y + trailing(self.bias[...], y)


class PlainNetwork(Module):
    """Maps x [B, *shape_in] to [B, *shape_out]; a subclass defines `run` on features, with gates or None for each.

    The arrays are flattened unless `on_grid`: then both shapes have the same axes but the last, channels.

    Attributes:
      condition_shape: shape of one condition; None for none.
    """

    def __init__(self, shape_in: Shape, shape_out: Shape, condition_shape: Shape | None, on_grid: bool):
        self.shape_in, self.shape_out, self.condition_shape, self.on_grid = (
            shape_in,
            shape_out,
            condition_shape,
            on_grid,
        )
        if on_grid and (len(shape_in) < 2 or shape_in[:-1] != shape_out[:-1]):
            raise ValueError(f"conditioner: expected events on a grid (*size, C) for convolutions, got {shape_in}")
        if on_grid and condition_shape is not None and len(condition_shape) > 1 and not self._joins_channels:
            raise ValueError(
                f"condition_dim: expected a number of elements, or a shape ({str(shape_in[:-1])[1:-1]}, K) on the "
                f"grid of the events, got {condition_shape}"
            )

    @property
    def _joins_channels(self) -> bool:
        shape = self.condition_shape
        return self.on_grid and shape is not None and len(shape) > 1 and shape[:-1] == self.shape_in[:-1]

    @property
    def features_in(self) -> int:
        """Number of channels that `run` takes."""
        if not self.on_grid:
            return math.prod(self.shape_in)
        return self.shape_in[-1] + (self.condition_shape[-1] if self._joins_channels else 0)

    @property
    def features_out(self) -> int:
        """Number of channels that `run` returns."""
        return self.shape_out[-1] if self.on_grid else math.prod(self.shape_out)

    def gates(self, channels: Sequence[int], rngs: nnx.Rngs, zero: bool = False) -> Conditioning | None:
        """The network of gates for layers with these numbers of outputs; None if the condition needs none.

        zero: whether the shifts start at zero.
        """
        if self.condition_shape is None or self._joins_channels:
            return None
        return Conditioning(self.condition_shape, channels, zero=zero, rngs=rngs)

    def run(self, x: Array, gates: Sequence) -> Array:
        """The features [B, ..., features_out] of x [B, ..., features_in]."""
        raise NotImplementedError

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        gates = None if self.conditioning is None else self.conditioning(condition)
        if self._joins_channels:
            x = jnp.concatenate([x, condition], axis=-1)
        x = x if self.on_grid else x.reshape(x.shape[0], -1)
        return self.run(x, gates).reshape(x.shape[0], *self.shape_out)


class Layers(PlainNetwork):
    """Linear layers with activations between them, and before the first with `preactivation`."""

    def __init__(
        self,
        shape_in: Shape,
        shape_out: Shape,
        condition_shape: Shape | None,
        hidden: Sequence[int],
        sides: Sequence[Shape] | None,
        activation: Activation,
        preactivation: bool,
        zero: bool,
        *,
        rngs: nnx.Rngs,
    ):
        """sides: the sides of each kernel, one more than `hidden`; None for dense layers on the flattened input."""
        super().__init__(shape_in, shape_out, condition_shape, on_grid=sides is not None)
        inputs = [self.features_in * (activation.expansion if preactivation else 1), *hidden]
        outputs = [*(width // activation.expansion for width in hidden), self.features_out]
        sides = [()] * len(inputs) if sides is None else sides
        last = len(inputs) - 1
        self.linears = List(
            PlainLinear(*sizes, zero=zero and n == last, rngs=rngs)
            for n, sizes in enumerate(zip(inputs, outputs, sides, strict=True))
        )
        self.activation, self.preactivation = activation, preactivation
        self.activation_params = learnable(activation, last + preactivation)
        # Without a hidden layer the gate acts on the output.
        self.conditioning = self.gates(outputs[:-1] or outputs, rngs, zero=zero and not hidden)

    def run(self, x: Array, gates: Sequence | None) -> Array:
        params = iter(self.activation_params)
        last = len(self.linears) - 1
        for n, linear in enumerate(self.linears):
            if n or self.preactivation:
                x = self.activation(values_of(self.activation, next(params)), x)
            x = linear(x)
            if gates is not None and n < max(1, last):
                x = gated(gates[n], x)
        return x


class ResNet(PlainNetwork):
    """h <- h + conv(act(conv(act(h)))) for every block, between a first convolution and a last one of one pixel."""

    def __init__(
        self,
        shape_in: Shape,
        shape_out: Shape,
        condition_shape: Shape | None,
        width: int,
        depth: int,
        side: int,
        activation: Activation,
        zero: bool,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape_in, shape_out, condition_shape, on_grid=True)
        sides = (side,) * (len(shape_in) - 1)
        inner = width // activation.expansion
        self.first = PlainLinear(self.features_in, inner, sides, rngs=rngs)
        self.inner = List(PlainLinear(width, inner, sides, rngs=rngs) for _ in range(depth))
        self.outer = List(PlainLinear(width, inner, sides, rngs=rngs) for _ in range(depth))
        self.last = PlainLinear(width, self.features_out, (1,) * len(sides), zero=zero, rngs=rngs)
        self.activation, self.activation_params = activation, learnable(activation, 2 * depth + 1)
        self.conditioning = self.gates([inner] * (depth + 1), rngs)

    def run(self, x: Array, gates: Sequence | None) -> Array:
        params = iter(self.activation_params)
        gates = [None] * (len(self.inner) + 1) if gates is None else gates

        def activate(h):
            return self.activation(values_of(self.activation, next(params)), h)

        def opened(gate, h):
            return h if gate is None else gated(gate, h)

        h = opened(gates[0], self.first(x))
        for gate, inner, outer in zip(gates[1:], self.inner, self.outer, strict=True):
            h = h + outer(activate(opened(gate, inner(activate(h)))))
        return self.last(activate(h))


def values_of(activation: Activation, params: Dict) -> dict[str, Array]:
    """The parameters of one activation, from `learnable`."""
    return {name: params[name][...] for name, _ in activation.initial}
