"""The flow of an `experiments.density` run, finished or still running, from its work directory alone.

The config is read back from config.json, as `experiments.run.as_json` writes it: each dataclass with its name as
"type", tuples as lists, paths and infinite numbers as strings.
"""

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from experiments import density
from experiments.configs.base import (
    DataConfig,
    DensityConfig,
    DistributedConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    VectorDataConfig,
    VectorsConfig,
)
from experiments.configs.toy import ToyConfig, ToyEvaluationConfig
from experiments.train import Task, set_up, tightened_flow
from resflow_jax import (
    Defensive,
    Exact,
    Geometric,
    ImageFlowConfig,
    Poisson,
    ResidualFlow,
    Roulette,
    Truncated,
    VectorFlowConfig,
)
from resflow_jax.functional.checks import check_choice
from resflow_jax.training.checkpoints import Checkpoints

Weights = Literal["best", "latest"]

# What a config.json may hold. `Fitted` is no setting: its table lies in the checkpoints.
_TYPES = {
    cls.__name__: cls
    for cls in (
        DensityConfig,
        VectorsConfig,
        ToyConfig,
        DataConfig,
        VectorDataConfig,
        OptimizerConfig,
        EvaluationConfig,
        ToyEvaluationConfig,
        MeshConfig,
        DistributedConfig,
        ImageFlowConfig,
        VectorFlowConfig,
        Exact,
        Truncated,
        Roulette,
        Geometric,
        Poisson,
        Defensive,
    )
}


class SavedFlow(NamedTuple):
    """A run's flow and what it belongs to.

    Attributes:
      config: of the run; its work directory is where the run was found.
      task: what it was to learn, with its data.
      flow: with the averaged weights, tightened, as the run itself evaluates it.
      step: of the checkpoint.
    """

    config: RunConfig
    task: Task
    flow: ResidualFlow
    step: int


def saved_flow(run_dir: Path, weights: Weights = "best", data: Path | None = None) -> SavedFlow:
    """The flow of a run: of the best validation so far, or of the latest checkpoint.

    Args:
      run_dir: its work directory, wherever that has been moved to.
      weights: "best" or "latest".
      data: where its data have been moved to: the new `--data.path`, or `--data.dir` if it had no path.

    Raises:
      FileNotFoundError: if the directory holds no run, the run has no checkpoint yet, or its data are not found.
      ValueError: for other weights, and as `saved_config`.
    """
    check_choice("weights", weights, get_args(Weights))
    config = saved_config(run_dir)
    if data is not None:
        config = dataclasses.replace(config, data=_moved(config.data, data))
    directory = config.workdir / "checkpoints"
    none_yet = FileNotFoundError(
        f"run_dir: expected a run with a checkpoint, got {run_dir} without any; the first is written at step "
        f"{min(config.evaluation.every, config.steps)}"
    )
    if not directory.is_dir():
        raise none_yet
    if not any(path.name.isdigit() for path in directory.iterdir()):
        raise none_yet
    task = density.task_of(config)
    trainer, state = set_up(task)
    with Checkpoints(directory) as checkpoints:  # now, for a run that goes on replaces them
        step = checkpoints.best_step if weights == "best" else checkpoints.latest_step
        if step is None:
            raise FileNotFoundError(
                f"weights: expected a validated checkpoint, the only one in {run_dir} is of step "
                f"{checkpoints.latest_step}, before the first validation; 'latest' are its weights"
            )
        state = checkpoints.restore(step, state, ema_decay=trainer.ema_decay)
    return SavedFlow(config, task, tightened_flow(trainer, state), step)


def _moved(old: Any, to: Path) -> Any:
    """The data of a config, at another place."""
    if isinstance(old, DataConfig | VectorDataConfig) and old.path is not None:
        return dataclasses.replace(old, path=to)
    if isinstance(old, DataConfig):
        return dataclasses.replace(old, dir=str(to))
    raise ValueError(f"data: expected a run on files, which can be moved, got one on {old}")


def saved_config(run_dir: Path) -> RunConfig:
    """The config of the run in a work directory, wherever that has been moved to.

    Raises:
      FileNotFoundError: if the directory holds no config.json.
      ValueError: if config.json is damaged, of another experiment, or has types or fields that this version of the
        code does not know, or lacks some; the message names them and the file.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"run_dir: expected the work directory of a run, got {run_dir} without config.json")
    try:
        config = _read(json.loads(path.read_text()), RunConfig, "config")
    except ValueError as error:
        raise ValueError(f"{path}: expected the config of a run of experiments.density; {error}") from error
    return dataclasses.replace(config, workdir=Path(run_dir))


def _read(value: Any, hint: Any, name: str) -> Any:
    """A value of the type that a field's hint allows, from its JSON."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = tuple(kind for kind in kinds if not _is_protocol(kind)) or kinds  # a config has none of the user's own
    if isinstance(value, dict):
        value = _dataclass(value, name)
    elif isinstance(value, list):
        item = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        value = tuple(_read(v, item, f"{name}[{n}]") for n, v in enumerate(value))
    elif isinstance(value, str) and Path in kinds:
        value = Path(value)
    elif value in ("inf", "-inf", "nan") and float in kinds:
        value = float(value)
    if not any(_is_of(value, kind) for kind in kinds):
        raise ValueError(f"{name}: expected {' or '.join(map(_named, kinds))}, got {value!r}")
    return value


def _dataclass(fields: dict[str, Any], name: str) -> Any:
    """The dataclass that `as_json` wrote as a dict."""
    check_choice(f"{name}.type", fields.get("type"), tuple(_TYPES))
    cls = _TYPES[fields["type"]]
    hints = get_type_hints(cls)
    expected = {field.name for field in dataclasses.fields(cls)}
    found = fields.keys() - {"type"}
    if expected != found:
        wrong = {"missing": expected - found, "unknown": found - expected}
        listed = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names)
        raise ValueError(f"{name}: expected the fields of {cls.__name__}, got others ({listed})")
    return cls(**{field: _read(fields[field], hints[field], f"{name}.{field}") for field in expected})


def _is_of(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if _is_protocol(kind):
        return all(callable(getattr(value, name, None)) for name in vars(kind) if not name.startswith("_"))
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, int | float if kind is float else get_origin(kind) or kind)


def _is_protocol(kind: Any) -> bool:
    return getattr(kind, "_is_protocol", False)


def _named(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)
