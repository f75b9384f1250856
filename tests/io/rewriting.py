"""Changes of files of flows, and what these flows are given."""

import json

import jax.numpy as jnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import resflow_jax as rf

X = jnp.asarray([[0.3, -0.2, 0.5], [1.0, 2.0, -1.0]])
BASE = rf.StandardNormal((3,))


def rewrite(path, change):
    """Changes the arrays and the metadata of a file by change(arrays, metadata)."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    change(arrays, metadata)
    metadata.pop("sha256", None)  # what is changed on purpose is no damage
    save_file(arrays, path, metadata=metadata)


def restructure(path, change):
    """Changes the layers of the chain of a file by change(list of descriptions)."""

    def of_metadata(arrays, metadata):
        structure = json.loads(metadata["structure"])
        change(structure["arguments"]["bijector"]["arguments"]["bijectors"])
        metadata["structure"] = json.dumps(structure)

    rewrite(path, of_metadata)
