"""Power iteration inside of a loss: for libraries whose training loop has no place to call `update_norms`."""

from typing import Any

import jax
from flax import nnx


def advance_norms(graphdef: Any, params: nnx.State, non_params: nnx.State, max_iterations: int) -> nnx.State:
    """`non_params` with power-iteration vectors advanced to the present parameters, as by `Flow.update_norms`.

    A pure function, without a derivative: sigma = u^T W v has the right one with u and v held fixed.

    Args:
      graphdef: structure of a flow, from `nnx.split(flow, nnx.Param, ...)`.
      params: its parameters.
      non_params: all its other variables.
      max_iterations: cap on the iterations, two products with each kernel. It ends earlier where it converges.
    """
    flow = nnx.merge(graphdef, *jax.lax.stop_gradient((params, non_params)), copy=True)
    flow.update_norms(tolerance=1e-4, max_iterations=max_iterations)
    return nnx.split(flow, nnx.Param, ...)[2]
