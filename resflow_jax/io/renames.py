"""Names that files of earlier versions have for settings and arrays, and the present ones.

Configs (`io.config_upgrade`), structures and arrays (`io.files`) and training states (`training.old_checkpoints`) are
read by these tables.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

Names = tuple[str, ...]

# By the type of an object: former and present names of its arguments.
ARGUMENTS = {
    "ImageTransform": {"deviation": "std"},
    "Normalization": {"deviation": "std"},
    "Roulette": {"krylov": "minres_steps"},
    "VectorTransform": {"deviation": "std"},
}
# The present last name of an array, and the former one.
ARRAYS = {"std": "deviation"}


def renamed_arguments(description: Any) -> Any:
    """A structure (see `io.structure`) of before, with the present names of arguments."""
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
    """The values under their present names."""
    return {names.get(name, name): value for name, value in values.items()}


def former_path(path: Names, present: Container[Names]) -> Names:
    """The path of an array among those of a file, `present`: the path itself or, if it is not there, its former one."""
    if path in present or path[-1] not in ARRAYS:
        return path
    former = (*path[:-1], ARRAYS[path[-1]])
    return former if former in present else path


def renamed_arrays(paths: Iterable[Names], arrays: Mapping[Names, Any]) -> dict[Names, Any]:
    """Arrays by the paths that a flow has now; those that it does not have keep theirs."""
    present = {former_path(path, arrays): path for path in paths}
    return {present.get(path, path): array for path, array in arrays.items()}
