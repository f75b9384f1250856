"""The three layouts of a training state on many devices, and every conversion between them.

    host        Each array is whole in every process and not committed to a device, as `Trainer.create_state` makes it.
    step        The layout that the compiled step takes. For "jit" and "shard_map" the arrays are global arrays on a
                mesh; for "pmap" they also have a leading axis of devices.
    checkpoint  Each array is one global array on the mesh, without an axis of devices. Checkpoints are written from
                this layout, and flows are evaluated in it.

    host --to_global--> checkpoint       checkpoint --to_host--> host
    host --replicate--> step of pmap     step of pmap --unreplicate--> checkpoint

For "jit" and "shard_map" the step layout and the checkpoint layout are the same. A process holds only what its devices
hold, except for NumPy arrays, which it holds whole. On disk, a state is a `SavedState`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resflow_jax.functional.checks import check_type
from resflow_jax.functional.trees import is_key
from resflow_jax.training.parallel import DATA_AXIS, as_devices
from resflow_jax.training.step import TrainState

Array = jax.Array


class SavedState(NamedTuple):
    """A training state as it is stored in a checkpoint. The names of the fields are names on disk: they cannot change.

    Attributes:
      rest: `TrainState.non_params`.
      estimator: the arrays of the estimator, as a list. Its settings belong to the config, not to a checkpoint.
      step, params, opt_state, ema, term_norms: as in `TrainState`.
    """

    step: Any
    params: Any
    rest: Any
    opt_state: Any
    ema: Any
    estimator: list[Any]
    term_norms: Any

    @classmethod
    def of(cls, state: TrainState) -> "SavedState":
        """The state, or a tree of the same structure (shapes, shardings), as it is stored in a checkpoint."""
        estimator = jax.tree.leaves(state.estimator)
        return jax.tree.map(_saved, cls(*state._replace(estimator=estimator)))

    def as_state(self, like: TrainState) -> TrainState:
        """The training state, with the settings of the estimator of `like`."""
        estimator = jax.tree.unflatten(jax.tree.structure(like.estimator), self.estimator)
        state = TrainState(*self._replace(estimator=estimator))
        return jax.tree.map(lambda leaf, old: _wrapped(leaf, old) if is_key(old) else leaf, state, like)


def _saved(leaf: Any) -> Any:
    """A leaf as it is stored in a checkpoint: keys as their words, Python numbers as arrays."""
    if is_key(leaf):
        return jax.random.key_data(leaf) if isinstance(leaf, Array) else jax.eval_shape(jax.random.key_data, leaf)
    return np.asarray(leaf, jax.dtypes.result_type(leaf)) if isinstance(leaf, bool | int | float) else leaf


def _wrapped(words: Array, like: Any) -> Array:
    """Keys with these words, of the kind of `like`. JAX gives the kind of abstract keys only inside a trace."""
    impls = []
    jax.eval_shape(lambda keys: impls.append(jax.random.key_impl(keys)), like)
    return jax.random.wrap_key_data(words, impl=impls[0])


def to_global(tree: Any, shardings: Any) -> Any:
    """Global arrays with these shardings; `tree` has the host or the checkpoint layout.

    Arrays that already have an equivalent sharding are returned unchanged. All others are copied through the host.
    """

    def put(leaf, sharding):
        if is_global(leaf) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        return converted(lambda leaf: from_host(np.asarray(leaf), sharding), leaf)

    return jax.tree.map(put, tree, shardings)


def to_host(tree: Any) -> Any:
    """The host layout of a tree: global arrays become whole and uncommitted; other arrays stay as they are.

    The arrays are copied through the host. If they stayed committed to devices, every program that takes them would be
    compiled once more. Only the device that they end on holds more than one whole array at a time.
    """

    def whole(leaf):
        return converted(lambda leaf: jax.device_put(to_numpy(leaf)), leaf) if is_global(leaf) else leaf

    return jax.tree.map(whole, tree)


def to_numpy(leaf: Array) -> np.ndarray:
    """The whole array, in every process. If other processes hold parts of it, it costs one gather over the devices."""
    if not is_global(leaf):
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


def from_host(leaf: np.ndarray, sharding: NamedSharding) -> Array:
    """A global array from one that every process holds; each process sends its devices their parts."""
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Copies every array to all devices and stacks the copies on a leading axis, for `pmap_train_step`.

    Args:
      tree: arrays or NumPy arrays that every process holds whole.
      devices: by default all devices of all processes.

    Returns:
      The tree with arrays [devices, ...].

    Example:
      >>> rf.training.replicate({"w": jnp.ones(3)}, jax.devices()[:1])["w"].shape
      (1, 3)
    """
    mesh = Mesh(np.asarray(jax.devices() if devices is None else as_devices(devices)), (DATA_AXIS,))
    stacked = NamedSharding(mesh, PartitionSpec(DATA_AXIS))

    def copies(leaf):
        return from_host(np.broadcast_to(leaf, (mesh.size, *np.shape(leaf))), stacked)

    return jax.tree.map(lambda leaf: converted(copies, leaf), tree)


