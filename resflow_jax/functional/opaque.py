"""Passes objects of a user's class through compiled programs, whether or not their class is a pytree."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Opaque:
    """Wraps any object as a pytree without leaves. The object is a constant of a compiled program and must not change.

    Two wrappers are equal if their objects are: by the objects' own equality if they are hashable, else by identity.
    """

    value: Any

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return id(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Opaque):
            return NotImplemented
        if self.value is other.value:
            return True
        return type(self.value) is type(other.value) and self._is_hashable() and bool(self.value == other.value)

    def _is_hashable(self) -> bool:
        try:
            hash(self.value)
        except TypeError:
            return False
        return True


def as_tree(value: Any) -> Any:
    """The value itself if its class is a pytree, otherwise the value in an `Opaque`."""
    return Opaque(value) if jax.tree_util.all_leaves([value]) else value


def original(value: Any) -> Any:
    """The object that `as_tree` was called with."""
    return value.value if isinstance(value, Opaque) else value
