"""Reversible training: gradients of a flow that keep no input of its stacked layers."""

from flax import nnx

from resflow_jax.functional.checks import check_type
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.layers.residual import ResidualStack


def make_reversible(flow: nnx.Module, solver: Solver | None = None) -> None:
    """Lets gradients recompute the inputs of stacked layers from their outputs, by the inverse, in place.

    Values do not change, and gradients only by the error of the inverse. Memory for activations no longer grows
    with the number of stacked layers; parameters and their gradients still do. If the inverse of an example does not
    converge at a layer, its gradient is NaN, and so are those in the conditions and in the parameters of this layer and
    of those before it. Gradients have first-order reverse mode, and forward mode over that; `jax.jvp` and `jax.jacfwd`
    of the flow alone raise a TypeError. `rf.save` does not write this setting. It affects only the forward map and its
    log-det (`forward`, `log_prob`). Stacks inside an `Invert`, gradients of `inverse` and of samples, and classifier
    passes with dropout still store their inputs.

    Args:
      flow: a flow, a classifier or a bijector with `ResidualStack`s, which `ResidualFlow` has for its blocks.
      solver: solver for the inverses. None takes `Anderson()`, whose tolerance is 1e-6 in float32.

    Randomness: none. Cost: in a gradient, one inverse (about eight evaluations of g per block) and one more estimate of
    the log-det of every stacked layer.

    Raises:
      ValueError: if `flow` has no `ResidualStack`, or one with layers that are not bijections, or if `solver` is not a
        solver.

    Source: Gomez et al. (2017, arXiv 1707.04585).

    Example:
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=4, hidden=(8,)), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((3, 2))
      >>> before = jax.grad(lambda x: flow.log_prob(x, estimator=rf.Exact()).sum())(x)
      >>> rf.make_reversible(flow)
      >>> after = jax.grad(lambda x: flow.log_prob(x, estimator=rf.Exact()).sum())(x)
      >>> bool(jnp.allclose(before, after, atol=1e-4))
      True
    """
    check_type("flow", flow, nnx.Module)
    solver = Anderson() if solver is None else solver
    check_type("solver", solver, Solver)
    stacks = [module for _, module in nnx.iter_modules(flow) if isinstance(module, ResidualStack)]
    if not stacks:
        raise ValueError(f"flow: expected layers in a ResidualStack, got none in {type(flow).__name__}")
    for stack in stacks:
        if stack.no_density is not None:
            raise ValueError(f"flow: expected layers with an inverse in every ResidualStack, got {stack.no_density}")
    for stack in stacks:
        stack.reversible = solver
