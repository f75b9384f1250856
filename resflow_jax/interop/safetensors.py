"""Flows in the format of safetensors: one file of arrays that any language reads, with the config as metadata.

    rf.interop.safetensors.save(flow, "flow.safetensors")
    flow = rf.interop.safetensors.load("flow.safetensors")

The arrays are those of `interop.stateless`, named by their path ("params.scales.0.bijectors.1. ..."); the metadata has
the config as JSON under "config", infinite numbers in it as strings, and the version of this package. Nothing in a file
is executed.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from resflow_jax.interop.extras import needs_extra
from resflow_jax.interop.stateless import Stateless, flattened, nested, split_variables
from resflow_jax.interop.whole_files import whole_file
from resflow_jax.io.config_json import config_from_json, config_to_json
from resflow_jax.models.residual_flow import ResidualFlow

with needs_extra("safetensors"):
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file, save_file


def save(flow: ResidualFlow, path: str | Path) -> None:
    """Writes all arrays of a flow, in its dtype, and its config; replaces a file of this name when all is written."""
    metadata = {"format": "resflow_jax", "version": version("resflow_jax"), "config": config_to_json(flow.config)}
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
        return Stateless(config_from_json(metadata["config"])).bind(
            nested({tuple(name.split(".")): array for name, array in arrays.items()})
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
