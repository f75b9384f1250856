"""A large batch is inverted in parts: the same result, one program, memory of a part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import resflow_jax as rf
from resflow_jax.models import solve_parts


@pytest.fixture(scope="module")
def flow():
    config = rf.VectorFlowConfig(dim=2, blocks=2, hidden=(6,), condition_dim=1)
    return rf.ResidualFlow(config, rngs=nnx.Rngs(0))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of four examples, for layers of six outputs."""
    monkeypatch.setattr(solve_parts, "_CPU_THREAD", 24)
    monkeypatch.setattr(solve_parts, "threads_per_cpu_device", lambda: 1)


@pytest.mark.parametrize("number", [3, 4, 5, 8, 11, 33])
@pytest.mark.parametrize("of_each", [True, False])
def test_parts_are_the_whole(flow, number, of_each, monkeypatch):
    """Samples, their status and a condition of each example, for numbers that parts of four divide and do not."""
    condition = jnp.linspace(0, 1, number)[:, None] if of_each else jnp.ones(1)
    options = {"condition": condition, "return_status": True}
    x, status = flow.sample(jax.random.key(0), number, **options)
    monkeypatch.setattr(solve_parts, "_CPU_THREAD", 10**6)
    expected, expected_status = flow.sample(jax.random.key(0), number, **options)
    np.testing.assert_allclose(x, expected, atol=1e-11)
    assert status.iterations.shape == (2, number)
    np.testing.assert_array_equal(status.converged, expected_status.converged)
    np.testing.assert_array_equal(status.iterations, expected_status.iterations)


def test_one_program_for_all_numbers(flow):
    """Many samples are parts of one size, whatever their number; few are divided equally."""
    condition, state = jnp.ones(1), nnx.state(flow)
    sizes = {n: solve_parts.part_size(flow, state, (jnp.zeros((n, 2)), None)) for n in (4, 5, 9, 32, 33, 34)}
    assert sizes == {4: None, 5: 3, 9: 3, 32: 4, 33: 4, 34: 4}
    flow.sample(jax.random.key(0), 33, condition=condition)
    before = solve_parts._solve._cache_size()
    for number in (35, 40, 57):
        assert flow.sample(jax.random.key(0), number, condition=condition).shape == (number, 2)
    assert solve_parts._solve._cache_size() == before


def test_what_stays_whole(flow):
    """A batch that is traced or divided among devices, one not larger than a part, and a flow divided among devices."""
    state = nnx.state(flow)
    z = jnp.zeros((8, 2))
    assert solve_parts.part_size(flow, state, (z, None)) == 4
    assert solve_parts.part_size(flow, state, (z[:4], None)) is None
    jax.jit(lambda z: not_in_parts(solve_parts.part_size(flow, state, (z, None))) or z)(z)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    divided, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    assert solve_parts.part_size(flow, state, (jax.device_put(z, divided), None)) is None
    assert solve_parts.part_size(flow, jax.device_put(state, whole), (z, None)) is None


def not_in_parts(size):
    assert size is None


def test_wide_events_without_known_layers():
    """A flow whose contractions tell nothing of their layers: the event decides."""
    flow = rf.Flow(rf.ActNorm((12,)), rf.StandardNormal((12,)))
    state = nnx.state(flow)
    assert solve_parts.part_size(flow, state, (jnp.zeros((17, 12)), None)) == 2
    assert flow.sample(jax.random.key(0), 17).shape == (17, 12)


def test_an_example_that_fails_is_named(flow):
    """The warning counts examples of all parts."""
    z, solver = jnp.ones((6, 2)), rf.FixedPoint(max_iterations=1)
    with pytest.warns(RuntimeWarning, match="6 of 6"):
        flow.inverse(z, condition=jnp.ones(1), solver=solver)
