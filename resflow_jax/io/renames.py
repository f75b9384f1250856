"""Tables of settings and arrays that were renamed, for reading files of earlier versions.

Configs (`io.config_upgrade`), structures and arrays (`io.files`) and training states (`training.old_checkpoints`) are
read with these tables.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

Names = tuple[str, ...]

# By type of object: its arguments by former name, with their present names.
ARGUMENTS = {
    "ImageTransform": {"deviation": "std"},
    "Normalization": {"deviation": "std"},
    "Roulette": {"krylov": "minres_steps"},
    "VectorTransform": {"deviation": "std"},
}
# Former names of arrays, by the last part of their present path.
ARRAYS = {"std": "deviation"}


def renamed_arguments(description: Any) -> Any:
    """Converts a structure (see `io.structure`) to the present names of arguments."""
    if isinstance(description, list):
        return [renamed_arguments(item) for item in description]
    if not isinstance(description, dict):
        return description
    found = {name: renamed_arguments(value) for name, value in description.items()}
    kind, arguments = found.get("type"), found.get("arguments")
    if isinstance(kind, str) and isinstance(arguments, dict):
        found["arguments"] = with_names(arguments, ARGUMENTS.get(kind, {}))
    return found


def with_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The values by present names, given the present name for each former name."""
    return {names.get(name, name): value for name, value in values.items()}


def former_path(path: Names, present: Container[Names]) -> Names:
    """The path of an array among the paths `present` of a file: `path`, or its former path if only that is there."""
    if path in present or path[-1] not in ARRAYS:
        return path
    former = (*path[:-1], ARRAYS[path[-1]])
    return former if former in present else path


def renamed_arrays(paths: Iterable[Names], arrays: Mapping[Names, Any]) -> dict[Names, Any]:
    """Arrays by the present paths of a flow. Arrays that the flow lacks keep their paths."""
    present = {former_path(path, arrays): path for path in paths}
    return {present.get(path, path): array for path, array in arrays.items()}
