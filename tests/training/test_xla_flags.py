"""Flags of XLA's CPU compiler."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest

import resflow_jax as rf
from experiments.runs.devices import use_xla_flags
from resflow_jax.training import xla_flags

SCRIPT = """
import os, jax, jax.numpy as jnp, resflow_jax as rf
rf.use_cpu_flags()
rf.use_cpu_flags()
assert float(jax.jit(jnp.sum)(jnp.ones(3))) == 3
print(os.environ["XLA_FLAGS"])
"""


@contextmanager
def asked(platforms: str) -> Iterator[None]:
    """The user asks JAX for these platforms. Here JAX has started, and keeps those that it has."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)


def test_a_script_adds_the_flags_once():
    """XLA takes them: it ends a process for a flag that it does not know."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_dump_to="}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["--xla_dump_to=", *(f"--{n}={v}" for n, v in xla_flags.CPU_FLAGS.items())]


def test_a_call_after_the_start_raises(monkeypatch):
    """JAX reads the flags only once, so that later ones would have no effect."""
    monkeypatch.setenv("XLA_FLAGS", "")
    jnp.ones(1)
    with pytest.raises(RuntimeError, match=r"use_cpu_flags: expected a call before JAX runs anything"):
        rf.use_cpu_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_flags_of_the_user_stay(monkeypatch):
    """A flag that the user has set is kept; the others are added once. Those of the experiments have one more."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    with asked("cpu"):
        use_xla_flags()
        use_xla_flags()
    level, options, threads = os.environ["XLA_FLAGS"].split()
    assert level == "--xla_backend_optimization_level=3" and threads == "--xla_cpu_multi_thread_eigen=false"
    assert options == f"--xla_backend_extra_options={xla_flags.CPU_FLAGS['xla_backend_extra_options']}"


def test_an_accelerator_gets_no_flags_of_the_cpu(monkeypatch):
    """Where JAX would find one, or the user asks for one; none, or asking for the CPU, is what they are for."""
    monkeypatch.setattr(xla_flags, "has_started", lambda: False)
    for found, platforms, expected in ((True, "", ""), (True, "cuda", ""), (True, "cpu", "--"), (False, "", "--")):
        monkeypatch.setattr(xla_flags, "find_spec", lambda name, found=found: object() if found else None)
        monkeypatch.setenv("XLA_FLAGS", "")
        with asked(platforms):
            rf.use_cpu_flags()
        assert os.environ["XLA_FLAGS"][:2] == expected
