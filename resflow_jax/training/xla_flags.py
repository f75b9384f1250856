"""What to set before JAX starts on a CPU: flags of XLA's compiler, and a device for each core."""

import os
from collections.abc import Mapping
from importlib.util import find_spec

import jax
from jax.sharding import AxisType, Mesh

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.primitives.jax_internals import has_started
from resflow_jax.functional.primitives.platforms import number_of_cores
from resflow_jax.models.shares import CORES

CPU_FLAGS = {
    "xla_backend_optimization_level": "1",
    "xla_backend_extra_options": "xla_cpu_use_multi_output_fusion=true,xla_cpu_flatten_after_fusion=true,"
    "xla_cpu_disable_loop_unrolling=true",
}
ONE_THREAD = {"xla_cpu_multi_thread_eigen": "false"}  # of each device, where each core is one


def use_cpu_flags() -> None:
    """Makes programs compile in about two thirds of the time on a CPU. Call it before JAX runs anything.

    XLA then fuses operations with several outputs, and LLVM optimises at level 1 and unrolls no loops. Compiled
    programs are about as fast as without. Results may differ by rounding.

    It adds to the environment variable XLA_FLAGS, which later processes inherit. Flags that are there already keep
    their values. If JAX will use an accelerator, nothing changes.

    Raises:
      RuntimeError: if JAX has started, since it reads the flags only once.

    Example:
      >>> rf.use_cpu_flags()  # doctest: +SKIP
    """
    _check_not_started("use_cpu_flags")
    add_cpu_flags(CPU_FLAGS)


def use_cpu_cores(number: int | None = None) -> None:
    """Makes flows divide their batches among the cores of a CPU. Call it before JAX runs anything.

    Each core becomes a device of JAX, and `jax.set_mesh` makes them the axis "cores" of the mesh that all arrays lie
    on. Every call of a flow on a batch, eager or in a compiled program, then gives each core an equal share, of an even
    number of examples: densities, latents, samples, and their gradients. Results are those of one device to rounding.
    It also sets the flags of `use_cpu_flags`.

    Other batches are computed by all cores alike, in the time of one, and so are calls inside of `jax.shard_map` and of
    maps with a named axis. Run a step on a mesh of your own, as of `training.make_mesh`, in `with jax.set_mesh(mesh)`.
    If JAX will use an accelerator, nothing changes.

    Args:
      number: of cores, by default all that the process may use. A number of CPU devices that is already set is kept.

    Raises:
      ValueError: for a number that is no positive integer.
      RuntimeError: if JAX has started, since it reads these settings only once.

    Example:
      >>> rf.use_cpu_cores()  # doctest: +SKIP
    """
    if number is not None:
        check_count("number", number, 1)
    _check_not_started("use_cpu_cores")
    if not is_for_cpu():
        return
    use_core_devices(number)
    add_cpu_flags(CPU_FLAGS | ONE_THREAD)
    jax.set_mesh(Mesh(jax.local_devices(), (CORES,), axis_types=(AxisType.Auto,)))


def use_core_devices(number: int | None = None) -> None:
    """Makes each CPU core a JAX device, or `number` of them, unless the user has set a number of CPU devices."""
    if jax.config.jax_num_cpu_devices < 0 and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        jax.config.update("jax_num_cpu_devices", number or number_of_cores())


def _check_not_started(name: str) -> None:
    if has_started():
        raise RuntimeError(f"{name}: expected a call before JAX runs anything, but JAX has started")


def add_cpu_flags(flags: Mapping[str, str]) -> None:
    """Adds those of the flags to XLA_FLAGS that are not there yet, unless JAX will use an accelerator."""
    if not is_for_cpu():
        return
    text = os.environ.get("XLA_FLAGS", "")
    for name, value in flags.items():
        if name not in text:
            text += f" --{name}={value}"
    os.environ["XLA_FLAGS"] = text.strip()


def is_for_cpu() -> bool:
    """Whether JAX will run on the CPU: there is no other platform, or the user asks for it. Does not start JAX."""
    asked = jax.config.jax_platforms
    return asked == "cpu" if asked else not any(map(find_spec, ("jax_plugins", "libtpu")))
