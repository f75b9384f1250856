"""Runs a training step on the devices of a mesh, and converts states and batches between the layouts.

See `training.forms` for the three layouts of a state: host, step and checkpoint.

    host or checkpoint --place--> step --to_checkpoint--> checkpoint --to_host--> host
    checkpoint --averaged_flow, current_flow--> a flow to evaluate
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from resflow_jax.functional.checks import check_choice, check_type
from resflow_jax.models.flow import Flow
from resflow_jax.training.forms import (
    converted,
    from_host,
    is_global,
    mesh_of,
    replicate,
    to_global,
    to_host,
    to_numpy,
    unreplicate,
)
from resflow_jax.training.parallel import (
    STRATEGIES,
    Parameters,
    Step,
    Strategy,
    batch_sharding,
    check_data_alone,
    check_divisible,
    check_mesh,
    jit_train_step,
    part_of_process,
    pmap_train_step,
    shard_map_train_step,
    state_shardings,
)
from resflow_jax.training.step import Trainer, TrainState, averaged_params

Array = jax.Array


class Placement:
    """A training step on the devices of a mesh, with the conversions of states and batches to and from its layout.

    Attributes:
      mesh: the mesh, from `make_mesh`.
      step: (state, batch, key) -> (state, metrics), compiled, as `Trainer.step`. It takes a state from `place` and a
        batch from `place_batch`. It gives the same results as on one device, up to rounding. The metrics are the same
        on all devices. The state is donated: its arrays cannot be used again.
      part, parts: every batch is cut into `parts` equal slices; this process reads slice number `part`.

    Example:
      >>> import optax
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9)
      >>> placement = rf.training.Placement(trainer, rf.training.make_mesh())
      >>> state = placement.place(trainer.create_state(flow, rf.Exact()))
      >>> x = np.random.default_rng(0).normal(size=(8 * jax.device_count(), 2))
      >>> state, metrics = placement.step(state, placement.place_batch(x), jax.random.key(0))
      >>> placement.averaged_flow(placement.to_checkpoint(state)).event_shape
      (2,)
    """

    mesh: Mesh
    step: Step
    part: int
    parts: int

    def __init__(self, trainer: Trainer, mesh: Mesh, strategy: Strategy = "jit", parameters: Parameters = "replicated"):
        """Compiles nothing yet.

        Args:
          trainer: trainer whose step is run.
          mesh: devices, from `make_mesh`.
          strategy: "jit", "shard_map" or "pmap", as in `training.parallel`.
          parameters: layout of the state, as in `jit_train_step`; shard_map and pmap support only "replicated".

        Raises:
          ValueError: if the strategy is unknown, or does not support the layout or devices along "model"; if the mesh
            has no axis "data", has axes that are not AxisType.Auto, or does not give each process an equal slice of a
            batch.
        """
        check_type("trainer", trainer, Trainer)
        check_mesh(mesh)
        check_choice("strategy", strategy, STRATEGIES)
        if strategy != "jit" and parameters != "replicated":
            raise ValueError(f'mesh.parameters: expected "replicated" with {strategy}, got "{parameters}"')
        self.trainer, self.mesh, self.strategy, self.parameters = trainer, mesh, strategy, parameters
        if strategy == "pmap":
            check_data_alone(strategy, mesh)  # shard_map_train_step checks this itself
        self.step = {
            "jit": lambda: jit_train_step(trainer, mesh, parameters=parameters),
            "shard_map": lambda: shard_map_train_step(trainer, mesh),
            "pmap": lambda: pmap_train_step(trainer, self._devices),
        }[strategy]()
        self._batches = batch_sharding(trainer, mesh)
        if (part := part_of_process(mesh)) is None:
            raise ValueError(
                "mesh: expected a mesh from training.make_mesh, or one that gives each process an equal slice of a "
                f"batch; got {mesh}"
            )
        self.part, self.parts = part

    @property
    def _devices(self) -> list[jax.Device]:
        return list(self.mesh.devices.flat)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError unless the devices along "data" can take equal slices of a batch."""
        check_divisible(batch_size, self.mesh)

    def shardings(self, state: TrainState) -> TrainState:
        """Returns the sharding of every array of a state in the checkpoint layout."""
        return state_shardings(state, self.mesh, self.parameters)

    def place(self, tree: Any) -> Any:
        """Converts a state, or a part of one, from the host or the checkpoint layout to the step layout.

        The step donates the result. It may contain arrays of `tree`: global arrays that already have the right sharding
        are not copied.
        """
        if self.strategy == "pmap":
            return replicate(to_host(tree), self._devices)
        return to_global(tree, self.shardings(tree))

    def to_checkpoint(self, state: TrainState) -> TrainState:
        """Converts a state, or a part of one, from the step layout to the checkpoint layout."""
        return unreplicate(state, self.mesh) if self.strategy == "pmap" else state

    def to_host(self, tree: Any) -> Any:
        """Converts a state, or a part of one, from the checkpoint layout to the host layout; see `forms.to_host`."""
        return to_host(tree)

    def place_batch(self, rows: Any) -> Any:
        """Returns the batch of a step, from the slice number `part` that this process has read.

        Args:
          rows: NumPy array [B / parts, ...], or a tree of such arrays, for example a pair (x, condition). With
            accumulation [batches, B / parts, ...].
        """
        return jax.tree.map(self._place_rows, rows)

    def _place_rows(self, rows: np.ndarray) -> Array | np.ndarray:
        axis = len(self._batches.spec) - 1
        if self.strategy == "pmap":
            local = sum(device.process_index == jax.process_index() for device in self._devices)
            slices = rows.reshape(*rows.shape[:axis], local, -1, *rows.shape[axis + 1 :])
            return np.moveaxis(slices, axis, 0)
        batch_size = rows.shape[axis] * self.parts

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = index[axis].indices(batch_size)
            start = first - self.part * rows.shape[axis]
            return rows[(slice(None),) * axis + (slice(start, start + end - first),)]

        shape = *rows.shape[:axis], batch_size, *rows.shape[axis + 1 :]
        return jax.make_array_from_callback(shape, self._batches, of_device)

    def averaged_flow(self, state: TrainState) -> Flow:
        """Returns the flow with the averaged parameters; its power iterations are run to convergence.

        Before the first update that is not skipped there is no average: the flow then has the parameters themselves.

        Only the arrays of the flow are moved, none of the optimiser. They are whole, on one device of each process.
        With parameters "model" they are global and have the shardings of the state. All processes must then call the
        methods of the flow together, and `tightened` instead of its `tighten`.

        Args:
          state: a state in the checkpoint layout.
        """
        if not int(state.ema.count):
            return self.current_flow(state)
        moved = self._to_evaluate(state._replace(params=None, opt_state=None))
        params = averaged_params(moved.ema, self.trainer.ema_decay, state.params)  # their dtypes alone are used
        return self.trainer.current_flow(moved._replace(params=params))

    def current_flow(self, state: TrainState) -> Flow:
        """As `averaged_flow`, with the parameters of the last step."""
        return self.trainer.current_flow(self._to_evaluate(state._replace(ema=None, opt_state=None)))

    def _to_evaluate(self, tree: Any) -> Any:
        return tree if self.parameters == "model" else to_host(tree)


def tightened(flow: Flow) -> Flow:
    """Tightens a flow (see `Flow.tighten`) and returns it; its arrays keep their shardings.

    If the arrays are divided among devices, the host tightens a copy of the whole flow, because the certificate needs
    whole kernels. Where JAX has a CPU device, only that device holds the copy. All processes must call this together.
    """
    if mesh_of(flow) is None:
        flow.tighten()
        return flow
    whole = on_host(flow)
    whole.tighten()

    def back(leaf, old):
        return converted(lambda leaf: from_host(np.asarray(leaf), old.sharding), leaf) if is_global(old) else old

    graphdef, state = nnx.split(flow)
    return nnx.merge(graphdef, jax.tree.map(back, nnx.state(whole), state))


def on_host(flow: Flow) -> Flow:
    """Returns a copy of a flow of global arrays, whole on the CPU of this process (the default device without one)."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None

    def put(leaf):
        return converted(lambda leaf: jax.device_put(to_numpy(leaf), device), leaf)

    graphdef, state = nnx.split(flow)
    return nnx.merge(graphdef, jax.tree.map(put, state))
