"""The loop that solves x = T(x), one example at a time, under any update rule.

Each turn evaluates T once, at the point x that the rule proposed, and knows then its residual

    r = T(x) - x,     |T(x) - x*| <= L / (1 - L) * |r|      for a contraction T of constant L  (Banach)

and returns the last T(x). An example stops by itself, and changes no more, once

    max |r| <= tolerance * max(scale, max |T(x)|),

or once |r| is at most 64 units of rounding and no longer less than before: no more can be had.

A rule may propose anything, and no contraction is lost: the loop holds on to the best point so far,
the base. A proposal that does not lower the 2-norm of the base's residual by the factor `DECREASE` is
rejected, and the next point is T(base), a step of plain iteration, which lowers it by L. So after n
evaluations the residual is at most max(L, DECREASE)^floor(n / 2) of the first one, in the worst case.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

DECREASE = 0.999


class InverseStatus(NamedTuple):
    """How the solves of a batch ended; every field has shape [B].

    Attributes:
      iterations: evaluations of g used by each example, summed over the blocks of a flow.
      residual: max |y - g(x) - x| at the last x evaluated, one iterate before the x returned; the
        largest over the blocks of a flow.
      residual_norm: the same in the 2-norm, from which `error_bound` follows.
      converged: whether the residual was within the tolerance or down to rounding, in every block
        of a flow.
    """

    iterations: Array
    residual: Array
    residual_norm: Array
    converged: Array

    def error_bound(self, lipschitz: Array | float) -> Array:
        """A bound on |x - x*|_2 of each example, residual_norm * L / (1 - L); infinite where L >= 1.

        It holds for the solve of one block, in exact arithmetic, converged or not.

        Args:
          lipschitz: a constant L of g in the 2-norm; broadcast against residual_norm.
        """
        lipschitz = jnp.asarray(lipschitz, self.residual_norm.dtype)
        contracts = lipschitz < 1
        factor = lipschitz / jnp.where(contracts, 1 - lipschitz, 1)
        return jnp.where(contracts, self.residual_norm * factor, jnp.inf)


class Evaluation(NamedTuple):
    """A point x that T was evaluated at: T(x) and r = T(x) - x, [B, D]."""

    image: Array
    residual: Array


class _State(NamedTuple):
    x: Array  # the next point to evaluate
    base: Evaluation  # of the best point so far, whose residual is that of the status
    memory: Any  # of the update rule
    status: InverseStatus


def iterate(step: Callable[[Array], Array], start: Array, solver: Any, scale: Array) -> tuple[Array, InverseStatus]:
    """Solves x = step(x) from `start` [B, ...] by a `Solver`; the tolerance is relative to `scale` [B] at least."""
    batch, dtype = start.shape[0], start.dtype
    tolerance, rounding = solver.tolerance_for(dtype), 64 * jnp.finfo(dtype).eps

    def advance(carry):
        turn, (x, base, memory, status) = carry
        image = step(x.reshape(start.shape)).reshape(x.shape)
        new = Evaluation(image, image - x)
        largest, norm = example_max(new.residual), example_norm(new.residual)
        size = jnp.maximum(scale, example_max(image))
        plain = jnp.all(x == base.image, axis=1) | (turn == 0)

        small = largest <= tolerance * size
        stalled = plain & (largest <= rounding * size) & (largest >= status.residual)
        accepted = plain | small | (norm <= DECREASE * status.residual_norm)
        active = ~status.converged

        def keep(condition, new, old):
            return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)

        finite = jnp.isfinite(norm) & jnp.isfinite(status.residual_norm)
        change = jax.tree.map(lambda a, b: jnp.where(finite[:, None], a - b, 0), new, base)
        memory, proposal = solver.propose(turn, memory, change, new, accepted)
        base = keep(active & accepted, new, base)
        x = keep(active, keep(accepted, proposal, base.image), x)
        residual, residual_norm = keep(active & accepted, (largest, norm), (status.residual, status.residual_norm))
        status = InverseStatus(status.iterations + active, residual, residual_norm, status.converged | small | stalled)
        return turn + 1, _State(x, base, memory, status)

    def unfinished(carry):
        turn, state = carry
        return (turn < solver.max_iterations) & jnp.any(~state.status.converged)

    x = start.reshape(batch, math.prod(start.shape[1:]))
    infinite = jnp.full(batch, jnp.inf, dtype)
    status = InverseStatus(jnp.zeros(batch, jnp.int32), infinite, infinite, jnp.zeros(batch, bool))
    state = _State(x, Evaluation(x, jnp.zeros_like(x)), solver.initialize(x), status)
    _, (x, base, _, status) = lax.while_loop(unfinished, advance, (jnp.int32(0), state))
    near = example_norm(x - base.image) <= status.residual_norm
    return jnp.where(near[:, None], x, base.image).reshape(start.shape), status


def example_max(x: Array) -> Array:
    """max |x| of every example, [B]."""
    return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)


def example_norm(x: Array) -> Array:
    """The 2-norm of every example of x [B, D], [B]; neither over- nor underflows where its square would."""
    largest = example_max(x)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.sum((x / unit[:, None]) ** 2, axis=1))
