"""A scan of invertible layers whose gradient keeps no layer's input, and recomputes it from the layer's output.

    forward:   x_1 -> x_2 -> ... -> x_(n+1);    kept: x_(n+1) and the layers
    backward:  for n down to 1:  x_n = f_n^-1(x_(n+1)), then the vjp of f_n at x_n

(Gomez et al. 2017, arXiv 1707.04585). The memory for activations does not depend on the number of layers; the time
grows by an inverse and an evaluation of each layer. The gradient is that of a plain scan, up to the error of the
inverses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.batch_axes import vary_alike
from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.trees import combine, float0, mapped_with, partition, zero_cotangents

Array = jax.Array
Apply = Callable[[Any, Array, Any, Any], tuple[Array, Array, Any]]
Invert = Callable[[Any, Array, Any], Array]


def reversible_scan(
    apply: Apply, invert: Invert, layers: Any, x: Array, inputs: Any, shared: Any, depth: int
) -> tuple[Array, Array, Any]:
    """Composes layers in a scan that `jax.grad` runs backwards by their inverses.

    It has first-order reverse mode, and forward mode over that; forward mode alone raises a TypeError.

    Args:
      apply: (layer, x, inputs of the layer, shared) -> (y like x, log_det [B] or a tree of such arrays, more); it must
        close over no tracer.
      invert: (layer, y, shared) -> x [B, ...], NaN for examples that are not found; it must have a derivative. Where an
        example is not found, its gradient in x is NaN, and so are those in this and earlier layers and in `shared`.
      layers: tree of arrays with a leading axis of layers.
      x: the first layer's input [B, ...].
      inputs: tree of arrays with a leading axis of layers, for which there are no derivatives, such as keys.
      shared: tree of arrays that all layers take, such as a condition.
      depth: number of layers. The trees of arrays may be empty.

    Returns:
      The last layer's output, log_dets [layers, B], and `more` with a leading axis of layers, without a derivative.
    """
    layers, x, shared = vary_alike(layers, x, shared)
    x = mapped_with(x, (inputs, layers, shared))
    return _scan(apply, invert, depth, layers, x, inputs, shared)


def _plain_scan(apply, depth, layers, x, inputs, shared, *, by_rules=False):
    """The scan; `by_rules` evaluates each layer by the rules of its derivatives, for forward mode over reverse mode."""

    def body(x, of_layer):
        layer, inputs = of_layer
        if by_rules:
            (y, log_det), _, more = jax.vjp(lambda x: _with_aux(apply(layer, x, inputs, shared)), x, has_aux=True)
        else:
            y, log_det, more = apply(layer, x, inputs, shared)
        return y, (jax.tree.map(lambda leaf: mapped_with(leaf, y), log_det), more)

    y, (log_dets, more) = lax.scan(body, x, (layers, inputs), length=depth)
    return y, log_dets, jax.tree.map(lax.stop_gradient, more)


def _with_aux(results):
    y, log_det, more = results
    return (y, log_det), more


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(apply, invert, depth, layers, x, inputs, shared):
    return _plain_scan(apply, depth, layers, x, inputs, shared)


def _forward(apply, invert, depth, layers, x, inputs, shared):
    out = _plain_scan(apply, depth, layers, x, inputs, shared, by_rules=True)
    return out, (layers, out[0], inputs, shared)


def _backward(apply, invert, depth, kept, cotangents):
    layers, y, inputs, shared = kept
    y_bar, log_dets_bar, _ = cotangents
    (layer_floats, layer_others), (shared_floats, shared_others) = partition(layers), partition(shared)

    def body(carry, of_layer):
        y, y_bar, shared_bar = carry
        (floats, others), inputs, log_det_bar = of_layer
        x = invert(combine(floats, others), y, shared)

        def outputs(floats, x, shared_floats):
            shared = combine(shared_floats, shared_others)
            return apply(combine(floats, others), x, inputs, shared)[:2]

        _, pullback = jax.vjp(outputs, floats, x, shared_floats)
        floats_bar, x_bar, more_bar = pullback((y_bar, log_det_bar))
        # At an x of NaN some rules give zero, for example that of relu.
        is_found = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
        x_bar = x_bar * per_example(_one_or_nan(is_found, x), x)
        of_all = jnp.all(is_found)
        floats_bar, more_bar = jax.tree.map(lambda bar: bar * _one_or_nan(of_all, bar), (floats_bar, more_bar))
        return (x, x_bar, jax.tree.map(jnp.add, shared_bar, more_bar)), floats_bar

    first = y, y_bar, jax.tree.map(jnp.zeros_like, shared_floats)
    of_layers = (layer_floats, layer_others), inputs, log_dets_bar
    (_, x_bar, shared_bar), floats_bar = lax.scan(body, first, of_layers, length=depth, reverse=True)
    return (
        combine(floats_bar, float0(layer_others)),
        x_bar,
        zero_cotangents(inputs),
        combine(shared_bar, float0(shared_others)),
    )


def _one_or_nan(condition: Array, like: Array) -> Array:
    """1 where the condition holds, else NaN, in the dtype of `like`: a factor that makes derivatives NaN as well."""
    return jnp.where(condition, 1, jnp.nan).astype(like.dtype)


_scan.defvjp(_forward, _backward)
