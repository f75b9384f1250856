"""Flags of XLA's CPU compiler with which a training step compiles faster."""

import os
from collections.abc import Mapping
from importlib.util import find_spec

import jax
import jaxlib.version

from resflow_jax.functional.primitives.jax_internals import has_started

# XLA's older code generator for fused operations compiles faster. XLA ignores options that it does not know, as newer
# versions do this one.
_OPTIONS = (
    "xla_cpu_disable_new_fusion_emitters=true"
    if jaxlib.version.__version_info__ < (0, 11)
    else "xla_cpu_use_multi_output_fusion=true,xla_cpu_flatten_after_fusion=true,xla_cpu_disable_loop_unrolling=true"
)
CPU_FLAGS = {"xla_backend_optimization_level": "1", "xla_backend_extra_options": _OPTIONS}


def use_cpu_flags() -> None:
    """Makes programs compile in less time on a CPU. Call it before JAX runs anything.

    LLVM then optimises at level 1. With JAX 0.10, XLA also takes its older code generator for fused operations. A
    program compiles in about 0.6 of the time, and takes as long as without. With later versions XLA fuses operations
    with several outputs and LLVM unrolls no loops, which takes 0.8 of the time; a step of a small flow takes up to a
    tenth longer. Results may differ by rounding.

    It adds to the environment variable XLA_FLAGS, which later processes inherit. Flags that are there already keep
    their values. If JAX will use an accelerator, nothing changes.

    Raises:
      RuntimeError: if JAX has started, since it reads the flags only once.

    Example:
      >>> rf.use_cpu_flags()  # doctest: +SKIP
    """
    if has_started():
        raise RuntimeError("use_cpu_flags: expected a call before JAX runs anything, but JAX has started")
    add_cpu_flags(CPU_FLAGS)


def add_cpu_flags(flags: Mapping[str, str]) -> None:
    """Adds those of the flags to XLA_FLAGS that are not there yet, unless JAX will use an accelerator."""
    if not _is_for_cpu():
        return
    text = os.environ.get("XLA_FLAGS", "")
    for name, value in flags.items():
        if name not in text:
            text += f" --{name}={value}"
    os.environ["XLA_FLAGS"] = text.strip()


def _is_for_cpu() -> bool:
    """Whether JAX will run on the CPU: there is no other platform, or the user asks for it. Does not start JAX."""
    asked = jax.config.jax_platforms
    return asked == "cpu" if asked else not any(map(find_spec, ("jax_plugins", "libtpu")))
