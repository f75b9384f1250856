"""Configs as JSON text, and back."""

import dataclasses
import json

from resflow_jax.interop.plain_json import as_json
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig

_CONFIGS = {cls.__name__: cls for cls in (ImageFlowConfig, VectorFlowConfig)}


def config_to_json(config: ImageFlowConfig | VectorFlowConfig) -> str:
    """JSON of the standard, infinite numbers in it as strings."""
    return json.dumps(as_json(config))


def config_from_json(text: str) -> ImageFlowConfig | VectorFlowConfig:
    """The config that `config_to_json` wrote.

    Raises:
      ValueError: for anything else; the message names what is wrong.
    """
    try:
        fields = json.loads(text)
        cls = _CONFIGS[fields.pop("type")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
