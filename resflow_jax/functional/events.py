"""Events that are pytrees of arrays, as one array: examples {"a": [B, ...], "b": [B, ...]} become rows [B, D].

An `Events` knows the tree, so that a function of such trees becomes one of arrays. Rows hold the leaves one after the
other, in JAX's order. Nothing of this touches an event that is an array.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef, keystr

from resflow_jax.functional.checks import as_float_batch

Array = jax.Array


def is_tree(x: Any) -> bool:
    """Whether x is a container with an array in it."""
    if hasattr(x, "__jax_array__") or jax.tree_util.all_leaves([x]):  # a variable of Flax is a tree too
        return False
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x))


class Events(NamedTuple):
    """The structure of an example.

    Attributes:
      tree: of its arrays.
      shapes: of them, without the batch axis.
      name: of the argument that it describes.
      dtype: of all.
    """

    tree: PyTreeDef
    shapes: tuple[tuple[int, ...], ...]
    name: str
    dtype: Any

    @classmethod
    def of(cls, name: str, x: Any, *, least: int = 1) -> tuple["Events", Array]:
        """(events, rows [B, D]) of a tree of float arrays [B, ...] of one dtype, with B >= least.

        Raises:
          ValueError: for a leaf that is no float array [B, ...]; for leaves of different batch sizes or dtypes.
        """
        paths, tree = jax.tree_util.tree_flatten_with_path(x)
        names = [name + keystr(path) for path, _ in paths]
        leaves = [as_float_batch(own, leaf, least=least) for own, (_, leaf) in zip(names, paths, strict=True)]
        first = leaves[0]
        for own, leaf in zip(names, leaves, strict=True):
            if leaf.shape[0] != first.shape[0]:
                raise ValueError(f"{own}: expected {first.shape[0]} examples as in {names[0]}, got shape {leaf.shape}")
            if leaf.dtype != first.dtype:
                raise ValueError(f"{own}: expected {first.dtype} as of {names[0]}, got {leaf.dtype}")
        events = cls(tree, tuple(leaf.shape[1:] for leaf in leaves), name, first.dtype)
        return events, events._rows(leaves)

    def unpack(self, rows: Array) -> Any:
        """The tree of arrays [B, ...] of rows [B, D]."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        parts = [rows[:, a:b] for a, b in pairwise(ends)]
        batch = rows.shape[0]
        leaves = [part.reshape(batch, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return self.tree.unflatten(leaves)

    def wrap(self, g: Callable[..., Any]) -> Callable[..., Array]:
        """g(params, x, ...), which returns a tree like x, as a function of rows that returns rows."""

        def of_rows(params: Any, rows: Array, *condition: Any) -> Array:
            return self._packed(g(params, self.unpack(rows), *condition), rows.shape[0])

        return of_rows

    def _packed(self, out: Any, batch: int) -> Array:
        """The rows of what g returns."""
        paths, tree = jax.tree_util.tree_flatten_with_path(out)
        if tree != self.tree:
            raise ValueError(f"g: expected an output {self.tree} like {self.name}, got {tree}")
        for (path, leaf), shape in zip(paths, self.shapes, strict=True):
            found = getattr(leaf, "dtype", type(leaf).__name__), getattr(leaf, "shape", ())
            if found != (self.dtype, (batch, *shape)):
                raise ValueError(
                    f"g: expected an output {self.dtype} {(batch, *shape)} at {keystr(path)} like {self.name}, "
                    f"got {found[0]} {found[1]}"
                )
        return self._rows([leaf for _, leaf in paths])

    def _rows(self, leaves: list[Array]) -> Array:
        sizes = map(math.prod, self.shapes)
        return jnp.concatenate([leaf.reshape(leaf.shape[0], n) for leaf, n in zip(leaves, sizes, strict=True)], axis=1)
