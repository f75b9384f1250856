"""Converts configs to JSON and back: frozen dataclasses of numbers, strings, paths, tuples and other such dataclasses.

A dataclass becomes an object with the name of its class as "type". Tuples become lists; paths and infinite numbers
become strings. The outermost object also has "format_version". A missing field takes its default, so documents that
were written before a field was added can be read. An unknown field is an error.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from resflow_jax.functional.checks import check_choice, names_text, shown
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.io.config_upgrade import STEPS, upgrade
from resflow_jax.layers.couplings import conditioners
from resflow_jax.models import groups
from resflow_jax.models.autoregressive_flow import AutoregressiveFlowConfig
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.continuous_flow import ContinuousFlowConfig
from resflow_jax.models.coupling_config import CouplingFlowConfig, CouplingScales

FORMAT_VERSION = len(STEPS)
_VERSION = "format_version"
_NESTED = dict | list
# what steps of upgrades and constructors raise for values of types that they do not expect
_UNEXPECTED = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_DEEPEST = 200  # levels of lists and objects, which functions here descend by calling themselves

# The configs of flows, and all dataclasses that may occur in them.
FlowConfig = ImageFlowConfig | VectorFlowConfig | CouplingFlowConfig | AutoregressiveFlowConfig | ContinuousFlowConfig
FLOW_CONFIGS = {cls.__name__: cls for cls in (*get_args(FlowConfig), TorchImageConfig)}
FLOW_TYPES = FLOW_CONFIGS | {
    cls.__name__: cls
    for cls in (
        groups.BetweenBlocks,
        groups.DenseNetBlocks,
        groups.DenseTail,
        groups.Dequantization,
        groups.ImageTransform,
        groups.Norms,
        groups.Padding,
        groups.Scales,
        groups.VectorTransform,
        conditioners.CNNConditioner,
        conditioners.MLPConditioner,
        conditioners.ResNetConditioner,
        CouplingScales,
    )
}


def config_to_json(config: FlowConfig) -> str:
    """Converts the config of a flow to JSON text, with the version of the format.

    Raises:
      ValueError: if this is not the config of a flow.
    """
    if type(config) not in FLOW_CONFIGS.values():
        raise ValueError(f"config: expected one of {', '.join(FLOW_CONFIGS)}; got {type(config).__name__}")
    return json.dumps(as_document(config))


def config_from_json(text: str) -> FlowConfig:
    """Reads the config of a flow from text that `config_to_json` wrote, in this version or an earlier one.

    Raises:
      ValueError: if the text is not JSON of such a config, or has a later version, an unknown field, no value for a
        field without default, or a value of the wrong type. The message names the field.
    """
    expected = f"config: expected JSON of a config of type {' or '.join(FLOW_CONFIGS)}"
    try:
        document = parsed(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{expected}, got {shown(text)}") from error
    if not isinstance(document, dict) or document.get("type") not in tuple(FLOW_CONFIGS):
        raise ValueError(f"{expected}, got {shown(text)}")
    return from_document(document, FlowConfig, FLOW_TYPES)


def parsed(text: str) -> Any:
    """Parses JSON of at most `_DEEPEST` levels; ValueError for text that is not JSON or is nested more deeply."""
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"expected JSON of at most {_DEEPEST} levels, got more") from error
    level = [document]
    for _ in range(_DEEPEST):
        inner = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, _NESTED))
        level = [item for items in inner for item in items]
    if level:
        raise ValueError(f"expected JSON of at most {_DEEPEST} levels, got more")
    return document


def as_json(config: Any) -> Any:
    """Converts a config dataclass, or a dict, to plain JSON values. Each dataclass has its class as "type"."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: as_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, dict):
        return {name: as_json(value) for name, value in config.items()}
    if isinstance(config, tuple | list):
        return [as_json(item) for item in config]
    if isinstance(config, np.generic):
        config = config.item()
    if isinstance(config, float) and not math.isfinite(config):
        return str(config)  # JSON has no infinity
    return str(config) if isinstance(config, Path) else config


def as_document(config: Any) -> dict[str, Any]:
    """Converts a config dataclass to plain JSON values, with the version of the format."""
    fields = as_json(config)
    return {"type": fields.pop("type"), _VERSION: FORMAT_VERSION, **fields}


def from_document(document: Any, hint: Any, types: Mapping[str, type], name: str = "config") -> Any:
    """Reads a value that `as_document` wrote, in this version or an earlier one.

    Args:
      document: plain JSON values.
      hint: the expected type, a union of types, or Any.
      types: the dataclasses that may occur, by name.
      name: name of the document, for errors.

    Raises:
      ValueError: as for `config_from_json`.
    """
    try:
        return _read(upgraded(document), hint, types, name)
    except _UNEXPECTED as error:
        raise ValueError(f"{name}: expected {_named(hint)}, got a document that cannot be read: {error}") from error


def upgraded(document: Any) -> Any:
    """Converts a document of an earlier version to the present format, without the version."""
    if not isinstance(document, dict):
        return document
    version = document.get(_VERSION, 0)
    if type(version) is not int or version not in range(FORMAT_VERSION + 1):
        raise ValueError(
            f"{_VERSION}: expected at most {FORMAT_VERSION}, got {shown(version)}, written by "
            "a later version of resflow_jax"
        )
    try:
        return upgrade({name: value for name, value in document.items() if name != _VERSION}, version)
    except _UNEXPECTED as error:
        raise ValueError(f"expected a document of format version {version}, could not read it: {error}") from error


def completed(document: Any, config: Any) -> Any:
    """Adds missing fields to JSON values of a config, with the defaults of the dataclasses in `config`."""
    if not isinstance(document, dict) or document.get("type") != type(config).__name__:
        return document
    found = dict(document)
    for field in dataclasses.fields(config):
        if field.name in found:
            found[field.name] = completed(found[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            found[field.name] = as_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = as_json(field.default_factory())
    return found


def _read(value: Any, hint: Any, types: Mapping[str, type], name: str) -> Any:
    """Reads a value from JSON; ValueError unless it has the type that the hint allows."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, dict):
        value = _dataclass(value, types, name)
    elif isinstance(value, list):
        item = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        value = tuple(_read(v, item, types, f"{name}[{n}]") for n, v in enumerate(value))
    elif isinstance(value, str) and Path in kinds:
        value = Path(value)
    elif value in ("inf", "-inf", "nan") and float in kinds:
        value = float(value)
    if not any(_is_of(value, kind) for kind in kinds):
        raise ValueError(f"{name}: expected {' or '.join(map(_named, kinds))}, got {shown(value)}")
    return value


def _dataclass(values: dict[str, Any], types: Mapping[str, type], name: str) -> Any:
    """Reads a dataclass from the dict that `as_json` made."""
    check_choice(f"{name}.type", values.get("type"), tuple(types))
    cls = types[values["type"]]
    hints, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    needed = {n for n, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING}
    found = values.keys() - {"type"}
    wrong = {"missing": needed - found, "unknown": found - fields.keys()}
    listed = "; ".join(f"{what}: {names_text(names)}" for what, names in wrong.items() if names)
    if listed:
        raise ValueError(f"{name}: expected the fields of {cls.__name__}, got others ({listed})")
    return cls(**{n: _read(values[n], hints[n], types, f"{name}.{n}") for n in fields if n in values})


def _is_of(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool) and kind is not bool:
        return False
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    return isinstance(value, int | float if kind is float else get_origin(kind) or kind)


def _named(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)
