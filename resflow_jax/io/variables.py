"""The arrays of a flow by collection and name, and flows made from such arrays.

A path is (collection, *names): ("params", "bijector", "bijectors", "0", "shift"). The collections are "params", which
training differentiates; "norms", the vectors of power iterations; "batch_stats", running statistics; and "constants",
which training does not change. Variables of another type, as in a user's module, are in a collection with the name of
the type, and arrays outside of variables in "arrays".
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import names_text
from resflow_jax.layers.bijector import Constant
from resflow_jax.layers.lipschitz import NormState
from resflow_jax.models.flow import Flow

Variables = dict[str, Any]
Path = tuple[str, ...]

COLLECTIONS = {"params": nnx.Param, "norms": NormState, "batch_stats": nnx.BatchStat, "constants": Constant}
_NAMES = {kind: name for name, kind in COLLECTIONS.items()}


class OtherArraysError(ValueError):
    """Some arrays are missing or unknown."""


class Structure(NamedTuple):
    """A flow without the values of its arrays.

    Attributes:
      kind: the class of the flow.
      graphdef: the graph definition of the flow, from `nnx.split`.
      treedef: the pytree structure of its state.
      leaves: shape and dtype of every array by path, in the order of the state.
    """

    kind: type[Flow]
    graphdef: Any
    treedef: Any
    leaves: dict[Path, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, flow: Flow) -> "Structure":
        """The structure of a flow, whose arrays may be abstract."""
        graphdef, state = nnx.split(flow)
        leaves, treedef = jax.tree.flatten(state)
        return cls(type(flow), graphdef, treedef, dict(zip(paths(state), leaves, strict=True)))

    @classmethod
    def made_by(cls, make: Callable[[], Flow]) -> "Structure":
        """The structure of the flow that a function makes. The function is traced, and nothing is computed."""
        static = []

        def create():
            flow = make()
            graphdef, state = nnx.split(flow)
            static.extend([type(flow), graphdef])
            return state

        state = jax.eval_shape(create)
        leaves, treedef = jax.tree.flatten(state)
        return cls(*static, treedef, dict(zip(paths(state), leaves, strict=True)))

    def filled(self, arrays: Mapping[Path, Any], *, what: str = "arrays") -> Flow:
        """The flow with these arrays, in their dtypes (float64 becomes float32 unless JAX enables it).

        Args:
          arrays: arrays by path.
          what: name of the argument, for errors.

        Raises:
          OtherArraysError: if arrays are missing or unknown.
          ValueError: if an array has another shape or another kind of dtype.
        """
        for problem, names in (("missing", self.leaves.keys() - arrays), ("unknown", arrays.keys() - self.leaves)):
            if names:
                listed = names_text(map("/".join, names))
                raise OtherArraysError(f"{what}: expected those of this flow; arrays {problem}: {listed}")
        for path, leaf in self.leaves.items():
            name, shape, dtype = "/".join(path), jnp.shape(arrays[path]), jnp.result_type(arrays[path])
            if shape != leaf.shape:
                raise ValueError(f"{what}: expected {name} of shape {leaf.shape}, got {shape}")
            if _kind(dtype) != _kind(leaf.dtype):
                raise ValueError(f"{what}: expected {name} of a dtype like {leaf.dtype}, got {dtype}")
        leaves = [jnp.asarray(arrays[path]) for path in self.leaves]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves), copy=True)


def split_variables(flow: Flow) -> Variables:
    """The present variables of a flow: nested plain dicts of arrays, by collection."""
    _, state = nnx.split(flow)
    return nested(dict(zip(paths(state), jax.tree.leaves(state), strict=True)))


def nested(flat: Mapping[Path, Any]) -> Variables:
    """Converts arrays by path to nested dicts; ValueError if one path is the beginning of another."""
    variables: Variables = {}
    for path, array in flat.items():
        *parents, name = path
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{'/'.join(path)}: expected a collection of arrays at {parent!r}, got an array")
        node[name] = array
    return variables


def flattened(variables: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, array) for all arrays in nested dicts."""
    for name, node in variables.items():
        path = (*prefix, name)
        yield from flattened(node, path) if isinstance(node, Mapping) else [(path, node)]


def paths(state: nnx.State) -> list[Path]:
    """The paths of all arrays, in the order of `jax.tree.leaves`."""
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
