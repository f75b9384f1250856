"""Flows as pure functions of variables in a plain dict, as Flax Linen has them: `init` and `apply`.

    model = rf.interop.stateless.stateless(config)
    variables = model.init(key, x)                                        # {"params": {...}, "norms": {...}}
    log_p = model.apply(variables, "log_prob", x, key=key)                # any method of `ResidualFlow`
    variables, status = model.apply(variables, "update_norms")            # those that change a flow return variables

Variables are nested dicts of arrays with string keys, by collection: "params", which training differentiates; "norms",
power-iteration vectors; "batch_stats", running statistics; "constants", which training leaves alone, of data among
them what ActNorm took from a batch. A flow has the collections that it needs. They pass through `jax.tree` functions,
jit, grad, vmap, optax, `flax.serialization` and orbax as any dict does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_key
from resflow_jax.layers.bijector import Constant
from resflow_jax.layers.lipschitz import NormState
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.residual_flow import ResidualFlow, flow_from_config

Array = jax.Array
Variables = dict[str, Any]
Path = tuple[str, ...]

COLLECTIONS = {"params": nnx.Param, "norms": NormState, "batch_stats": nnx.BatchStat, "constants": Constant}
METHODS = tuple(n for n, f in vars(ResidualFlow).items() if callable(f) and (n == "__call__" or not n.startswith("_")))
CHANGING = frozenset({"converge_norms", "initialize", "tighten", "update_norms", "update_statistics"})


@dataclass(frozen=True)
class Stateless:
    """The flow of a config as pure functions; see the module's head."""

    config: ImageFlowConfig | VectorFlowConfig

    def init(self, key: Array, x: Array | None = None) -> Variables:
        """Variables of a new flow: random, its norms iterated to convergence.

        Args:
          key: PRNG key of the parameters.
          x: batch [B, *event_shape] from which ActNorm and moving batch norm take their statistics; without it they are
            the identity.
        """
        check_key("key", key)
        flow = flow_from_config(self.config, rngs=nnx.Rngs(key))
        if x is not None:
            flow.initialize(x)
        return split_variables(flow)

    def apply(self, variables: Variables, method: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of `ResidualFlow` with these variables, which stay as they are.

        Returns:
          What the method returns. Of a method that changes the flow, the new variables: alone from "initialize",
          "update_statistics" and "tighten" (which runs on the host), as (variables, status) from "update_norms" and
          "converge_norms".

        Raises:
          ValueError: for an unknown method, and for variables that are not those of this flow: the message names them.
        """
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
        flow = self.bind(variables)
        result = getattr(flow, method)(*args, **kwargs)
        if method not in CHANGING:
            return result
        return split_variables(flow) if result is None else (split_variables(flow), result)

    def bind(self, variables: Variables) -> ResidualFlow:
        """A flow with these variables, for what takes a flow, as `certify`; its changes do not reach them.

        Raises:
          ValueError: as `apply`.
        """
        if not isinstance(variables, Mapping):
            raise ValueError(f"variables: expected nested dicts of arrays, got {type(variables).__name__}")
        structure = _structure(self.config)
        flat, collections = dict(flattened(variables)), {path[0] for path in structure.leaves}
        for what, names in (
            ("collections missing", collections - set(variables)),
            ("collections unknown", set(variables) - collections),
            ("arrays missing", map("/".join, structure.leaves.keys() - flat.keys())),
            ("arrays unknown", map("/".join, flat.keys() - structure.leaves.keys())),
        ):
            if found := sorted(names):
                raise ValueError(f"variables: expected those of this config; {what}: {', '.join(found)}")
        for path, leaf in structure.leaves.items():
            if jnp.shape(flat[path]) != leaf.shape:
                raise ValueError(
                    f"variables: expected {'/'.join(path)} of shape {leaf.shape}, got {jnp.shape(flat[path])}"
                )
            kind, got = jnp.issubdtype(leaf.dtype, jnp.floating), jnp.result_type(flat[path])
            if kind != jnp.issubdtype(got, jnp.floating):
                raise ValueError(f"variables: expected {'/'.join(path)} of a dtype like {leaf.dtype}, got {got}")
        leaves = [jnp.asarray(flat[path]) for path in structure.leaves]
        return nnx.merge(structure.graphdef, jax.tree.unflatten(structure.treedef, leaves), copy=True)


def stateless(config: ImageFlowConfig | VectorFlowConfig) -> Stateless:
    """The pure functions `init`, `apply` and `bind` of the flow of a config."""
    return Stateless(config)


def split_variables(flow: ResidualFlow) -> Variables:
    """The variables of a flow as they are now: nested plain dicts of arrays, by collection."""
    _, state = nnx.split(flow)
    return nested(dict(zip(_paths(state), jax.tree.leaves(state), strict=True)))


def nested(flat: Mapping[Path, Any]) -> Variables:
    """Nested dicts of arrays by path; a ValueError if the path of one leads through another."""
    variables: Variables = {}
    for path, array in flat.items():
        *parents, name = path
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"{'/'.join(path)}: expected an array or a collection of this name's beginning, got both"
                )
        node[name] = array
    return variables


def flattened(variables: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, array) of nested dicts."""
    for name, node in variables.items():
        path = (*prefix, name)
        yield from flattened(node, path) if isinstance(node, Mapping) else [(path, node)]


class _Structure(NamedTuple):
    graphdef: Any
    treedef: Any  # of the state
    leaves: dict[Path, jax.ShapeDtypeStruct]  # in its order


@lru_cache(maxsize=16)
def _structure(config: ImageFlowConfig | VectorFlowConfig) -> _Structure:
    """What the flow of a config is made of, without making it."""
    graphdefs = []

    def create(key):
        graphdef, state = nnx.split(flow_from_config(config, rngs=nnx.Rngs(key)))
        graphdefs.append(graphdef)
        return state

    state = jax.eval_shape(create, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(state)
    return _Structure(graphdefs[0], treedef, dict(zip(_paths(state), leaves, strict=True)))


def _paths(state: nnx.State) -> list[Path]:
    """Collection and names of every array, in the order of `jax.tree.leaves`."""
    names = {kind: name for name, kind in COLLECTIONS.items()}
    return [(names[type(variable)], *map(str, path)) for path, variable in nnx.to_flat_state(state)]
