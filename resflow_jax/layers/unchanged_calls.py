"""Calls of a user's network that must not change its state."""

from typing import Any

import jax
from flax import nnx
from jax.tree_util import keystr


def call_unchanged(name: str, module: nnx.Module, *arguments: Any) -> Any:
    """module(*arguments).

    Args:
      name: what the module is called in an error.
      module: the network.
      *arguments: of the call.

    Raises:
      ValueError: if the call changes the state of the module, such as batch statistics or random streams. The output is
        then not a function of one example, and the change would be lost.
    """
    params, state = _leaves(module)
    y = module(*arguments)
    params_after, state_after = _leaves(module)
    changed = [path for path, leaf in state.items() if state_after.get(path) is not leaf]
    # A Flax transformation inside, such as nnx.jit, writes back all variables, also unchanged ones and parameters.
    if changed and all(params_after.get(path) is leaf for path, leaf in params.items()):
        raise ValueError(
            f"{name}: expected a call of {type(module).__name__} not to change its state, got other values of "
            f"{', '.join(changed)}; for batch statistics or dropout call module.eval() first"
        )
    return y


def _leaves(module: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a module by their path: parameters, and all others."""
    states = nnx.state(module, nnx.Param, ...)
    return tuple({keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(part)} for part in states)
