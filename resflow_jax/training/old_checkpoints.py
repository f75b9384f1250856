"""Reads training states of earlier versions: their arrays had other names, and some had other values.

`io.upgrades` has the names and values of the early development versions (whose flow files have no format version), and
`io.renames` the names of the version after them. Parameters, averages and moments of the optimiser have the names of
the flow's arrays, and are renamed in the same way. The moments of an ActNorm's bias become those of its shift. The two
differ in units, but Adam divides one moment by the root of the other.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from resflow_jax.io.renames import ARRAYS, former_path
from resflow_jax.io.upgrades import CONSTANTS, is_old, old_names, shift_of

Names = tuple[str, ...]

_PARTS = ("scales", "bijector", "base", "classifier")  # attributes of a flow that have arrays, in all versions
_FLOW = (("params",), ("rest",))  # the parts of a state that have the arrays of the flow itself
_AVERAGE = ("ema", "ema")
_BLOCK = {"promised": "target_bound"}  # of the certificate of a block


def is_old_state(metadata: Any) -> bool:
    """Whether a saved state is of an earlier version; the metadata are a tree with the names of its arrays."""
    paths = _named(metadata)
    is_renamed = any(path[-1] in ARRAYS.values() for path in paths)
    return is_renamed or is_old(name for prefix, name in map(_split, paths) if prefix in _FLOW)


def check_shapes(found: Any, like: Any) -> None:
    """Raises ValueError, which names the array, if one of a saved state has another shape than that of `like`.

    Args:
      found: a tree with the names and the shapes of its arrays, such as orbax's metadata.
      like: a present `forms.SavedState`. Arrays that only one of the two has are not looked at.
    """
    arrays = _named(found)
    for path, leaf in _named(like).items():
        if path in arrays:
            _check_shape(path, leaf, arrays[path])


def upgraded_state(old: Any, like: Any, ema_decay: float | None) -> Any:
    """Returns an old state with the structure and the dtypes of `like`, of NumPy arrays.

    Args:
      old: nested containers of arrays with their old names.
      like: a present `forms.SavedState`.
      ema_decay: decay of the state's average, to correct its bias. Only states of early development versions need it.

    Raises:
      ValueError: if the decay is needed and None, or if arrays are not those of the flow; the message names them.
    """
    arrays, leaves = _named(old), _named(like)
    if not is_old(_of_flow(arrays)):
        return _renamed_state(arrays, leaves, like)
    if ema_decay is None:
        raise ValueError(
            "ema_decay: expected the EMA decay of the run, which checkpoints of early development versions need; got "
            "None"
        )
    names = old_names(_of_flow(leaves), _of_flow(arrays))
    found = [_value(path, leaf, names, arrays, ema_decay) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _renamed_state(arrays: Mapping[Names, np.ndarray], leaves: Mapping[Names, Any], like: Any) -> Any:
    """The state of a version in which only the names of arrays differ."""
    formers = {path: former_path(path, arrays) for path in leaves}
    if others := set(formers.values()) ^ set(arrays):
        listed = ", ".join(sorted(map(".".join, others)))
        raise ValueError(f"state: expected the arrays of this flow in the checkpoint, got others: {listed}")
    found = [_as_leaf(path, leaf, np.asarray(arrays[formers[path]])) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), found)


def upgraded_certificate(certificate: dict[str, Any]) -> dict[str, Any]:
    """Converts a dict of `Certificate.as_dict` from when a block's `target_bound` was named `promised`."""
    blocks = [{_BLOCK.get(name, name): value for name, value in block.items()} for block in certificate["blocks"]]
    return {"unbounded": [], **certificate, "blocks": blocks}


def _value(
    path: Names, leaf: Any, names: Mapping[Names, Names | None], arrays: Mapping[Names, np.ndarray], ema_decay: float
) -> np.ndarray:
    prefix, name = _split(path)
    before = names[name] if name else name
    if before is None:
        return np.full(leaf.shape, CONSTANTS[name[-1]], leaf.dtype)
    if (*prefix, *before) not in arrays:
        raise ValueError(f"state: expected {'.'.join((*prefix, *before))} in the checkpoint, got no such array")
    value = np.asarray(arrays[(*prefix, *before)])
    is_shift = name[-1:] == ("shift",) and before[-1] == "bias"
    if is_shift and (prefix in _FLOW or prefix == _AVERAGE):
        log_scale = np.asarray(arrays[(*prefix, *before[:-1], "log_scale")])
        # The average is not bias-corrected: it is the mean of the parameters times this weight.
        weight = 1 - ema_decay ** int(arrays[("ema", "count")]) if prefix == _AVERAGE else 1
        value = weight * shift_of(value / weight, log_scale / weight) if weight else value
    return _as_leaf(path, leaf, value)


def _as_leaf(path: Names, leaf: Any, value: np.ndarray) -> np.ndarray:
    """The value in the leaf's dtype; ValueError for another shape."""
    _check_shape(path, leaf, value)
    return value.astype(leaf.dtype)


def _check_shape(path: Names, leaf: Any, value: Any) -> None:
    if tuple(value.shape) != leaf.shape:
        raise ValueError(f"state: expected {'.'.join(path)} of shape {leaf.shape}, got {tuple(value.shape)}")


def _named(tree: Any) -> dict[Names, Any]:
    """The leaves of a tree by the names that checkpoints have, without the "value" of a variable of Flax."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        names = tuple(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", "")))) for entry in path)
        found[names[:-1] if names[-1:] == ("value",) else names] = leaf
    return found


def _split(path: Names) -> tuple[Names, Names]:
    """The part of a state that an array is in, and its name in the flow; the name is empty for other arrays."""
    start = next((n for n, name in enumerate(path) if name in _PARTS), len(path))
    return path[:start], path[start:]


def _of_flow(paths: Mapping[Names, Any]) -> list[Names]:
    """The names of the arrays of the flow itself."""
    return [name for prefix, name in map(_split, paths) if prefix in _FLOW]
