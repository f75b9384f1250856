"""One training step on many devices: by `jax.jit` over a mesh, by `jax.shard_map` or by `jax.pmap`.

All three run `Trainer.step` on equal shares of a batch and give the numbers of one device, to rounding: every
example draws its noise by its number in the whole batch, the roulette's lengths are drawn with one key, so that no
device waits for another's longer series, and losses, gradients and statistics are means over all devices, taken
in one sum an update.

    jit        the compiler places the arrays of the step on the mesh, and may divide the state among the devices; loss
               and gradient are each device's of its share, or, where kernels are divided for their products, of an axis
               of shares that the compiler divides too
    shard_map  each device of the mesh runs the step on its share; the state is the same on all
    pmap       the same with a leading axis of devices on every array, as research scripts have it

A mesh has the axes "data", along which batches are divided, and "model", along which kernels may be.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resflow_jax.functional.batch_axes import batch_axes
from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.training.step import Gradient, Trainer, TrainState

Array = jax.Array
Step = Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Any]]]

DATA_AXIS = "data"
MODEL_AXIS = "model"
Strategy = Literal["jit", "shard_map", "pmap"]
STRATEGIES = get_args(Strategy)
Parameters = Literal["replicated", "model", "full"]
PARAMETERS = get_args(Parameters)

_LEAST = 64  # elements of an array that a device holds at least, where arrays are divided


def make_mesh(data: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, with the axes "data" and "model".

    Args:
      data: devices along which a batch is divided; None for all that `model` leaves.
      model: devices along which kernels may be divided.
      devices: those of the mesh; by default all of all processes.

    Raises:
      ValueError: unless data * model is the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
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
    if _has_a_part_for_every_process(mesh):
        return mesh
    # JAX ordered the devices by their network alone; process by process, each reads one part of a batch.
    ordered = np.asarray(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(data, model)
    mesh = Mesh(ordered, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)
    if not _has_a_part_for_every_process(mesh):
        raise ValueError(
            f"mesh: expected sizes with which every process has an equal part of a batch, got data {data} and model "
            f"{model} with {len(devices)} devices, {jax.local_device_count()} of them in process {jax.process_index()}"
        )
    return mesh


def _has_a_part_for_every_process(mesh: Mesh) -> bool:
    """Asked for all of them, so that all have the same answer."""
    processes = {device.process_index for device in mesh.devices.flat}
    parts = {part_of_process(mesh, process) for process in processes}
    return None not in parts and len({number for _, number in parts}) == 1


def part_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int] | None:
    """(n, parts): of a batch cut in so many equal parts, a process's devices have number n; None if they do not.

    By default of this process.
    """
    process = jax.process_index() if process is None else process
    own = np.vectorize(lambda device: device.process_index == process)(mesh.devices)
    rows = np.flatnonzero(own.any(axis=1))
    number = len(rows)
    if not number or rows[-1] - rows[0] != number - 1 or rows[0] % number or mesh.shape[DATA_AXIS] % number:
        return None
    return int(rows[0]) // number, mesh.shape[DATA_AXIS] // number


def jit_train_step(trainer: Trainer, mesh: Mesh, *, parameters: Parameters = "replicated") -> Step:
    """The step compiled for a mesh, divided by the compiler.

    Args:
      trainer: whose step.
      mesh: from `make_mesh`.
      parameters: where the state lies, that is parameters, optimiser, averages and power-iteration vectors.
        "replicated": on every device. "model": arrays of more than one axis divided along "model" by their last, a
        kernel's outputs; the products with them are divided too. "full": along both axes, by the longer of the last
        two, and gathered where they are used: least memory between steps.

    Returns:
      (state, batch, key) -> (state, metrics) as `Trainer.step`, of global arrays: batch [B, ...], or with accumulation
      [batches, B, ...]; a tree of arrays is one batch, as a pair (x, condition). Arrays that are tied to no device are
      moved to where they should lie. The state is donated.
    """
    check_choice("parameters", parameters, PARAMETERS)
    whole, batches = NamedSharding(mesh, PartitionSpec()), batch_sharding(trainer, mesh)
    if parameters == "model":
        gradient = _by_axis_of_shares(trainer, mesh.shape[DATA_AXIS])
    else:
        specs = whole.spec, batches.spec, whole.spec
        gradient = jax.shard_map(trainer.gradient, mesh=mesh, in_specs=specs, out_specs=whole.spec)

    def divided(state):
        return jax.tree.map(jax.lax.with_sharding_constraint, state, state_shardings(state, mesh, parameters))

    def with_flow_gathered(state):
        """At the ends of loops that use it again and again; where kernels are divided for their products, they stay."""
        if parameters == "model":
            return state
        params, rest = jax.lax.with_sharding_constraint((state.params, state.rest), whole)
        return state._replace(params=params, rest=rest)

    def step(state, batch, key):
        for leaf in jax.tree.leaves(batch):
            check_divisible(leaf.shape[len(batches.spec) - 1], mesh)
        state, batch = divided(state), jax.lax.with_sharding_constraint(batch, batches)
        found = gradient(with_flow_gathered(state), batch, key)
        state = divided(trainer.update(state, found))
        state = with_flow_gathered(trainer.advance_norms(with_flow_gathered(state)))
        return divided(state), jax.lax.with_sharding_constraint(found.metrics(), whole)

    return jax.jit(step, donate_argnums=0)


def _by_axis_of_shares(trainer: Trainer, shares: int) -> Callable[[TrainState, Any, Array], Gradient]:
    """`Trainer.gradient` with an axis of shares, along which the compiler divides, as it divides the kernels."""
    axis = _batch_axis(trainer)
    apply = jax.vmap(
        _divided(trainer.gradient), (None, axis, None), None, axis_name=DATA_AXIS, spmd_axis_name=DATA_AXIS
    )

    def gradient(state, batch, key):
        def in_shares(leaf):
            return leaf.reshape(*leaf.shape[:axis], shares, -1, *leaf.shape[axis + 1 :])

        return apply(state, jax.tree.map(in_shares, batch), key)

    return gradient


def _divided(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, told that its batch is divided along "data", where the types of arrays do not tell."""

    def apply(*args):
        with batch_axes(DATA_AXIS):
            return function(*args)

    return apply


