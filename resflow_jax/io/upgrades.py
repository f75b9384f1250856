"""Converts arrays of early development versions, whose files have no format version: their names and values.

    old name                             present name
    scales.0.LAYER                       bijector.LAYER                (vectors)
    scales.N.LAYER                       bijector.bijectors.N.LAYER    (images)
    scales.N.LAYER                       bijector.scales.N.LAYER       (images with factor-out)
    ACTNORM.bias, ACTNORM.log_scale      ACTNORM.shift, .log_scale, with .center 0 and .std 1

The old ActNorm was y = (x + bias) exp(log_scale). The present one, with these constants, is
y = x exp(log_scale) + shift. So shift = bias exp(log_scale).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from resflow_jax.functional.checks import names_text
from resflow_jax.io.renames import former_path

Names = tuple[str, ...]

CONSTANTS = {"center": 0, "std": 1}  # the constants of an ActNorm that had none

_PLACES = (("bijector", "scales", "{n}"), ("bijector", "bijectors", "{n}"), ("bijector",))


def is_old(names: Iterable[Names]) -> bool:
    """Whether names of a flow's arrays, without their collection, are old names.

    A present flow may have a user's attribute `scales` as well, besides its bijector.
    """
    firsts = {name[0] for name in names if name}
    return "scales" in firsts and "bijector" not in firsts


def old_names(new: Iterable[Names], old: Iterable[Names]) -> dict[Names, Names | None]:
    """The old name for each present name, both without their collection.

    For the shift of an old ActNorm it is the name of its bias, and for the constants that it lacked it is None.

    Raises:
      ValueError: if the old names are not those of this flow; the message lists those that are missing or unknown.
    """
    new, old = set(new), set(old)
    tries = [_old_names(new, old, place) for place in _PLACES]
    found = min(tries, key=lambda names: len(_unmatched(names, old)))
    if missing := _unmatched(found, old):
        raise ValueError(f"arrays: expected those of this flow, got others: {names_text(map('.'.join, missing))}")
    return found


def _old_names(new: set[Names], old: set[Names], place: Names) -> dict[Names, Names | None]:
    found = {}
    for name in new:
        before = _before(name, place)
        *module, last = before
        sibling = (*module, "bias")
        if before not in old and last == "shift" and sibling in old:
            found[name] = sibling
        elif (former := former_path(before, old)) in old:
            found[name] = former
        elif last in CONSTANTS and sibling in old:
            found[name] = None
        else:
            found[name] = before
    return found


def _before(name: Names, place: Names) -> Names:
    """The old name of an array whose present name begins with `place`."""
    if "{n}" not in place:
        return ("scales", "0", *name[1:]) if name[:1] == place else name
    parents = place[:-1]
    return ("scales", *name[len(parents) :]) if name[: len(parents)] == parents else name


def _unmatched(names: Mapping[Names, Names | None], old: set[Names]) -> set[Names]:
    """The names that are on one side only."""
    return {name for name in names.values() if name is not None} ^ old


def shift_of(bias: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """The shift of the present ActNorm that equals y = (x + bias) exp(log_scale)."""
    if bias.shape != log_scale.shape:
        raise ValueError(f"arrays: expected bias of shape {log_scale.shape}, as log_scale, got {bias.shape}")
    return bias * np.exp(log_scale)


def upgraded(leaves: Mapping[Names, Any], arrays: Mapping[Names, np.ndarray]) -> dict[Names, np.ndarray]:
    """Converts old arrays to present names and values.

    Args:
      leaves: the present arrays or their shapes, by collection and name.
      arrays: the old arrays, by collection and name.

    Raises:
      ValueError: as for `old_names`.
    """
    old = {path[1:]: array for path, array in arrays.items()}
    names = old_names([path[1:] for path in leaves], old)
    found = {}
    for path in leaves:
        name = names[path[1:]]
        if name is None:
            scale = old[names[(*path[1:-1], "log_scale")]]
            found[path] = np.full(scale.shape, CONSTANTS[path[-1]], scale.dtype)
        elif name[-1] == "bias" and path[-1] == "shift":
            found[path] = shift_of(old[name], old[(*name[:-1], "log_scale")])
        else:
            found[path] = old[name]
    return found
