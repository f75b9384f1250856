"""Tests a user's map on data: whether `residual` can take it, and a lower bound on its Lipschitz constant.

Data cannot prove that g is a contraction. They can show that g keeps shapes, gives finite numbers, is deterministic and
treats the examples of a batch independently. And they give a lower bound on its Lipschitz constant L, since

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
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.primitives.tracing import trace_residual
from resflow_jax.functional.texts import fields_text, is_number, number

Array = jax.Array

ITERATIONS = 50
# Allowed difference between evaluations of one example in two batches, relative to the largest output, by bits of the
# dtype. It is large for float32 because accelerators may round the factors of matrix products to ten bits.
_TOLERANCES = {16: 5e-2, 32: 2e-3, 64: 1e-9}


class ContractionCheck(NamedTuple):
    """Result of `check_contraction`, in Python numbers.

    Attributes:
      lipschitz_lower_bound: lower bound on the Lipschitz constant of g in the 2-norm, up to rounding: the larger of
        `jacobian_norm` and `difference_quotient`.
      is_refuted: whether the bound is one or more, so that g is not a contraction. False proves nothing.
      jacobian_norm: the largest |J v|_2 / |v|_2 found, close to the largest singular value of J at the points tried.
      difference_quotient: the largest |g(a) - g(b)|_2 / |a - b|_2 found, with the same condition at a and b.
      mixing: the largest difference between outputs for one example in two batches, relative to the largest output.

    Example:
      >>> found = rf.ContractionCheck(0.7, is_refuted=False, jacobian_norm=0.7, difference_quotient=0.6, mixing=1e-7)
      >>> found.lipschitz_lower_bound == max(found.jacobian_norm, found.difference_quotient)
      True
    """

    lipschitz_lower_bound: float
    is_refuted: bool
    jacobian_norm: float
    difference_quotient: float
    mixing: float

    def __repr__(self) -> str:
        if not all(is_number(field) for field in self):
            return fields_text(self)
        lower, is_refuted, jacobian, quotient, mixing = self
        verdict = "refuted, g is not a contraction" if is_refuted else "not refuted, which proves nothing"
        return (
            f"ContractionCheck: {verdict}; Lip(g) >= {number(lower)} (norm of a Jacobian {number(jacobian)}, "
            f"difference quotient {number(quotient)}), mixing of examples {mixing:.1e}"
        )


def check_contraction(
    g: Callable[..., Any], params: Any, x: Any, key: Array, *, condition: Any = None, samples: int = 4
) -> ContractionCheck:
    """Tests on data whether g can be a residual map, and bounds its Lipschitz constant from below.

    Call it outside of jit, once, before training. It compiles g several times. Each round costs about 50 jvps and 50
    vjps of g. The result is random with the key; the lower bound holds for every key.

    Args:
      g: function (params, x), or (params, x, condition), as in `residual`.
      params: any pytree.
      x: data: floats [B, ...], or a pytree of such arrays. Real data in a batch of the real size are the best test.
      key: PRNG key. It draws the examples that replace others, the points between them, and the start vectors of
        power iterations.
      condition: as in `residual`.
      samples: number of rounds. Each compares every example with one other and computes Jacobian norms at a point
        between the two; the first round computes them at x.

    Returns:
      `ContractionCheck`.

    Raises:
      ValueError: if g changes the shape, the dtype or the structure of x; if an output is not finite; if a second call
        gives another output; if the output for an example depends on the other examples of the batch, on their number
        or on their order; if g has no forward-mode or no reverse-mode derivatives; and for invalid other arguments.
        Rounding may cause relative differences between outputs of up to 1e-9 in float64, 2e-3 in float32 and 5e-2 in
        16-bit floats.

    Warns:
      RuntimeWarning: if `is_refuted`.

    Example:
      >>> w = 0.9 * jnp.eye(2)
      >>> x = jax.random.normal(jax.random.key(0), (4, 2))
      >>> found = rf.check_contraction(lambda w, x: jnp.sin(x @ w), w, x, jax.random.key(1), samples=1)
      >>> found.is_refuted, bool(0.5 < found.lipschitz_lower_bound < 0.9)
      (False, True)
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
    """The largest change of an example's output with the rest of its batch; ValueError if it exceeds the tolerance."""

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
    # Half of the examples are replaced, first those with odd numbers, then those with even numbers.
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
            f"g: expected a map of batches of any size, which fails for 1 or {2 * batch} examples instead of {batch}. "
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
    """The largest |J v| / |v| and the largest difference quotient of g over all rounds."""
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
        # The quotient of two nearly equal points would consist of rounding errors.
        far = distance > 1e3 * float(jnp.finfo(x.dtype).eps) * (norms(x) + norms(other))
        quotients = jnp.where(far, norms(g_x - of_x(other)) / jnp.where(far, distance, 1), 0)
        place = jax.random.uniform(place_key, (x.shape[0],), wide) * (turn > 0).astype(wide)
        point = x + along(place, x) * (other - x)
        return jnp.max(jacobian_norms(point, start_key)), jnp.max(quotients)

    rounds = jnp.arange(samples, dtype=jnp.int32), jax.random.split(key, samples)
    return jax.tree.map(jnp.max, lax.map(of_round, rounds))