def unreplicate(tree: Any, mesh: Mesh) -> Any:
    """Removes the leading axis that `replicate` added: each array becomes one global array on all devices of the mesh.

    Args:
      tree: arrays [devices, ...] that are equal along this axis, from `replicate` or from a step of `pmap_train_step`.
      mesh: mesh of the same devices, from `make_mesh`.

    Returns:
      The tree with arrays [...].

    Example:
      >>> stacked = rf.training.replicate({"w": jnp.ones(3)})
      >>> rf.training.unreplicate(stacked, rf.training.make_mesh())["w"].shape
      (3,)
    """
    check_type("mesh", mesh, Mesh)
    for leaf in jax.tree.leaves(tree):
        check_type("tree", leaf, jax.Array)
    whole = NamedSharding(mesh, PartitionSpec())

    def join(leaf):
        parts = [shard.data[0] for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape[1:], whole, parts)

    return jax.tree.map(lambda leaf: converted(join, leaf), tree)


def on_all_devices(tree: Any, mesh: Mesh) -> Any:
    """Global arrays, whole on every device of the mesh, from arrays or numbers that every process has."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: converted(lambda leaf: from_host(np.asarray(leaf), whole), leaf), tree)


def converted(conversion: Callable[[Any], Array], leaf: Any) -> Array:
    """Applies the conversion to a leaf, or to the words of PRNG keys, which NumPy does not support."""
    if not is_key(leaf):
        return conversion(leaf)
    return jax.random.wrap_key_data(conversion(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))


def placed(flow: Any, mesh: Mesh | None) -> tuple[Any, Mesh | None, bool]:
    """(flow, mesh, is_whole): the flow on the devices that evaluate it.

    A flow whose arrays are divided among devices stays on these devices. Any other flow is copied to all devices of the
    given mesh. The returned mesh is None for one device; `is_whole` says whether each device has the whole flow.
    """
    own = mesh_of(flow)
    if own is not None:
        return flow, own, False
    return flow if mesh is None else on_all_devices(flow, mesh), mesh, True


def divided_examples(examples: Any, mesh: Mesh) -> Any:
    """Global arrays [B, ...] of examples that every process has, divided along the axis "data" of the mesh."""
    slices = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(lambda leaf: from_host(leaf, slices), examples)


def batches_in_order(examples: Any, batch_size: int, mesh: Mesh | None) -> Iterator[Any]:
    """Batches of all examples [N, ...] in order, all of one size, divided among the devices of a mesh if one is given.

    The last batch is filled up with the first examples.
    """
    examples = jax.tree.map(np.asarray, examples)
    count = len(jax.tree.leaves(examples)[0])
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size) % count
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], examples)
        yield batch if mesh is None else divided_examples(batch, mesh)


def is_global(leaf: Any) -> bool:
    """Whether an array lies on the devices of a mesh."""
    return isinstance(leaf, Array) and isinstance(leaf.sharding, NamedSharding)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh among whose devices arrays of the tree are divided; None if no array is divided."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_global(leaf) and not leaf.is_fully_replicated]
    return leaves[0].sharding.mesh if leaves else None
