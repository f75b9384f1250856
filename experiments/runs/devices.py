"""The devices that a command runs on, XLA's flags for them, and the cache of compiled programs."""

import os
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh


def use_compilation_cache() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR or ~/.cache/resflow_jax for the next start."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "resflow_jax"))


def use_all_cores(number: int | None = None) -> None:
    """Makes every CPU core a JAX device, or `number` of them; to be called before JAX does anything.

    XLA divides one small operation badly among cores; programs on parts of a batch run side by side. Where the user has
    said how many CPU devices there are, there are so many.
    """
    if jax.config.jax_num_cpu_devices < 0 and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        jax.config.update("jax_num_cpu_devices", number or number_of_cores())


def cores_for(batch_size: int) -> int:
    """The most CPU cores that can take equal shares of a batch."""
    return _most_sharing(batch_size, number_of_cores())


def number_of_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


_XLA_FLAGS = {
    "xla_backend_optimization_level": "1",
    "xla_backend_extra_options": "xla_cpu_use_multi_output_fusion=true,xla_cpu_flatten_after_fusion=true,"
    "xla_cpu_disable_loop_unrolling=true",
    "xla_cpu_multi_thread_eigen": "false",
}


def use_xla_flags() -> None:
    """Sets flags of XLA's CPU compiler, where the user has not, unless there is an accelerator.

    To be called before JAX does anything.

    LLVM's first level of optimisation, loops that are not unrolled, and fusions with several outputs halve the time
    that a step takes to compile, and those fusions make it a little faster. Where each core is a device, its
    operations are not to be divided further.
    """
    if not _is_for_cpu():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    for name, value in _XLA_FLAGS.items():
        if name not in flags:
            flags += f" --{name}={value}"
    os.environ["XLA_FLAGS"] = flags.strip()


def _is_for_cpu() -> bool:
    """Whether JAX will run on the CPU: there is nothing else, or the user says so. It must not start for that."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" if asked else not any(map(find_spec, ("jax_plugins", "libtpu")))


def devices_for(batch_size: int) -> int:
    """The most devices that can take equal shares of a batch."""
    return _most_sharing(batch_size, jax.device_count())


def _most_sharing(batch_size: int, number: int) -> int:
    """The most of so many that can take equal shares of a batch."""
    return max(n for n in range(1, number + 1) if batch_size % n == 0)


def data_mesh(batch_size: int) -> Mesh:
    """The devices that share a batch which is no step of training, along the axis "data"; as many as can."""
    number = devices_for(batch_size)
    return jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:number])