def shard_map_train_step(trainer: Trainer, mesh: Mesh) -> Step:
    """The step in `jax.shard_map` over a mesh, each device with its share of the batch, the state the same on all.

    Of what the loss changes in the flow beside the parameters, only `nnx.BatchStat` is kept. Returns as
    `jit_train_step`.

    Raises:
      ValueError: for a mesh with more than one device along "model", to which there is nothing to give.
    """
    check_data_alone("shard_map", mesh)
    whole = PartitionSpec()
    specs = whole, batch_sharding(trainer, mesh).spec, whole
    return jax.jit(jax.shard_map(trainer.step, mesh=mesh, in_specs=specs, out_specs=whole), donate_argnums=0)


def pmap_train_step(trainer: Trainer, devices: Sequence[jax.Device] | None = None) -> Step:
    """The step in `jax.pmap`, whose axis is named "data".

    Args:
      trainer: whose step.
      devices: by default all of all processes.

    Returns:
      (state, batch, key) -> (state, metrics): the state with a leading axis of devices on every array, the same for
      each, as `replicate` makes it; batch [devices, per-device batch, ...], or with accumulation [devices, batches,
      per-device batch, ...], of this process's devices; one key for all; metrics without the axis. The state is
      donated.
    """
    return jax.pmap(
        _divided(trainer.step),
        axis_name=DATA_AXIS,
        in_axes=(0, 0, None),
        out_axes=(0, None),
        donate_argnums=0,
        devices=devices,
    )


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Arrays with a leading axis of all devices, a copy on each, for `pmap_train_step`."""
    mesh = Mesh(np.asarray(jax.devices() if devices is None else devices), (DATA_AXIS,))
    stacked = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(lambda leaf: from_host(np.broadcast_to(leaf, (mesh.size, *np.shape(leaf))), stacked), tree)


def unreplicate(tree: Any, mesh: Mesh) -> Any:
    """The arrays that `replicate` has made, or a step gave back, without the axis: one array on all devices each."""
    whole = NamedSharding(mesh, PartitionSpec())

    def join(leaf):
        parts = [shard.data[0] for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape[1:], whole, parts)

    return jax.tree.map(join, tree)


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices along "data" can take equal shares of a batch."""
    if batch_size % mesh.shape[DATA_AXIS]:
        raise ValueError(
            f"batch_size: expected a multiple of {mesh.shape[DATA_AXIS]}, the number of devices that share a batch, "
            f"got {batch_size}"
        )


def batch_sharding(trainer: Trainer, mesh: Mesh) -> NamedSharding:
    """Where the batches of an update lie: divided along "data" by examples."""
    return NamedSharding(mesh, PartitionSpec(*[None] * _batch_axis(trainer), DATA_AXIS))


def state_shardings(state: TrainState, mesh: Mesh, parameters: Parameters) -> TrainState:
    """Where each array of a state lies, by its shape alone; see `jit_train_step`.

    Written as XLA writes it, or a step would be compiled again for the state that the first one gave back: only axes of
    several devices are named, one by its name alone.
    """
    named = {"replicated": (), "model": (MODEL_AXIS,), "full": (DATA_AXIS, MODEL_AXIS)}[parameters]
    axes = tuple(axis for axis in named if mesh.shape[axis] > 1)
    devices = math.prod(mesh.shape[axis] for axis in axes)

    def of(leaf):
        shape = np.shape(leaf)
        if not axes or len(shape) < 2 or math.prod(shape) < devices * _LEAST:
            return NamedSharding(mesh, PartitionSpec())
        last = len(shape) - 1
        candidates = [last] if parameters == "model" else sorted((last - 1, last), key=lambda n: -shape[n])
        divisible = next((n for n in candidates if shape[n] % devices == 0), None)
        spec = () if divisible is None else (*[None] * divisible, axes if len(axes) > 1 else axes[0])
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, state)


def on_all_devices(tree: Any, mesh: Mesh) -> Any:
    """Global arrays, whole on every device, from those that every process has; PRNG keys too."""
    whole = NamedSharding(mesh, PartitionSpec())

    def put(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return from_host(np.asarray(leaf), whole)

    return jax.tree.map(put, tree)


def divided(examples: Any, mesh: Mesh) -> Any:
    """Global arrays [B, ...] of examples that every process has, divided along "data"."""
    shares = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(lambda leaf: from_host(leaf, shares), examples)


def from_host(leaf: np.ndarray, sharding: NamedSharding) -> Array:
    """A global array from one that every process holds; each sends its devices what they are to have."""
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def _batch_axis(trainer: Trainer) -> int:
    """Which axis of a step's batch is that of examples."""
    return 0 if trainer.accumulate == 1 else 1


def check_data_alone(strategy: Strategy, mesh: Mesh) -> None:
    """Raises ValueError for a mesh with devices along "model", which only "jit" uses."""
    if mesh.shape[MODEL_AXIS] > 1:
        raise ValueError(
            f'parallel: expected "jit" with {mesh.shape[MODEL_AXIS]} devices along "model", got "{strategy}"'
        )
