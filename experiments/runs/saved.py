"""Loads the flow of a run, finished or still running, from its work directory alone.

The config is read back from config.json, in the format of `resflow_jax.io.config_json`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from experiments.configs.base import (
    DataConfig,
    DensityConfig,
    DistributedConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SafetyConfig,
    VectorDataConfig,
    VectorsConfig,
)
from experiments.configs.classification import ClassifyConfig, HybridConfig, ImportedClassifyConfig
from experiments.configs.toy import ToyConfig, ToyEvaluationConfig
from experiments.runs.fingerprint import fingerprint
from experiments.runs.setup import set_up, tightened_flow
from experiments.runs.tasks.of_config import task_of
from experiments.runs.tasks.task import Task
from experiments.runs.workdir import check_data
from resflow_jax import (
    ClassifierConfig,
    Defensive,
    Exact,
    Geometric,
    Poisson,
    ResidualFlow,
    Roulette,
    Truncated,
)
from resflow_jax.functional.checks import check_choice, error_text
from resflow_jax.io.config_json import FLOW_TYPES, from_document, parsed
from resflow_jax.training.checkpoints import Checkpoints

Weights = Literal["best", "latest"]

# The types that a config.json may hold. `Fitted` is not among them: its table is stored in the checkpoints.
_TYPES = {
    cls.__name__: cls
    for cls in (
        DensityConfig,
        VectorsConfig,
        ToyConfig,
        ClassifyConfig,
        ImportedClassifyConfig,
        HybridConfig,
        ClassifierConfig,
        DataConfig,
        VectorDataConfig,
        OptimizerConfig,
        EvaluationConfig,
        ToyEvaluationConfig,
        MeshConfig,
        SafetyConfig,
        DistributedConfig,
        Exact,
        Truncated,
        Roulette,
        Geometric,
        Poisson,
        Defensive,
        *FLOW_TYPES.values(),
    )
}


@dataclasses.dataclass(frozen=True)
class MovedData:
    """The present place of a run's data, if they have been moved since.

    Attributes:
      path: path of images or vectors of your own, as `--data.path` of the run.
      dir: directory of TensorFlow data sets, as `--data.dir` of the run.
    """

    path: Path | None = None
    dir: Path | None = None


class SavedFlow(NamedTuple):
    """A run's flow with its config and task.

    Attributes:
      config: config of the run; its `workdir` is the directory that the run was read from.
      task: task of the run, with its data.
      flow: the flow with the averaged weights, tightened, as the run itself evaluates it.
      step: training step of the checkpoint.
    """

    config: RunConfig
    task: Task
    flow: ResidualFlow
    step: int


def has_all_steps(config: RunConfig) -> bool:
    """Whether the latest checkpoint in the work directory of a run is that of its last step."""
    directory = config.workdir / "checkpoints"
    if not directory.is_dir():
        return False
    with Checkpoints(directory) as checkpoints:
        return checkpoints.latest_step == config.steps


def saved_flow(run_dir: Path, weights: Weights = "best", data: MovedData = MovedData()) -> SavedFlow:
    """Loads the flow of a run, from the checkpoint of the best validation so far or from the latest checkpoint.

    Args:
      run_dir: work directory of the run; it may have been moved.
      weights: "best" or "latest".
      data: present place of the run's data.

    Raises:
      FileNotFoundError: if the directory holds no run, the run has no checkpoint yet, or its data are not found.
      ValueError: for other weights, if no checkpoint can be read, and as `check_data` and `saved_config`.

    A checkpoint that is damaged is skipped, with a warning that names it and the one that is taken.
    """
    check_choice("weights", weights, get_args(Weights))
    config = saved_config(run_dir, data)
    directory = config.workdir / "checkpoints"
    none_yet = FileNotFoundError(
        f"run_dir: expected a run with a checkpoint, got {run_dir} without any; the first is written at step "
        f"{min(config.evaluation.every, config.steps)}"
    )
    if not directory.is_dir():
        raise none_yet
    if not any(path.name.isdigit() for path in directory.iterdir()):
        raise none_yet
    task = task_of(config)
    check_data(config.workdir, config.data, fingerprint(task))
    trainer, state = set_up(task)
    with Checkpoints(directory) as checkpoints:  # read early, since a running run replaces its checkpoints
        step = checkpoints.best_step if weights == "best" else checkpoints.latest_step
        if step is None:
            raise FileNotFoundError(
                f"weights: expected a validated checkpoint, the only one in {run_dir} is of step "
                f"{checkpoints.latest_step}, before the first validation; weights 'latest' reads it"
            )
        state = checkpoints.restore_intact(state, ema_decay=trainer.ema_decay, weights=weights)
    return SavedFlow(config, task, tightened_flow(trainer, state), int(state.step))


def _moved(old: Any, to: MovedData) -> Any:
    """The data settings of a config with the data's present place."""
    if to.path is not None:
        if not isinstance(old, DataConfig | VectorDataConfig) or old.path is None:
            raise ValueError(f"data.path: expected a run on files of your own, which can be moved, got one on {old}")
        old = dataclasses.replace(old, path=to.path)
    if to.dir is not None:
        if not isinstance(old, DataConfig) or old.path is not None:
            raise ValueError(f"data.dir: expected a run on a TensorFlow data set, got one on {old}")
        old = dataclasses.replace(old, dir=str(to.dir))
    return old


def saved_config(run_dir: Path, data: MovedData = MovedData()) -> RunConfig:
    """Reads the config of the run in a work directory, which may have been moved, with the present place of its data.

    Raises:
      FileNotFoundError: if the directory holds no config.json.
      ValueError: if config.json is damaged, belongs to another experiment, has types or fields that this version of the
        code does not know, or lacks some; the message names them and the file. Also for a place of data that the run
        does not have.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"run_dir: expected the work directory of a run, got {run_dir} without config.json")
    try:
        config = from_document(parsed(path.read_text()), RunConfig, _TYPES)
    except ValueError as error:
        raise ValueError(f"{path}: expected the config of a run of this version; {error_text(error)}") from error
    return dataclasses.replace(config, workdir=Path(run_dir), data=_moved(config.data, data))
