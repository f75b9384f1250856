"""Affine layers of bounded Lipschitz constant: a dense or convolution kernel, softly normalised.

    h(x) = W x * min(1, c / sigma) + b,   sigma = u^T W v

u and v are the power-iteration vectors, explicit state beside the parameters (`NormState`).
For norms in closed form sigma is that of every row or every column alone. The
vectors are iterated to convergence when a layer is made and advanced by `update_norm`; applying
the layer never changes them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import check_open_interval
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.functional.norms import (
    PowerIterationStatus,
    best_start,
    channel_norms,
    induced_norm,
    needs_power_iteration,
    order_loss,
    power_iteration,
    soft_normalize,
)
from resflow_jax.functional.orders import learnable_order
from resflow_jax.functional.vector_norms import is_order, vector_norm
from resflow_jax.layers.module import Module

Array = jax.Array
Result = TypeVar("Result")
Order = float | nnx.Param  # of a norm: fixed, or learnable


class NormState(nnx.Variable):
    """A power-iteration vector: state that training carries along but does not differentiate."""


class LipschitzLinear(Module):
    """x -> linear_map(kernel * min(1, coefficient / sigma), x) + bias.

    Starts from the uniform law U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for kernel and bias. The vectors
    start at random: call `update_norm` until it converges before use, as the models do.
    """

    def __init__(
        self,
        linear_map: LinearMap,
        coefficient: float,
        *,
        domain: Order = 2.0,
        codomain: Order = 2.0,
        slopes: tuple[float, ...] = (1.0,),
        rngs: nnx.Rngs,
    ):
        """coefficient: bound on the norm from the order `domain` to the order `codomain`, in (0, 1).

        slopes: those of the activation in front (see `Activation`); where it expands in the norm of order
        `domain`, the layer makes up for it.
        """
        check_open_interval("coefficient", coefficient, 0, 1)
        shapes = linear_map.kernel_shape, linear_map.kernel_shape[-1:], linear_map.input_shape
        kernel, bias, v = _uniforms(rngs.params(), shapes)
        bound = (bias.size / kernel.size) ** 0.5
        self.linear_map = linear_map
        self.coefficient = coefficient
        self.domain = domain
        self.codomain = codomain
        self.slopes = slopes
        self.kernel = nnx.Param(bound * kernel)
        self.bias = nnx.Param(bound * bias)
        self.u = NormState(jnp.zeros(linear_map.output_shape, kernel.dtype))
        self.v = NormState(v)

    def norm(self) -> Array:
        """sigma of the unnormalised kernel, with the stored vectors where it has no closed form; a scalar."""
        return induced_norm(self.linear_map, self.kernel[...], self.u[...], self.v[...], *self.traced_orders())

    def orders(self) -> tuple[float, float]:
        """The orders of the norms on input and output, on the host."""
        return tuple(float(order) for order in self.traced_orders())

    def limit(self) -> Array:
        """What the norm is normalised to at most: the coefficient, less what the activation in front expands."""
        expansion = vector_norm(jnp.asarray(self.slopes, self.kernel.dtype), self.traced_orders()[0])
        return self.coefficient / jnp.maximum(1, expansion)

    def traced_orders(self) -> tuple[float | Array, float | Array]:
        """The same orders; those that are learned as arrays."""
        orders = self.domain, self.codomain
        return tuple(learnable_order(order[...]) if isinstance(order, nnx.Param) else order for order in orders)

    def order_loss(self) -> Array:
        """The norm of the fixed kernel at the fixed v, differentiable in learnable orders alone; a scalar."""
        return order_loss(self.linear_map, self.kernel[...], self.v[...], *self.traced_orders())

    def weights(self) -> tuple[Array, Array]:
        """The softly normalised kernel, and the bias: what `apply` takes."""
        norms = channel_norms(self.linear_map, self.kernel[...], self.u[...], self.v[...], *self.traced_orders())
        return soft_normalize(self.kernel[...], norms, self.limit()), self.bias[...]

    def apply(self, weights: tuple[Array, Array], x: Array) -> Array:
        """The affine map with given weights; depends on no parameter of the layer itself."""
        kernel, bias = weights
        y = self.linear_map(kernel, x)
        return y + trailing(bias, y)

    def __call__(self, x: Array) -> Array:
        return self.apply(self.weights(), x)

    def update_norm(
        self, tolerance: float, residual_tolerance: float | None, max_iterations: int
    ) -> PowerIterationStatus:
        """Advances u and v from where they are, in place. See `power_iteration` for the settings."""
        kernel = self.kernel[...]
        domain, codomain = self.traced_orders()
        if not needs_power_iteration(domain, codomain):
            return PowerIterationStatus(jnp.asarray(0), jnp.zeros((), kernel.dtype), jnp.asarray(True))
        result = power_iteration(
            partial(self.linear_map.matvec, kernel),
            partial(self.linear_map.rmatvec, kernel),
            self.v[...],
            domain=domain,
            codomain=codomain,
            tolerance=tolerance,
            residual_tolerance=residual_tolerance,
            max_iterations=max_iterations,
        )
        self.u[...], self.v[...] = result.u, result.v
        return result.status

    def search_norm(self, starts: int = 32) -> None:
        """Sets u and v to the best of several power iterations, from v and from random starts, in place.

        For norms other than 2 -> 2, whose power iteration ends in local maxima.
        """
        kernel, orders = self.kernel[...], self.traced_orders()
        is_euclidean = all(is_order(order, 2) for order in orders)
        shape = starts - 1, *self.v.shape
        if needs_power_iteration(*orders) and not is_euclidean:
            result = best_start(
                partial(self.linear_map.matvec, kernel),
                partial(self.linear_map.rmatvec, kernel),
                jnp.concatenate([self.v[...][None], jax.random.normal(jax.random.key(0), shape, kernel.dtype)]),
                domain=orders[0],
                codomain=orders[1],
            )
            self.u[...], self.v[...] = result.u, result.v

    def rescale(self, factor: float) -> None:
        """Replaces the kernel by `factor` <= 1 times the one that is applied, in place."""
        self.kernel[...] = factor * self.weights()[0]


def learned_order() -> nnx.Param:
    """A learnable order of a norm, from 2; to be shared between the layer before and the layer behind it."""
    return nnx.Param(jnp.zeros(()))


def map_linears(module: nnx.Module, function: Callable[[LipschitzLinear], Result]) -> list[Result]:
    """[function(layer)] for every `LipschitzLinear` inside a module; changes in place are kept.

    The layers of a stack come as one, vmapped: their results have a leading axis.
    """
    results = []
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, LipschitzLinear):
            graphdef, state = nnx.split(layer)

            def apply(state, graphdef=graphdef):
                layer = nnx.merge(graphdef, state)
                return function(layer), nnx.state(layer)

            stacked = layer.kernel.ndim > len(layer.linear_map.kernel_shape)
            result, state = (jax.vmap(apply) if stacked else apply)(state)
            nnx.update(layer, state)
            results.append(result)
    return results


def _uniforms(key: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Arrays of U(-1, 1) from a single draw: each draw costs XLA a tenth of a second to compile."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = jnp.split(jax.random.uniform(key, (sum(sizes),), minval=-1, maxval=1), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
