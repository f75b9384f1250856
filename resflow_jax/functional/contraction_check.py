"""A test of a user's own map on data: whether `residual` can take it, and how large its Lipschitz constant is at least.

A contraction cannot be proved from data. What can be: that g keeps shapes, gives finite numbers, returns the same when
it is asked again, and treats every example by itself; and that its Lipschitz constant is at least so much, since

    |g(a) - g(b)|_2 <= L |a - b|_2,     |J v|_2 <= L |v|_2     for all points a and b and Jacobians J of g.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.checks import as_float_batch, check_count, check_key
from resflow_jax.functional.conditions import arguments, as_condition, check_map
from resflow_jax.functional.events import Events, is_tree
from resflow_jax.functional.iteration import wide_dtype
from resflow_jax.functional.primitives.tracing import trace_residual

Array = jax.Array

ITERATIONS = 50
# What evaluations of one example in two batches may differ by, relative to the largest output, by bits of the dtype:
# accelerators round products of matrices to ten bits.
_TOLERANCES = {16: 5e-2, 32: 2e-3, 64: 1e-9}


class ContractionCheck(NamedTuple):
    """What `check_contraction` has found. Numbers of Python.

    Attributes:
      lipschitz_lower_bound: the Lipschitz constant of g in the 2-norm is at least this, up to rounding.
      is_refuted: whether that is one or more, so that g is no contraction. False proves nothing.
      jacobian_norm: the largest |J v| / |v| found: nearly the largest singular value of J at the points tried.
      difference_quotient: the largest |g(a) - g(b)| / |a - b| found, with a condition in common.
      mixing: the largest difference between outputs for one example in two batches, relative to the largest output.
    """

    lipschitz_lower_bound: float
    is_refuted: bool
    jacobian_norm: float
    difference_quotient: float
    mixing: float


def check_contraction(
    g: Callable[..., Any], params: Any, x: Any, key: Array, *, condition: Any = None, samples: int = 4
) -> ContractionCheck:
    """Tests on data whether g can be a residual map, and bounds its Lipschitz constant from below.

      found = rf.check_contraction(g, params, x, jax.random.key(0))
      assert not found.is_refuted, found.lipschitz_lower_bound

    For a call outside of jit, once, before training; it compiles g several times.

    Args:
      g: function (params, x), or (params, x, condition), as of `residual`.
      params: any pytree.
      x: data, floats [B, ...], or a pytree of such. Data of the real distribution and size find more.
      key: PRNG key: which examples replace others, points between them, and starts of power iterations.
      condition: as of `residual`.
      samples: rounds, each of which compares every example with one other, and takes Jacobians at points between
        them; the first one takes those at x.

    Cost: about 50 jvps and vjps of g a round.

    Returns:
      `ContractionCheck`.

    Raises:
      ValueError: if g changes the shape, the dtype or the structure of x; if its output is not finite; if it returns
        something else when it is called again; if the output for an example depends on the other examples of the
        batch, on their number or on its place among them (but for a relative difference of 1e-9 in float64, 2e-3 in
        float32 and 5e-2 in 16-bit floats, which rounding may cause); if it has no derivatives in forward and reverse
        mode; and for other arguments that are none.

    Warns:
      RuntimeWarning: where `is_refuted`.
    """
    check_map(g, condition)
    check_key("key", key)
    check_count("samples", samples, 1)
    if is_tree(x):
        events, x = Events.of("x", x)
        g = events.wrap(g)
    x = as_float_batch("x", x)
    condition = as_condition(condition, "x", x)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, x, condition, key))):
        raise ValueError("x: expected arrays with values: check_contraction has to be called outside of jit and vmap")
    trace_residual(g, params, "x", *arguments(x, condition))
    mixing_key, key = jax.random.split(key)
    mixing = _check_examples(g, params, x, condition, mixing_key)
    try:
        jacobian, quotient = jax.jit(partial(_lower_bounds, g, samples))(params, x, condition, key)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"g: expected a map with derivatives in forward and in reverse mode. {type(error).__name__}: {error}"
        ) from error
    jacobian, quotient = float(jacobian), float(quotient)
    bound = max(jacobian, quotient)
    if bound >= 1:
        warnings.warn(
            f"g: expected a contraction, got a map whose Lipschitz constant is at least {bound:.6g}", RuntimeWarning, 2
        )
    return ContractionCheck(bound, bound >= 1, jacobian, quotient, mixing)


def _check_examples(g: Callable[..., Array], params: Any, x: Array, condition: Any, key: Array) -> float:
    """How much the output for an example changes with the batch around it; ValueError where that is too much."""

    def traced_anew():
        compiled = jax.jit(lambda params, *batch: g(params, *batch))
        return lambda x, condition: np.asarray(compiled(params, *arguments(x, condition)), np.float64)

    evaluate = traced_anew()

    batch, tolerance = x.shape[0], _TOLERANCES[jnp.finfo(x.dtype).bits]
    whole = evaluate(x, condition)
    finite = np.isfinite(whole.reshape(batch, -1)).all(axis=1)
    if not finite.all():
        raise ValueError(f"g: expected finite outputs, got others for {np.sum(~finite)} of {batch} examples")
    scale = np.abs(whole).max(initial=0) + 1e-3 * np.abs(np.asarray(x, np.float64)).max(initial=0) + 1e-30

    def difference(found, expected, what):
        ratio = np.abs(found - expected).max(initial=0) / scale
        if not ratio <= tolerance:
            raise ValueError(f"g: expected {what}, got a relative difference of {ratio:.3g}")
        return float(ratio)

    difference(traced_anew()(x, condition), whole, "the same output when it is called again")
    order_key, noise_key = jax.random.split(key)
    order = jax.random.permutation(order_key, batch)
    rows = partial(jax.tree.map, lambda leaf: leaf[order])
    alone = "an output for each example that does not depend on the other examples"
    # Something else is put in the place of every other example, first of those of odd number, then of even.
    noise = jax.random.normal(noise_key, x.shape, x.dtype) * jnp.sqrt(jnp.mean(jnp.square(x)))
    replaced = []
    for parity in (0, 1):
        kept = np.arange(batch) % 2 == parity
        source = np.where(kept, np.arange(batch), np.roll(np.arange(batch), 1))
        mixed = x[source] + jnp.where(per_example(kept, x), 0, noise)
        others = jax.tree.map(lambda leaf, source=source: leaf[source], condition)
        replaced.append(difference(evaluate(mixed, others)[kept], whole[kept], alone))
    moved = difference(evaluate(x[order], rows(condition)), whole[np.asarray(order)], f"{alone} or its place")
    try:
        first = evaluate(x[:1], jax.tree.map(lambda leaf: leaf[:1], condition))
        twice = evaluate(*jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), (x, condition)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"g: expected a map of batches of any size, which fails for 1 or {2 * batch} examples in place of {batch}. "
            f"{type(error).__name__}: {error}"
        ) from error
    for found, expected in ((first, whole[:1]), (twice, np.concatenate([whole, whole]))):
        if found.shape != expected.shape:
            raise ValueError(f"g: expected an output {expected.shape} for as many examples, got {found.shape}")
    sizes = [difference(first, whole[:1], f"{alone} or their number")]
    sizes.append(difference(twice, np.concatenate([whole, whole]), f"{alone} or their number"))
    return max(*replaced, moved, *sizes)


def _lower_bounds(
    g: Callable[..., Array], samples: int, params: Any, x: Array, condition: Any, key: Array
) -> tuple[Array, Array]:
    """The largest |J v| / |v| and the largest difference quotient of g, over some rounds."""
    wide = wide_dtype(x.dtype)

    def of_x(x):
        return g(params, *arguments(x, condition))

    def norms(v):
        return jnp.sqrt(jnp.sum(jnp.square(v.astype(wide)), axis=tuple(range(1, v.ndim))))

    def along(scalar, v):
        return per_example(scalar, v).astype(v.dtype)

    def unit(v):
        norm = norms(v)
        return v / along(jnp.where(norm > 0, norm, 1), v)

    def jacobian_norms(x, key):
        _, product = jax.linearize(of_x, x)
        transposed = jax.linear_transpose(product, x)

        def step(_, v):
            w = unit(transposed(unit(product(v)))[0])
            return jnp.where(along(norms(w), w) > 0, w, v)

        v = unit(lax.fori_loop(0, ITERATIONS, step, unit(jax.random.normal(key, x.shape, x.dtype))))
        return norms(product(v)) / norms(v)

    g_x = of_x(x)

    def of_round(inputs):
        turn, key = inputs
        order_key, place_key, start_key = jax.random.split(key, 3)
        other = x[jax.random.permutation(order_key, x.shape[0])]
        distance = norms(x - other)
        # Points that are nearly one have a quotient of nothing but rounding.
        far = distance > 1e3 * float(jnp.finfo(x.dtype).eps) * (norms(x) + norms(other))
        quotients = jnp.where(far, norms(g_x - of_x(other)) / jnp.where(far, distance, 1), 0)
        place = jax.random.uniform(place_key, (x.shape[0],), wide) * (turn > 0).astype(wide)
        point = x + along(place, x) * (other - x)
        return jnp.max(jacobian_norms(point, start_key)), jnp.max(quotients)

    rounds = jnp.arange(samples, dtype=jnp.int32), jax.random.split(key, samples)
    return jax.tree.map(jnp.max, lax.map(of_round, rounds))
