"""Where the state and the batches of a training on many devices lie: how they get there, and back.

A process holds what its devices hold. Between steps the state has the form that the step takes; checkpoints and
evaluation have their own:

    whole, or global arrays --place--> as the step takes it --on_mesh--> global arrays, as they are saved
    global arrays --local--> whole in each process, tied to no device
    global arrays --averaged_flow, current_flow--> a flow, to evaluate

Evaluation brings a flow's own arrays alone, none of the optimiser's. Where kernels are divided for their products, they
stay divided; else one device of each process has them whole.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resflow_jax.functional.checks import check_choice
from resflow_jax.models.flow import Flow
from resflow_jax.training.parallel import (
    STRATEGIES,
    Parameters,
    Step,
    Strategy,
    batch_sharding,
    check_data_alone,
    check_divisible,
    from_host,
    jit_train_step,
    part_of_process,
    pmap_train_step,
    replicate,
    shard_map_train_step,
    state_shardings,
    unreplicate,
)
from resflow_jax.training.step import Trainer, TrainState

Array = jax.Array


class Placement:
    """A training step on the devices of a mesh, with what it takes put in place.

    Attributes:
      mesh: from `make_mesh`.
      step: (state, batch, key) -> (state, metrics), as of `training.parallel`, with the state and batches of `place`
        and `place_batch`; the metrics are the same on all devices.
      part, parts: of every batch, cut in so many equal parts, this process reads that of this number.
    """

    mesh: Mesh
    step: Step
    part: int
    parts: int

    def __init__(self, trainer: Trainer, mesh: Mesh, strategy: Strategy = "jit", parameters: Parameters = "replicated"):
        """`parameters` as in `jit_train_step`; shard_map and pmap support only "replicated".

        Raises:
          ValueError: for an unknown strategy, and for divided parameters under another strategy than "jit".
        """
        check_choice("parallel", strategy, STRATEGIES)
        if strategy != "jit" and parameters != "replicated":
            raise ValueError(f'mesh.parameters: expected "replicated" with {strategy}, got "{parameters}"')
        self.trainer, self.mesh, self.strategy, self.parameters = trainer, mesh, strategy, parameters
        if strategy == "pmap":
            check_data_alone(strategy, mesh)  # the step of shard_map does so itself
        self.step = {
            "jit": lambda: jit_train_step(trainer, mesh, parameters=parameters),
            "shard_map": lambda: shard_map_train_step(trainer, mesh),
            "pmap": lambda: pmap_train_step(trainer, self._devices),
        }[strategy]()
        self._batches = batch_sharding(trainer, mesh)
        self.part, self.parts = part_of_process(mesh)

    @property
    def _devices(self) -> list[jax.Device]:
        return list(self.mesh.devices.flat)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError unless the devices can take equal shares of a batch."""
        check_divisible(batch_size, self.mesh)

    def place(self, tree: Any) -> Any:
        """A state, or part of one, as the step takes it: one that every process holds whole, or of `on_mesh`.

        The step is donated it: global arrays that lie as they should are taken as they are, all others copied.
        """
        if self.strategy == "pmap":
            return replicate(self.local(tree), self._devices)

        def put(leaf, sharding):
            is_global = isinstance(leaf, Array) and isinstance(leaf.sharding, NamedSharding)
            if is_global and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                return leaf
            return from_host(np.asarray(leaf), sharding)

        return jax.tree.map(put, tree, self.shardings(tree))

    def shardings(self, state: TrainState) -> TrainState:
        """Where the global arrays of a state lie."""
        return state_shardings(state, self.mesh, self.parameters)

    def place_batch(self, rows: Any) -> Any:
        """The batch of a step of which this process has read its part; with accumulation [batches, ...] of them.

        An array, or a tree of arrays with the same leading axes, as a pair (x, condition).
        """
        return jax.tree.map(self._place_rows, rows)

    def _place_rows(self, rows: np.ndarray) -> Array | np.ndarray:
        axis = len(self._batches.spec) - 1
        if self.strategy == "pmap":
            local = sum(device.process_index == jax.process_index() for device in self._devices)
            shares = rows.reshape(*rows.shape[:axis], local, -1, *rows.shape[axis + 1 :])
            return np.moveaxis(shares, axis, 0)
        number = rows.shape[axis] * self.parts

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = index[axis].indices(number)
            start = first - self.part * rows.shape[axis]
            return rows[(slice(None),) * axis + (slice(start, start + end - first),)]

        shape = *rows.shape[:axis], number, *rows.shape[axis + 1 :]
        return jax.make_array_from_callback(shape, self._batches, of_device)

    def on_mesh(self, state: TrainState) -> TrainState:
        """The state as global arrays, as they are saved."""
        return unreplicate(state, self.mesh) if self.strategy == "pmap" else state

    def averaged_flow(self, state: TrainState) -> Flow:
        """The flow with the averaged parameters of a state as of `on_mesh`, its norms iterated to convergence.

        Its arrays are whole, on one device of each process; with parameters "model" they are global and lie as those of
        the state. Then all processes together call its methods, and `tightened` in place of its `tighten`.
        """
        return self.trainer.averaged_flow(self._to_evaluate(state._replace(params=None, opt_state=None)))

    def current_flow(self, state: TrainState) -> Flow:
        """The same with the parameters of the last step."""
        return self.trainer.current_flow(self._to_evaluate(state._replace(ema=None, opt_state=None)))

    def _to_evaluate(self, tree: Any) -> Any:
        return tree if self.parameters == "model" else self.local(tree)

    def local(self, tree: Any) -> Any:
        """Global arrays, whole, and as little tied to a device as fresh ones are; others as they are.

        Through the host: else every program that runs on them would be compiled once more. No device but the one that
        they end on has more than one of them whole at a time.
        """
        return jax.tree.map(lambda leaf: jax.device_put(_on_host(leaf)) if _is_global(leaf) else leaf, tree)


def tightened(flow: Flow) -> Flow:
    """The flow, tightened (see `Flow.tighten`), with its arrays where they lay.

    If they are divided among devices, the host tightens a copy of them all, which the certificate needs; no device but
    the CPU holds it, where JAX has one. All processes call this together.
    """
    if mesh_of(flow) is None:
        flow.tighten()
        return flow
    whole = on_host(flow)
    whole.tighten()

    def back(leaf, old):
        return from_host(np.asarray(leaf), old.sharding) if _is_global(old) else old

    graphdef, state = nnx.split(flow)
    return nnx.merge(graphdef, jax.tree.map(back, nnx.state(whole), state))


def on_host(flow: Flow) -> Flow:
    """A copy of a flow whose arrays are global, whole on this process's CPU, or default device where JAX has no CPU."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    graphdef, state = nnx.split(flow)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: jax.device_put(_on_host(leaf), device), state))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh among whose devices arrays are divided; None if none of them is."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_global(leaf) and not leaf.is_fully_replicated]
    return leaves[0].sharding.mesh if leaves else None


def _is_global(leaf: Any) -> bool:
    return isinstance(leaf, Array) and isinstance(leaf.sharding, NamedSharding)


def _on_host(leaf: Array) -> np.ndarray:
    """An array, whole, in every process: from its parts, or where others have some of them by one gather."""
    if not _is_global(leaf):
        return np.array(leaf)
    if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = shard.data
    return whole
