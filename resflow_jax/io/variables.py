"""The arrays of a flow by collection and name, and a flow of such arrays.

A path is (collection, *names): ("params", "bijector", "bijectors", "0", "shift"). Collections: "params", which training
differentiates; "norms", power-iteration vectors; "batch_stats", running statistics; "constants", which training leaves
alone. Variables of other types, as of a user's own module, are in a collection of their type's name; bare arrays in
"arrays".
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.layers.bijector import Constant
from resflow_jax.layers.lipschitz import NormState
from resflow_jax.models.flow import Flow

Variables = dict[str, Any]
Path = tuple[str, ...]

COLLECTIONS = {"params": nnx.Param, "norms": NormState, "batch_stats": nnx.BatchStat, "constants": Constant}
_NAMES = {kind: name for name, kind in COLLECTIONS.items()}


class OtherArrays(ValueError):
    """Arrays that are missing or unknown."""


class Structure(NamedTuple):
    """What a flow is made of beside its numbers.

    Attributes:
      kind: class of the flow.
      graphdef: of the flow, from `nnx.split`.
      treedef: of its state.
      leaves: shape and dtype of every array by its path, in the order of the state.
    """

    kind: type[Flow]
    graphdef: Any
    treedef: Any
    leaves: dict[Path, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, flow: Flow) -> "Structure":
        """That of a flow, whose arrays may be abstract."""
        graphdef, state = nnx.split(flow)
        leaves, treedef = jax.tree.flatten(state)
        return cls(type(flow), graphdef, treedef, dict(zip(paths(state), leaves, strict=True)))

    @classmethod
    def made_by(cls, make: Callable[[], Flow]) -> "Structure":
        """That of the flow which a function makes; nothing is computed."""
        static = []

        def create():
            flow = make()
            graphdef, state = nnx.split(flow)
            static.extend([type(flow), graphdef])
            return state

        state = jax.eval_shape(create)
        leaves, treedef = jax.tree.flatten(state)
        return cls(*static, treedef, dict(zip(paths(state), leaves, strict=True)))

    def filled(self, arrays: Mapping[Path, Any], *, what: str = "arrays", expected: str = "those of this flow") -> Flow:
        """The flow with these arrays, in their dtype where JAX has it on.

        Raises:
          OtherArrays: for arrays that are missing or unknown.
          ValueError: for those of another shape, and for integers in place of floats.
        """
        for problem, names in (("missing", self.leaves.keys() - arrays), ("unknown", arrays.keys() - self.leaves)):
            if names:
                listed = ", ".join(sorted(map("/".join, names)))
                raise OtherArrays(f"{what}: expected {expected}; arrays {problem}: {listed}")
        for path, leaf in self.leaves.items():
            name, shape, dtype = "/".join(path), jnp.shape(arrays[path]), jnp.result_type(arrays[path])
            if shape != leaf.shape:
                raise ValueError(f"{what}: expected {name} of shape {leaf.shape}, got {shape}")
            if _kind(dtype) != _kind(leaf.dtype):
                raise ValueError(f"{what}: expected {name} of a dtype like {leaf.dtype}, got {dtype}")
        leaves = [jnp.asarray(arrays[path]) for path in self.leaves]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves), copy=True)


def split_variables(flow: Flow) -> Variables:
    """The variables of a flow as they are now: nested plain dicts of arrays, by collection."""
    _, state = nnx.split(flow)
    return nested(dict(zip(paths(state), jax.tree.leaves(state), strict=True)))


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


def paths(state: nnx.State) -> list[Path]:
    """The path of every array, in the order of `jax.tree.leaves`."""
    return [(_collection(variable), *map(str, path)) for path, variable in nnx.to_flat_state(state)]


def _collection(variable: Any) -> str:
    if not isinstance(variable, nnx.Variable):
        return "arrays"
    known = (_NAMES[kind] for kind in type(variable).__mro__ if kind in _NAMES)
    return next(known, type(variable).__name__)


def _kind(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "key"
    return "float" if jnp.issubdtype(dtype, jnp.floating) else "other"
