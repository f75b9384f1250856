"""A tracer that leaks fails the test in which it does, in every kind of trace, and JAX's caches stay on."""

import gc
import time
from threading import Event, Thread

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests import conftest, leaks

pytestmark = pytest.mark.skipif(conftest.CHECKS_LEAKS is None, reason=f"JAX {jax.__version__} is not checked for leaks")

TRANSFORMATIONS = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    # alone, JAX 0.10 does not check them
    "grad in jit": lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x)))),
    "linearize in jit": lambda f: jax.jit(lambda x: jax.linearize(f, x)[1](x)),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0],
    "while_loop": lambda f: lambda x: jax.lax.while_loop(lambda c: jnp.all(c < 3), f, x),
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x, x),
    "vmap in jit": lambda f: jax.jit(lambda x: jax.vmap(f)(x) + 1),
}


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Python's garbage collector passes over what other tests have left: every leak has it look through all objects."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_names_of_jax():
    assert conftest.CHECKS_LEAKS, f"tests/leaks.py does not know JAX {jax.__version__}: no test looks for leaks"


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_leak_is_found(name):
    leaked = []

    def leaking(x):
        leaked.append(2 * x)
        return x + 1

    with pytest.raises(Exception, match="Leaked trace"):
        TRANSFORMATIONS[name](leaking)(jnp.ones(3))
    assert leaked


def test_a_leak_out_of_a_cycle_is_found():
    """Also where only an object that refers to itself holds the tracer, and older than the youngest objects."""

    class Module:
        def __init__(self):
            self.itself = self

        def __call__(self, x):
            self.last = x + 1
            gc.collect()
            return self.last

    with pytest.raises(Exception, match="Leaked trace"):
        jax.jit(Module())(jnp.ones(3))


def with_a_cycle(x):
    """2 x; it leaves a cycle without outside references, which is garbage."""
    cycle = [x + 1]
    cycle.append(cycle)
    return 2 * x


def test_unreachable_tracers_are_no_leak():
    assert jax.jit(with_a_cycle)(1.0) == 2


def test_garbage_is_no_leak_while_another_thread_collects():
    """Python collects nothing then, so that the check has to wait; a run compiles in two threads."""
    collecting = Event()

    class Slow:
        def __init__(self):
            self.itself = self

        def __del__(self):
            collecting.set()
            time.sleep(0.2)

    Slow()
    other = Thread(target=gc.collect)
    other.start()
    assert collecting.wait(60)
    assert jax.jit(lambda x: with_a_cycle(x))(1.0) == 2  # a function that was not traced before
    other.join()


def test_caches_stay_on():
    traced = []

    @jax.jit
    def f(x):
        traced.append(None)
        return x + 1

    f(1.0), f(2.0)
    assert len(traced) == 1


def test_jax_itself_leaks_in_derivatives_of_shard_map():
    """The reason why one test of `tests/functional/test_batch_axes.py` does not look for leaks."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    share, whole = PartitionSpec("data"), PartitionSpec()
    f = jax.shard_map(lambda x: jax.lax.psum(jnp.sum(x**2), "data"), mesh=mesh, in_specs=share, out_specs=whole)
    with pytest.raises(Exception, match="Leaked trace"):
        jax.grad(jax.jit(f))(jnp.ones(2))
    with leaks.unchecked():
        assert jnp.all(jax.grad(jax.jit(f))(jnp.ones(2)) == 2)
