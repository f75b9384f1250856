"""The devices that a command runs on, XLA's flags for them, and the cache of compiled programs."""

import os
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

from resflow_jax.functional.primitives.platforms import number_of_cores
from resflow_jax.training.xla_flags import CPU_FLAGS, add_cpu_flags


def use_compilation_cache() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR or ~/.cache/resflow_jax for the next start."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "resflow_jax"))


def use_all_cores(number: int | None = None) -> None:
    """Makes each CPU core a JAX device, or `number` of them. Call it before JAX starts.

    XLA splits a small operation badly among cores; with one device per core, programs on parts of a batch run in
    parallel. A number of CPU devices that the user has set is kept.
    """
    if jax.config.jax_num_cpu_devices < 0 and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        jax.config.update("jax_num_cpu_devices", number or number_of_cores())


def cores_for(batch_size: int) -> int:
    """The most CPU cores that can take equal shares of a batch."""
    return _most_sharing(batch_size, number_of_cores())


def use_xla_flags() -> None:
    """Sets those flags of XLA's CPU compiler that the user has not set, unless there is an accelerator.

    Call it before JAX starts. Besides the flags of `rf.use_cpu_flags` it keeps Eigen to one thread, since each core is
    a device.
    """
    add_cpu_flags(CPU_FLAGS | {"xla_cpu_multi_thread_eigen": "false"})


def devices_for(batch_size: int) -> int:
    """The most devices that can take equal shares of a batch."""
    return _most_sharing(batch_size, jax.device_count())


def _most_sharing(batch_size: int, number: int) -> int:
    """The largest count of at most `number` that divides the batch size."""
    return max(n for n in range(1, number + 1) if batch_size % n == 0)


def data_mesh(batch_size: int) -> Mesh:
    """A mesh with the axis "data" for batches outside training: as many devices as can take equal shares."""
    number = devices_for(batch_size)
    return jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:number])


def own_mesh() -> Mesh | None:
    """The devices for what a process computes alone: all of them, or None, for one, if others have some of them."""
    return data_mesh(jax.device_count()) if jax.process_count() == 1 else None
