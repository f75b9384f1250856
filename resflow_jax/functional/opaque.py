"""Objects of a user's own class, known to be pytrees or not, carried through compiled programs."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Opaque:
    """Any object as a pytree without arrays. It is a constant of what is compiled with it, and must not change.

    Two are equal if their objects are: by the objects' own equality where they can be hashed, by identity elsewhere.
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
    """The value if its class is a pytree, and an `Opaque` of it otherwise."""
    return Opaque(value) if jax.tree_util.all_leaves([value]) else value


def original(value: Any) -> Any:
    """What `as_tree` was given."""
    return value.value if isinstance(value, Opaque) else value
