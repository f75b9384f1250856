"""The names that arrays had before flows were compositions, and what their values are now.

    then                                 now
    scales.0.LAYER                       bijector.LAYER             of vectors
    scales.N.LAYER                       bijector.bijectors.N.LAYER of images
    scales.N.LAYER                       bijector.scales.N.LAYER    of images with factor-out
    ACTNORM.bias, ACTNORM.log_scale      ACTNORM.shift, .log_scale, with .center 0 and .std 1

The oldest ActNorm is y = (x + bias) exp(log_scale); the present one is y = x exp(log_scale) + shift with these
constants, so that shift = bias exp(log_scale).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from resflow_jax.io.renames import former_path

Names = tuple[str, ...]

CONSTANTS = {"center": 0, "std": 1}  # of an ActNorm that had none

_PLACES = (("bijector", "scales", "{n}"), ("bijector", "bijectors", "{n}"), ("bijector",))


def is_old(names: Iterable[Names]) -> bool:
    """Whether names of a flow's arrays, without their collection, are those of before compositions."""
    return any(name[:1] == ("scales",) for name in names)


def old_names(new: Iterable[Names], old: Iterable[Names]) -> dict[Names, Names | None]:
    """For every present name of an array the name that it had: of an ActNorm's shift that of its bias.

    None for the constants of an ActNorm that had none. Names without their collection.

    Raises:
      ValueError: where the old names are not those of this flow; it names those that are missing or unknown.
    """
    new, old = set(new), set(old)
    tries = [_old_names(new, old, place) for place in _PLACES]
    found = min(tries, key=lambda names: len(_unmatched(names, old)))
    if missing := _unmatched(found, old):
        raise ValueError(
            f"arrays: expected those of this flow, got others: {', '.join(map('.'.join, sorted(missing)))}"
        )
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
    """The old name of a layer that now stands at `place`."""
    if "{n}" not in place:
        return ("scales", "0", *name[1:]) if name[:1] == place else name
    parents = place[:-1]
    return ("scales", *name[len(parents) :]) if name[: len(parents)] == parents else name


def _unmatched(names: Mapping[Names, Names | None], old: set[Names]) -> set[Names]:
    """Names on one side alone."""
    return {name for name in names.values() if name is not None} ^ old


def shift_of(bias: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """The shift of the ActNorm that is y = (x + bias) exp(log_scale)."""
    return bias * np.exp(log_scale)


def upgraded(leaves: Mapping[Names, Any], arrays: Mapping[Names, np.ndarray]) -> dict[Names, np.ndarray]:
    """Old arrays under their present names, with their present values.

    Args:
      leaves: shape of every present array, by its collection and name.
      arrays: old ones, by their collection and name.

    Raises:
      ValueError: as `old_names`.
    """
    old = {path[1:]: array for path, array in arrays.items()}
    names = old_names([path[1:] for path in leaves], old)
    found = {}
    for path, leaf in leaves.items():
        name = names[path[1:]]
        if name is None:
            scale = old[names[(*path[1:-1], "log_scale")]]
            found[path] = np.full(leaf.shape, CONSTANTS[path[-1]], scale.dtype)
        elif name[-1] == "bias" and path[-1] == "shift":
            found[path] = shift_of(old[name], old[(*name[:-1], "log_scale")])
        else:
            found[path] = old[name]
    return found
