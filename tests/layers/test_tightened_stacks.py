"""`tighten` and `certify` of stacks: dtypes, devices and keys stay as they were, and few programs are compiled."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.lipschitz import linears_inside

DEPTH = 3


def spoiled(make, dtype=None):
    """A stack whose kernels exceed their norms: its power iterations have converged for other ones."""
    stack = rf.ResidualStack(make, DEPTH, rngs=nnx.Rngs(0))
    if dtype is not None:
        graphdef, state = nnx.split(stack)
        cast = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
        stack = nnx.merge(graphdef, jax.tree.map(cast, state))
    for layer in linears_inside(stack):
        layer.kernel[...] *= 5
    rf.Flow(stack).converge_norms()
    for layer in linears_inside(stack):  # not by a factor, with which the norm that the vectors give would rise too
        layer.kernel[...] += np.random.default_rng(1).normal(size=layer.kernel.shape).astype(layer.kernel.dtype)
    return stack


def block(rngs):
    return rf.ResidualBlock(rf.LipschitzMLP(2, (4,), rngs=rngs))


class WithKey(Bijector):
    """A layer with a key in its state."""

    def __init__(self, rngs):
        self.block, self.key, self.event_shape = block(rngs), nnx.Variable(jax.random.split(rngs())), (2,)
        self.blocks, self.condition_shape, self.takes_noise, self.pads, self.no_density = 1, None, False, False, None

    def certified_bounds(self, blocks):
        return self.block.certified_bounds(blocks)

    def tighten(self):
        self.block.tighten()


def is_tightened(stack):
    blocks = []
    stack.certified_bounds(blocks)
    return len(blocks) == DEPTH and all(block.bound <= block.target_bound for block in blocks)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes_stay(dtype):
    stack = spoiled(block, dtype)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(stack))
    assert not is_tightened(stack)
    stack.tighten()
    assert is_tightened(stack)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(stack)) == before
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(stack)))


@pytest.mark.parametrize("committed", [True, False])
def test_devices_stay(committed):
    """Arrays on a device that is not the default, tied to it or only made there."""
    device = jax.devices()[2]
    if committed:
        stack = spoiled(block)
        graphdef, state = nnx.split(stack)
        stack = nnx.merge(graphdef, jax.device_put(state, device))
    else:
        with jax.default_device(device):
            stack = spoiled(block)
    for rows in stack.unstacked():
        for leaf in jax.tree.leaves(nnx.state(rows)):
            assert leaf.devices() == {device} and leaf.committed == committed
    stack.tighten()
    for leaf in jax.tree.leaves(nnx.state(stack)):
        assert leaf.devices() == {device} and leaf.committed == committed
    assert is_tightened(stack)


def test_arrays_on_several_devices():
    """Rows and stacks of arrays that every device has a copy of."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    graphdef, state = nnx.split(spoiled(block))
    stack = nnx.merge(graphdef, jax.device_put(state, whole))
    stack.tighten()
    assert is_tightened(stack)


def test_keys_stay():
    stack = spoiled(WithKey)
    keys = jax.random.key_data(stack.steps.key[...])
    stack.tighten()
    np.testing.assert_array_equal(jax.random.key_data(stack.steps.key[...]), keys)
    assert is_tightened(stack)


def test_rows_are_those_of_the_stack():
    stack = spoiled(block)
    for n, layer in enumerate(stack.unstacked()):
        mine = jax.tree.map(lambda leaf, n=n: leaf[n], nnx.state(stack.steps))
        jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), mine)


def test_layers_without_arrays():
    """A stack of them has as many rows as layers."""

    class Third(nnx.Module):
        def __call__(self, x):
            return x / 3

    def make(rngs):
        return rf.ResidualBlock(Third(), lipschitz=0.5, event_shape=(2,))

    stack = rf.ResidualStack(make, DEPTH, rngs=nnx.Rngs(0))
    stack.tighten()
    assert len(stack.unstacked()) == DEPTH
    assert rf.certify(rf.Flow(stack)).bounds.tolist() == [0.5] * DEPTH


def test_few_programs(caplog):
    """One for the kernels of all blocks, and a few for the factors on them: not several for each block."""
    stack = spoiled(block)
    jax.clear_caches()
    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        stack.tighten()
        rf.certify(rf.Flow(stack))
    compiled = [re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()) for record in caplog.records]
    names = [found[1] for found in compiled if found]
    assert names.count("_kernels_and_limits") == 1
    assert len(names) <= 4, names


class WithoutHash:
    """A function that does not hash."""

    __hash__ = None

    def __init__(self, function):
        self.function = function

    def __call__(self):
        return self.function()


class Elsewhere(rf.Contraction):
    """A contraction whose layer is held where no graph of modules finds it, beside an attribute without a hash."""

    lipschitz = 0.9

    def __init__(self, rngs):
        layer = rf.LipschitzDense(2, 2, 0.9, rngs=rngs)
        self.get = WithoutHash(lambda: layer)

    @property
    def linears(self):
        return [self.get()]

    def bound(self, norms, orders):
        return norms[0]

    def weights(self):
        return self.get().weights()

    def __call__(self, x, condition=None):
        return self.get()(x)


def test_a_changed_kernel_has_another_bound():
    """No program holds a kernel as a constant."""
    contraction = Elsewhere(nnx.Rngs(0))
    residual = rf.ResidualBlock(contraction)
    bounds = []
    for _ in range(2):
        found = []
        residual.certified_bounds(found)
        bounds.append(found[0].bound)
        layer = contraction.get()
        layer.kernel[...] *= 0.01
        layer.update_norm()
    assert bounds[1] < 0.02 * bounds[0]
