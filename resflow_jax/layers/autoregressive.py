"""`MaskedAutoregressive`: an affine map of each element, whose parameters depend on the elements before it.

    y_i = (x_i - m_i(x_<i; c)) * exp(-s_i(x_<i; c)),   log_det = -sum_i s_i

One network computes all m_i and s_i in one pass: masks on its kernels cut every path from x_j to the outputs i <= j.
Hidden unit k has a degree between 1 and D - 1 and depends only on the elements up to its degree:

    kernel[j, k] != 0 only where degree(k) >= degree(j) for hidden k,   degree(i) > degree(j) for outputs i

The inverse finds one element after the other, with D passes. Germain et al. (2015, arXiv 1502.03509), section 4;
Papamakarios et al. (2017, arXiv 1705.07057), section 3.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.activations import ACTIVATIONS, ActivationName, check_single_channels
from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_shape, check_count, check_type
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.conditioned_params import bounded
from resflow_jax.layers.conditioning import Conditioning, gated
from resflow_jax.layers.contraction import learnable
from resflow_jax.layers.couplings.networks import values_of
from resflow_jax.layers.initial import fan_in_uniform
from resflow_jax.layers.module import List, Module

Array = jax.Array


class MaskedAutoregressive(Bijector):
    """Affine autoregressive layer on vectors [B, dim], by a network with masked kernels (MADE).

        y_i = (x_i - m_i) * exp(-s_i),   (m_i, s_i) of x_1, ..., x_(i-1) and c,   log_det = -sum_i s_i

    s = 4 tanh(a / 4) of the network's output a, which bounds the scales. The layer starts as the identity. On its own,
    with a standard normal base, it is MADE with Gaussian conditionals; a chain of such layers with permutations between
    them is a masked autoregressive flow (MAF). In exact arithmetic it is invertible whatever its network computes. It
    has no Lipschitz bound.

    Args:
      dim: D, the number of elements.
      hidden: output widths of the activations. With fewer than D - 1 units, some outputs see only the first of
        the elements before them.
      condition_dim: number of elements of a condition [condition_dim], which gives every hidden unit a gate and a
        shift; None for none. With D = 1 the layer depends on the condition alone.
      activation: name of the activation, one of `ACTIVATIONS` that neither mixes nor doubles channels.
      rngs: draws the parameters.

    Randomness: `rngs` only; log_det [B] is exact, in nats. Cost: one pass through the network; the inverse takes D
    passes, one after the other.

    Raises:
      ValueError: for sizes below one, and for an activation that is unknown or mixes channels.

    Source: Papamakarios et al. (2017, arXiv 1705.07057), section 3; Germain et al. (2015, arXiv 1502.03509), section 4.

    Example:
      >>> layer = rf.MaskedAutoregressive(3, (8,), rngs=nnx.Rngs(0))
      >>> y, log_det = layer.forward(jnp.ones((2, 3)))
      >>> y.shape, log_det.shape, np.allclose(layer.inverse(y), 1, atol=1e-5)
      ((2, 3), (2,), True)
    """

    no_bound = "the network of an autoregressive layer has no Lipschitz bound"

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        condition_dim: int | None = None,
        activation: ActivationName = "relu",
        rngs: nnx.Rngs,
    ):
        check_count("dim", dim, 1)
        check_type("rngs", rngs, nnx.Rngs)
        check_single_channels(activation)  # masks could not cut what mixes them
        self.dim, self.hidden, self.activation, self.condition_dim = dim, as_shape("hidden", hidden), activation, None
        self.event_shape = (dim,)
        if condition_dim is not None:
            check_count("condition_dim", condition_dim, 1)
            self.condition_dim, self.condition_shape = condition_dim, (condition_dim,)
        masks = autoregressive_masks(dim, self.hidden)
        last = len(masks) - 1
        self.linears = List(MaskedLinear(mask, zero=n == last, rngs=rngs) for n, mask in enumerate(masks))
        self.activation_params = learnable(ACTIVATIONS[activation], last)
        if condition_dim is not None:  # without a hidden layer the gate acts on the output, which starts at zero
            options = {"zero": not self.hidden, "rngs": rngs}
            self.conditioning = Conditioning((condition_dim,), self.hidden or (2 * dim,), **options)
        else:
            self.conditioning = None

    def _network(self, x: Array, condition: Array | None) -> tuple[Array, Array]:
        """m and s [B, dim]."""
        gates = [None] * len(self.linears) if self.conditioning is None else [*self.conditioning(condition), None]
        masks = autoregressive_masks(self.dim, self.hidden)
        params = iter(self.activation_params)
        for n, (linear, mask, gate) in enumerate(zip(self.linears, masks, gates, strict=False)):
            if n:
                activation = ACTIVATIONS[self.activation]
                x = activation(values_of(activation, next(params)), x)
            x = linear(x, mask)
            x = x if gate is None else gated(gate, x)
        mean, a = jnp.split(x, 2, axis=-1)
        return mean, bounded(a)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        mean, log_scale = self._network(x, condition)
        return (x - mean) * jnp.exp(-log_scale), -jnp.sum(log_scale, axis=-1)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        numbers = jnp.arange(self.dim)

        def find_next(x, number):
            mean, log_scale = self._network(x, condition)
            return jnp.where((numbers == number)[None], y * jnp.exp(log_scale) + mean, x), None

        given = (y, self.linears[0].kernel[...]) + (() if condition is None else (condition,))
        x = jnp.zeros_like(y, jnp.result_type(*given))
        x = vary_over(x, varying_axes((y, nnx.state(self), condition)))
        return jax.lax.scan(find_next, x, numbers)[0]


class MaskedLinear(Module):
    """A dense layer with a fixed mask on its kernel [inputs, outputs]."""

    def __init__(self, mask: np.ndarray, *, zero: bool, rngs: nnx.Rngs):
        """zero: whether kernel and bias start at zero."""
        inputs, outputs = mask.shape
        self.kernel = nnx.Param(jnp.zeros(mask.shape) if zero else fan_in_uniform(rngs, mask.shape))
        self.bias = nnx.Param(jnp.zeros((outputs,)) if zero else fan_in_uniform(rngs, (outputs,), inputs))

    def __call__(self, x: Array, mask: np.ndarray) -> Array:
        kernel = self.kernel[...]
        y = x @ (kernel * jnp.asarray(mask, kernel.dtype))
        return y + trailing(self.bias[...], y)


def autoregressive_masks(dim: int, hidden: Sequence[int]) -> list[np.ndarray]:
    """The masks [inputs, outputs] of every layer, bool; the outputs are m_1, ..., m_D, s_1, ..., s_D.

    Hidden units take the degrees 1 to D - 1 in turn, or where there are fewer units, degrees spread evenly over them.
    For D = 1 they have degree 0, and see nothing.
    """
    inner = [_hidden_degrees(dim, width) for width in hidden]
    degrees = [np.arange(1, dim + 1), *inner]
    masks = [b[None] >= a[:, None] for a, b in pairwise(degrees)]
    return [*masks, np.tile(degrees[0], 2)[None] > degrees[-1][:, None]]


def _hidden_degrees(dim: int, width: int) -> np.ndarray:
    if width >= dim - 1:
        return np.arange(width) % max(1, dim - 1) + min(1, dim - 1)
    return np.linspace(dim - 1, 1, width).round().astype(int)[::-1]  # a single unit sees all but the last element
