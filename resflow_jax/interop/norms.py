"""Power iteration inside a loss, for libraries whose training loops have no place to call `update_norms`."""

from typing import Any

import jax
from flax import nnx


def advance_norms(graphdef: Any, params: nnx.State, non_params: nnx.State, max_iterations: int) -> nnx.State:
    """Advances the power-iteration vectors of a flow to its present parameters, as `Flow.update_norms` does.

    The function is pure and has no derivative: sigma = u^T W v has the right derivative with u and v held fixed.

    Args:
      graphdef: structure of the flow, from `nnx.split(flow, nnx.Param, ...)`.
      params: its parameters.
      non_params: all its other variables.
      max_iterations: cap on the iterations. Each takes two products with every kernel; convergence ends them earlier.

    Returns:
      `non_params` with the new vectors.
    """
    flow = nnx.merge(graphdef, *jax.lax.stop_gradient((params, non_params)), copy=True)
    flow.update_norms(tolerance=1e-4, max_iterations=max_iterations)
    return nnx.split(flow, nnx.Param, ...)[2]
