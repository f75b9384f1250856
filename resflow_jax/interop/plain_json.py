"""Configs as plain JSON values."""

import dataclasses
import math
from pathlib import Path
from typing import Any


def as_json(config: Any) -> Any:
    """A config dataclass, or a dict, as plain JSON values; a nested dataclass carries its class as "type"."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: as_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, dict):
        return {name: as_json(value) for name, value in config.items()}
    if isinstance(config, tuple | list):
        return [as_json(item) for item in config]
    if isinstance(config, float) and not math.isfinite(config):
        return str(config)  # JSON has no infinity
    return str(config) if isinstance(config, Path) else config
