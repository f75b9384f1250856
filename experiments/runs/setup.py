"""Builds the trainer and the first state of a run, and the flow of a saved state."""

from flax import nnx

from experiments.configs.base import RunConfig
from experiments.runs.tasks.task import Task
from resflow_jax import ResidualFlow, make_reversible
from resflow_jax.models.least_arrays import abstract_flow, check_numbers
from resflow_jax.models.residual_flow import flow_from_config
from resflow_jax.training.parallel import make_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer, TrainState, fit_estimator


def set_up(task: Task) -> tuple[Trainer, TrainState]:
    """Builds the flow, initialised on training examples, and its optimiser; the state has the host form."""
    config = task.config
    _check_size(config)
    flow = flow_from_config(config.model, rngs=nnx.Rngs(config.seed))
    flow.initialize(task.initial())
    if config.optimizer.reversible:
        make_reversible(flow)
    optimizer = config.optimizer.build(config.steps)
    trainer = Trainer(nnx.split(flow)[0], task.loss, optimizer, config.optimizer.ema_decay, config.optimizer.accumulate)
    state = trainer.create_state(flow, config.estimator)
    return trainer, fit_estimator(state, config.batch_size) if config.fit_lengths else state


def _check_size(config: RunConfig) -> None:
    """Holds the model of a config.json against the newest checkpoint beside it, before a flow of that size is made.

    Raises:
      ValueError: if the checkpoint is far too small for the model; the message names the file.
    """
    directory = config.workdir / "checkpoints"
    steps = [path for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []
    if not steps:
        return  # a new run
    newest = max(steps, key=lambda path: int(path.name[:18]))
    nbytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    if not nbytes:
        return  # restoring says what is wrong
    try:
        flow = abstract_flow(config.model, nbytes // 16)  # the metadata of an array take more than that
        check_numbers(flow, nbytes)
    except ValueError as error:
        raise ValueError(f"{config.workdir / 'config.json'}: model of another size than {newest}: {error}") from error


def place_on_devices(trainer: Trainer, config: RunConfig) -> Placement:
    """Places the training step on the devices of all processes.

    Raises:
      ValueError: if the sizes of the mesh do not fit the devices, or these cannot share a batch.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    placement = Placement(trainer, mesh, config.parallel, config.mesh.parameters)
    placement.check_batch_size(config.batch_size)
    return placement


def tightened_flow(trainer: Trainer, state: TrainState) -> ResidualFlow:
    """The flow that a run is judged by: the averaged weights, tightened. The state has the host form."""
    flow = trainer.averaged_flow(state)
    flow.tighten()
    return flow
