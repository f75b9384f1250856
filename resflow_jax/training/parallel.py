"""One training step on many devices, by one of three strategies: `jax.jit` over a mesh, `jax.shard_map`, `jax.pmap`.

All three run `Trainer.step` on equal slices of a batch. They give the same results as on one device, up to rounding, if
the size of a slice is a multiple of the estimator's `subsample` (by default: even). The noise of an example depends on
its number in the whole batch. The series lengths of the roulette are drawn with one key, so that no device has to wait
for the longer series of another. Losses, gradients and statistics are means over all devices, from one sum per update.

    jit        The compiler places the arrays of the step on the mesh, and may divide the state among the devices. Each
               device computes the loss and gradient of its slice. If kernels are divided for their products, the batch
               has an axis of slices instead, which the compiler divides too.
    shard_map  Each device of the mesh runs the step on its slice. The state is the same on all devices.
    pmap       Like shard_map, but every array has a leading axis of devices, as is usual in research scripts.

A mesh has two axes. Batches are divided along "data", and kernels may be divided along "model".
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resflow_jax.functional.batch_axes import batch_axes
from resflow_jax.functional.checks import as_sequence, check_choice, check_count, check_type
from resflow_jax.training.slices import check_runs_in_slices, over_slices
from resflow_jax.training.step import Gradient, Trainer, TrainState, unless_skipped

Array = jax.Array
Step = Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Any]]]

DATA_AXIS = "data"
MODEL_AXIS = "model"
Strategy = Literal["jit", "shard_map", "pmap"]
STRATEGIES = get_args(Strategy)
Parameters = Literal["replicated", "model", "full"]
PARAMETERS = get_args(Parameters)

_MIN_ELEMENTS = 64  # smallest part of an array that a device holds, where arrays are divided


def make_mesh(data: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of devices with the axes "data" and "model".

    Args:
      data: number of slices of a batch; by default the number of devices divided by `model`.
      model: number of devices that a kernel may be divided among.
      devices: devices of the mesh; by default all devices of all processes.

    Returns:
      A mesh whose rows are the slices of a batch. Each process has devices of equally many rows.

    Raises:
      ValueError: unless data * model is the number of devices, and every process reads an equal part of a batch.

    Example:
      >>> mesh = rf.training.make_mesh()
      >>> dict(mesh.shape) == {"data": jax.device_count(), "model": 1}
      True
    """
    devices = jax.devices() if devices is None else as_devices(devices)
    check_count("mesh.model", model, 1)
    if data is not None:
        check_count("mesh.data", data, 1)
    elif len(devices) % model:
        raise ValueError(f"mesh.model: expected a divisor of {len(devices)}, the number of devices, got {model}")
    data = len(devices) // model if data is None else data
    if data * model != len(devices):
        raise ValueError(
            f"mesh: expected sizes whose product is {len(devices)}, the number of devices, got data {data} * model "
            f"{model} = {data * model}"
        )
    mesh = jax.make_mesh((data, model), (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2, devices=devices)
    if _gives_every_process_a_part(mesh):
        return mesh
    # JAX ordered the devices only by their network. Ordered by process, each process reads one part of a batch.
    ordered = np.asarray(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(data, model)
    mesh = Mesh(ordered, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)
    if not _gives_every_process_a_part(mesh):
        raise ValueError(
            f"mesh: expected sizes with which every process has an equal part of a batch, got data {data} and model "
            f"{model} with {len(devices)} devices, {jax.local_device_count()} of them in process {jax.process_index()}"
        )
    return mesh


def as_devices(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Converts devices to a list; ValueError for anything else."""
    found = as_sequence("devices", devices, "devices, as in jax.devices()")
    for n, device in enumerate(found):
        check_type(f"devices[{n}]", device, jax.Device)
    if not found:
        raise ValueError("devices: expected at least one, got none")
    return found


def _gives_every_process_a_part(mesh: Mesh) -> bool:
    """Whether every process reads an equal part. It looks at all processes, so that all get the same answer."""
    processes = {device.process_index for device in mesh.devices.flat}
    parts = {part_of_process(mesh, process) for process in processes}
    return None not in parts and len({count for _, count in parts}) == 1


def part_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int] | None:
    """Returns (index, count): which of `count` equal parts of a batch the devices of a process hold.

    The process is this one by default. Returns None if its devices hold no such part.
    """
    process = jax.process_index() if process is None else process
    own = np.vectorize(lambda device: device.process_index == process)(mesh.devices)
    own = np.moveaxis(own, list(mesh.shape).index(DATA_AXIS), 0)
    rows = np.flatnonzero(own.reshape(len(own), -1).any(axis=1))
    size = len(rows)
    if not size or rows[-1] - rows[0] != size - 1 or rows[0] % size or mesh.shape[DATA_AXIS] % size:
        return None
    return int(rows[0]) // size, mesh.shape[DATA_AXIS] // size


def jit_train_step(trainer: Trainer, mesh: Mesh, *, parameters: Parameters = "replicated") -> Step:
    """Returns the step compiled for a mesh, divided by the compiler.

    Changes that the loss makes to the flow's other variables are kept only where these are `nnx.BatchStat`.

    Args:
      trainer: trainer whose step is compiled.
      mesh: devices, from `make_mesh`.
      parameters: layout of the state (parameters, optimiser, averages and power-iteration vectors). "replicated": every
        device holds all of it. "model": arrays of more than one axis are divided along "model" by their last axis, the
        outputs of a kernel, and so are the products with them. "full": arrays are divided along both axes of the mesh,
        by the longer of their last two axes, and gathered where they are used; this takes the least memory between
        steps.

    Returns:
      (state, batch, key) -> (state, metrics) as `Trainer.step`, of global arrays. A batch has arrays [B, ...], or
      [batches, B, ...] with accumulation, or is a tree of such arrays, for example a pair (x, condition). Uncommitted
      arrays are moved to their devices. The state is donated.

    Raises:
      ValueError: if the layout is unknown; when called, if B is not a multiple of the number of devices along "data".

    Example:
      >>> import optax
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9)
      >>> step = rf.training.jit_train_step(trainer, rf.training.make_mesh())
      >>> x = jax.random.normal(jax.random.key(0), (8 * jax.device_count(), 2))
      >>> state, metrics = step(trainer.create_state(flow, rf.Exact()), x, jax.random.key(1))
      >>> int(state.step)
      1
    """
    _check_parts(trainer, mesh)
    check_choice("parameters", parameters, PARAMETERS)
    whole, batches = NamedSharding(mesh, PartitionSpec()), batch_sharding(trainer, mesh)
    constrain = jax.lax.with_sharding_constraint
    if parameters == "model":
        gradient = _gradient_by_slices(trainer, mesh.shape[DATA_AXIS])
    else:
        specs = whole.spec, batches.spec, whole.spec
        gradient = over_slices(trainer.gradient, trainer.graphdef, mesh, specs, whole.spec)

    def as_stored(state):
        """The layout between steps."""
        return jax.tree.map(constrain, state, state_shardings(state, mesh, parameters))

    def with_whole_flow(state):
        """The layout for loops that use the flow many times. Kernels divided for their products stay divided."""
        if parameters == "model":
            return state
        params, non_params = constrain((state.params, state.non_params), whole)
        return state._replace(params=params, non_params=non_params)

    def with_advanced_norms(state):
        return as_stored(with_whole_flow(trainer.advance_norms(with_whole_flow(state))))

    def step(state, batch, key):
        for leaf in jax.tree.leaves(batch):
            check_divisible(leaf.shape[len(batches.spec) - 1], mesh)
        state = as_stored(state)
        batch = constrain(batch, batches)
        found = gradient(with_whole_flow(state), batch, key)
        after = as_stored(trainer.update(state, found))
        state = unless_skipped(found.is_finite(), after, state, with_advanced_norms)
        return as_stored(state), constrain(found.metrics(), whole)

    return jax.jit(step, donate_argnums=0)


def _gradient_by_slices(trainer: Trainer, slices: int) -> Callable[[TrainState, Any, Array], Gradient]:
    """`Trainer.gradient` with an axis of slices of the batch, which the compiler divides, as it divides the kernels."""
    axis = _batch_axis(trainer)
    apply = jax.vmap(
        _with_batch_axis(trainer.gradient), (None, axis, None), None, axis_name=DATA_AXIS, spmd_axis_name=DATA_AXIS
    )

    def gradient(state, batch, key):
        def in_slices(leaf):
            return leaf.reshape(*leaf.shape[:axis], slices, -1, *leaf.shape[axis + 1 :])

        return apply(state, jax.tree.map(in_slices, batch), key)

    return gradient


def _with_batch_axis(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in the context `batch_axes`: its batch is divided along "data", which array types do not show."""

    def apply(*args):
        with batch_axes(DATA_AXIS):
            return function(*args)

    return apply


def shard_map_train_step(trainer: Trainer, mesh: Mesh) -> Step:
    """Returns the step in `jax.shard_map` over a mesh. Each device has its slice of the batch and the whole state.

    Changes that the loss makes to the flow's other variables are kept only where these are `nnx.BatchStat`.

    Args:
      trainer: trainer whose step is compiled.
      mesh: devices, from `make_mesh`, all of them along "data".

    Returns:
      As `jit_train_step`.

    Raises:
      ValueError: if the mesh has more than one device along "model", which only "jit" uses.

    Example:
      >>> import optax
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9)
      >>> step = rf.training.shard_map_train_step(trainer, rf.training.make_mesh())
      >>> x = jax.random.normal(jax.random.key(0), (8 * jax.device_count(), 2))
      >>> state, metrics = step(trainer.create_state(flow, rf.Exact()), x, jax.random.key(1))
      >>> int(state.step)
      1
    """
    _check_parts(trainer, mesh)
    check_data_alone("shard_map", mesh)
    whole = PartitionSpec()
    specs = whole, batch_sharding(trainer, mesh).spec, whole
    check_runs_in_slices("shard_map", trainer.graphdef)
    return jax.jit(jax.shard_map(trainer.step, mesh=mesh, in_specs=specs, out_specs=whole), donate_argnums=0)


def pmap_train_step(trainer: Trainer, devices: Sequence[jax.Device] | None = None) -> Step:
    """Returns the step in `jax.pmap`, whose axis is named "data".

    Changes that the loss makes to the flow's other variables are kept only where these are `nnx.BatchStat`.

    Args:
      trainer: trainer whose step is compiled.
      devices: by default all devices of all processes.

    Returns:
      (state, batch, key) -> (state, metrics). The state has a leading axis of devices on every array, equal along it,
      as `replicate` makes it. A batch has arrays [devices, B / devices, ...], or [devices, batches, B / devices, ...]
      with accumulation, for the devices of this process. The key is the same on all devices; the metrics have no axis
      of devices. The state is donated.

    Raises:
      ValueError: for a flow with a `ContinuousBlock`.

    Example:
      >>> import optax
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9)
      >>> state = rf.training.replicate(trainer.create_state(flow, rf.Exact()))
      >>> x = jax.random.normal(jax.random.key(0), (jax.device_count(), 8, 2))
      >>> state, metrics = rf.training.pmap_train_step(trainer)(state, x, jax.random.key(1))
      >>> state.step.shape == (jax.device_count(),), metrics["loss"].shape
      (True, ())
    """
    check_type("trainer", trainer, Trainer)
    devices = devices if devices is None else as_devices(devices)
    check_runs_in_slices("pmap", trainer.graphdef)
    return jax.pmap(
        _with_batch_axis(trainer.step),
        axis_name=DATA_AXIS,
        in_axes=(0, 0, None),
        out_axes=(0, None),
        donate_argnums=0,
        devices=devices,
    )


def _check_parts(trainer: Trainer, mesh: Mesh) -> None:
    check_type("trainer", trainer, Trainer)
    check_mesh(mesh)


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError for a mesh that steps cannot use. The axis "model" of `make_mesh` may be missing."""
    check_type("mesh", mesh, Mesh)
    if DATA_AXIS not in mesh.shape or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            "mesh: expected a mesh from training.make_mesh, or one whose axes are all AxisType.Auto and include "
            f'"data"; got {mesh}'
        )


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices along "data" can take equal slices of a batch."""
    check_count("batch_size", batch_size, 1)
    if batch_size % mesh.shape[DATA_AXIS]:
        raise ValueError(
            f"batch_size: expected a multiple of {mesh.shape[DATA_AXIS]}, the number of devices that share a batch, "
            f"got {batch_size}"
        )


def check_data_alone(strategy: Strategy, mesh: Mesh) -> None:
    """Raises ValueError for a mesh with devices along "model", which only "jit" uses."""
    if (model := mesh.shape.get(MODEL_AXIS, 1)) > 1:
        raise ValueError(f'parallel: expected "jit" with {model} devices along "model", got "{strategy}"')


def batch_sharding(trainer: Trainer, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the batches of an update: their examples are divided along "data"."""
    return NamedSharding(mesh, PartitionSpec(*[None] * _batch_axis(trainer), DATA_AXIS))


def _batch_axis(trainer: Trainer) -> int:
    """The axis of examples in the batch of a step."""
    return 0 if trainer.accumulate == 1 else 1


def state_shardings(state: TrainState, mesh: Mesh, parameters: Parameters) -> TrainState:
    """Returns the sharding of each array of a state, by its shape alone; see `jit_train_step`.

    The shardings are written as XLA writes them: only axes of several devices are named, and a single axis by its name
    alone. Otherwise the step would be compiled again for the state that its first call returned.
    """
    named = {"replicated": (), "model": (MODEL_AXIS,), "full": (DATA_AXIS, MODEL_AXIS)}[parameters]
    axes = tuple(axis for axis in named if mesh.shape.get(axis, 1) > 1)
    devices = math.prod(mesh.shape[axis] for axis in axes)

    def of(leaf):
        shape = np.shape(leaf)
        if not axes or len(shape) < 2 or math.prod(shape) < devices * _MIN_ELEMENTS:
            return NamedSharding(mesh, PartitionSpec())
        last = len(shape) - 1
        candidates = [last] if parameters == "model" else sorted((last - 1, last), key=lambda n: -shape[n])
        divisible = next((n for n in candidates if shape[n] % devices == 0), None)
        spec = () if divisible is None else (*[None] * divisible, axes if len(axes) > 1 else axes[0])
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, state)
