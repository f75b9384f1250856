"""Converts batches of pytrees to one array and back: {"a": [B, ...], "b": [B, ...]} <-> rows [B, D].

`Events` keeps the structure of the tree, so it can also convert a function of such trees to a function of rows. A row
holds the flattened leaves one after the other, in JAX's order. Batches that are a single array need no conversion.
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
    """Whether x is a container that holds at least one array."""
    if hasattr(x, "__jax_array__") or jax.tree_util.all_leaves([x]):  # a variable of Flax is a tree too
        return False
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x))


class Events(NamedTuple):
    """The structure of a batch that is a pytree.

    Attributes:
      tree: structure of the pytree.
      shapes: shape of each leaf, without the batch axis.
      name: name of the argument, for errors.
      dtype: dtype of all leaves.
    """

    tree: PyTreeDef
    shapes: tuple[tuple[int, ...], ...]
    name: str
    dtype: Any

    @classmethod
    def of(cls, name: str, x: Any, *, least: int = 1) -> tuple["Events", Array]:
        """The structure and the rows [B, D] of a tree of float arrays [B, ...] with one dtype and B >= least.

        Raises:
          ValueError: if a leaf is not a float array [B, ...], or if leaves differ in batch size or dtype.
        """
        paths, tree = jax.tree_util.tree_flatten_with_path(x)
        names = [name + keystr(path) for path, _ in paths]
        leaves = [as_float_batch(own, leaf, least=least) for own, (_, leaf) in zip(names, paths, strict=True)]
        first = leaves[0]
        for own, leaf in zip(names, leaves, strict=True):
            if leaf.shape[0] != first.shape[0]:
                raise ValueError(f"{own}: expected {first.shape[0]} examples as in {names[0]}, got shape {leaf.shape}")
            if leaf.dtype != first.dtype:
                raise ValueError(f"{own}: expected {first.dtype}, the dtype of {names[0]}, got {leaf.dtype}")
        events = cls(tree, tuple(leaf.shape[1:] for leaf in leaves), name, first.dtype)
        return events, events._rows(leaves)

    def unpack(self, rows: Array) -> Any:
        """Converts rows [B, D] to the tree of arrays [B, ...]."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        parts = [rows[:, a:b] for a, b in pairwise(ends)]
        batch = rows.shape[0]
        leaves = [part.reshape(batch, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return self.tree.unflatten(leaves)

    def wrap(self, g: Callable[..., Any]) -> Callable[..., Array]:
        """Converts g(params, x, ...), which maps a tree to a tree like it, to a function of rows that returns rows."""

        def of_rows(params: Any, rows: Array, *condition: Any) -> Array:
            return self._packed(g(params, self.unpack(rows), *condition), rows.shape[0])

        return of_rows

    def _packed(self, out: Any, batch: int) -> Array:
        """Converts the tree that g returned to rows; ValueError if it differs in structure, shape or dtype."""
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
