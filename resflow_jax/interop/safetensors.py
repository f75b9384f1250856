"""Flows in the format of safetensors: one file of arrays that any language reads, with the config as metadata.

    rf.interop.safetensors.save(flow, "flow.safetensors")
    flow = rf.interop.safetensors.load("flow.safetensors")

The arrays are those of `interop.stateless`, named by their path ("params.scales.0.bijectors.1. ..."); the metadata has
the config as JSON under "config", infinite numbers in it as strings, and the version of this package. Nothing in a file
is executed.
"""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from resflow_jax.interop.extras import needs_extra
from resflow_jax.interop.plain_json import as_json
from resflow_jax.interop.stateless import Stateless, flattened, nested, split_variables
from resflow_jax.interop.whole_files import whole_file
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.residual_flow import ResidualFlow

with needs_extra("safetensors"):
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file, save_file

_CONFIGS = {cls.__name__: cls for cls in (ImageFlowConfig, VectorFlowConfig)}


def save(flow: ResidualFlow, path: str | Path) -> None:
    """Writes all arrays of a flow, in its dtype, and its config; replaces a file of this name when all is written."""
    metadata = {"format": "resflow_jax", "version": version("resflow_jax"), "config": json.dumps(as_json(flow.config))}
    arrays = {".".join(path): np.array(array, order="C") for path, array in flattened(split_variables(flow))}
    with whole_file(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def load(path: str | Path) -> ResidualFlow:
    """The flow that `save` wrote, in the dtype of the file where JAX has it on.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file of another format or without a config, and for arrays that the config does not say.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a file of safetensors, got {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a file of safetensors, could not read it: {error}") from error
    if "config" not in metadata:
        raise ValueError(f"{path}: expected the config of a flow in the metadata, got {sorted(metadata)}")
    try:
        return Stateless(_from_json(metadata["config"])).bind(
            nested({tuple(name.split(".")): array for name, array in arrays.items()})
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_json(text: str) -> ImageFlowConfig | VectorFlowConfig:
    try:
        fields = json.loads(text)
        cls = _CONFIGS[fields.pop("type")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config: expected JSON of a config of type {' or '.join(_CONFIGS)}, got {text!r}") from error
    unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"config: expected the fields of {cls.__name__}, got also {', '.join(sorted(unknown))}")
    for name in ("norms", "fc_norms"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(map(float, fields[name]))
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"config: expected all fields of {cls.__name__} that have no default: {error}") from error
