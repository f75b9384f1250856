"""A batch in chunks: the same numbers as at once, on the CPU's path and on that of other platforms."""

from functools import cache

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax.functional import chunks
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.estimators import Roulette
from resflow_jax.functional.length_laws import Geometric
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.primitives.platforms import compiling_for
from resflow_jax.layers.networks import LipschitzCNN
from tests.functional.contractions import conv_net, dense_net


@pytest.fixture(params=["cpu", "default", "tpu"])
def platform(request, monkeypatch):
    """Takes the branch of a platform, whatever the tests run on."""
    monkeypatch.setattr(chunks, "by_platform", lambda *args, out, **branches: branches[request.param](*args))
    with compiling_for(request.param):
        yield


@pytest.mark.parametrize(
    ("batch", "size", "shape"), [(6, 4, (2, 3)), (6, 6, (1, 6)), (7, 3, (7, 1)), (13, 5, (1, 13)), (6, None, (1, 6))]
)
def test_chunks_are_equal_and_few(batch, size, shape):
    """The fewest equal chunks of at most `size`, in order; joined they are the batch."""
    x = jnp.arange(2.0 * batch).reshape(batch, 2)
    parts = chunks.split_chunks(x, size)
    assert parts.shape == (*shape, 2)
    np.testing.assert_array_equal(chunks.join_chunks(parts), x)


def test_sizes_of_chunks():
    """Those of the definition, for any batch; a large one takes no time."""
    for batch in range(1, 100):
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        for limit in range(1, 110):
            size = max(n for n in divisors if n <= limit)
            if 4 * size < min(limit, batch):
                size = min(n for n in divisors if n > limit)
            assert chunks.size_of_chunk(batch, limit) == size
    assert chunks.size_of_chunk(2**61 // 2**20 * 3, 1000) == 768


@pytest.mark.parametrize("number", [1, 4])
def test_map_and_pullback(platform, number):
    """Outputs are stacked in order; cotangents of what all chunks share are summed, those of x are their own."""
    rng = np.random.default_rng(0)
    x, others, bar = (jnp.asarray(rng.normal(size=(number, 2, 4))) for _ in range(3))
    weights = {"a": jnp.asarray(rng.normal(size=4))}

    def function(weights, x, other):
        return jnp.sin(trailing(weights["a"], x) * x) * other

    out = chunks.map_chunks(lambda chunk: function(weights, *chunk), (x, others))
    expected, pullback = jax.vjp(lambda weights, x: function(weights, x, others), weights, x)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    found = chunks.pullback_chunks(function, weights, x, others, bar)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, pullback(bar))


def test_loops_on_tpus():
    """Chunks loop on a TPU that they were made for, and not in a program from elsewhere or one that is divided."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    x = jax.ShapeDtypeStruct((3, 2, 4), jnp.float32)

    def loops(**options):
        function = jax.jit(lambda x: chunks.map_chunks(jnp.sin, x), **options)
        return "stablehlo.while" in jax.export.export(function, platforms=["tpu"])(x).mlir_module()

    assert not loops()
    with compiling_for("tpu"):
        assert loops()
        assert not loops(in_shardings=sharding)


def test_sizes_for_tpus():
    """A chunk for a TPU has 2^22 numbers in its widest layer, whatever the machine that compiles."""
    g = LipschitzCNN((4, 4, 1), (2**12,), (3, 3), rngs=nnx.Rngs(0))
    with compiling_for("tpu"):
        assert g.chunk_size == 2**22 // (16 * 2**12)


CASES = {
    "dense": (dense_net, {}),
    "power series": (conv_net, {"minres_steps": 0, "probe": "gaussian", "length": Geometric(0.3)}),
    "two probes": (conv_net, {"probes": 2}),
}
SIZES = {"cpu": (2, 1, 2), "default": (1, 2, 1), "tpu": (1, 2, 2)}  # for each case


def in_chunks(case, size):
    """Value, log-det, diagnostics and all gradients, by the platform that asks."""
    make, options = CASES[case]
    g, params, x = make(0.7, batch=6)
    estimator = Roulette(exact_terms=2, **options)

    def loss(params, x):
        y, log_det, diagnostics = residual(
            g, params, x, key=jax.random.key(3), estimator=estimator, chunk_size=size, return_diagnostics=True
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(log_det * jnp.arange(1.0, 7)), (y, log_det, diagnostics)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)


@cache
def at_once(case):
    return in_chunks(case, None)


@pytest.mark.parametrize("case", CASES)
def test_residual_in_chunks(request, platform, case):
    """Nothing depends on the size of the chunks."""
    sizes = SIZES[request.node.callspec.params["platform"]]
    part = in_chunks(case, dict(zip(CASES, sizes, strict=True))[case])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), part, at_once(case))


def test_prepared_once():
    """What `prepare` makes is what g takes, gradients reach what it is made of, and integers stay what they are."""
    g, params, x = dense_net(0.7, batch=4)
    key = jax.random.key(0)

    def prepare(raw):
        return jax.tree.map(lambda leaf: leaf * raw[1], raw[0])

    def loss(raw, x):
        y, log_det = residual(g, raw, x, key=key, prepare=prepare, chunk_size=2, estimator=Roulette(exact_terms=2))
        return jnp.sum(y**2) - jnp.sum(log_det)

    def plain(raw, x):
        y, log_det = residual(g, prepare(raw), x, key=key, estimator=Roulette(exact_terms=2))
        return jnp.sum(y**2) - jnp.sum(log_det)

    halved = jax.tree.map(lambda leaf: leaf / 2, params), jnp.asarray(2)
    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1), allow_int=True))(halved, x) for f in (loss, plain))
    for one, other in ((found[0], expected[0]), (found[1][0][0], expected[1][0][0]), (found[1][1], expected[1][1])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), one, other)


@pytest.mark.parametrize("size", [0, 1.5])
def test_bad_chunk_size(size):
    """It is a count."""
    g, params, x = dense_net(0.5)
    with pytest.raises(ValueError, match=f"chunk_size: expected an integer of at least 1, got {size}"):
        residual(g, params, x, key=jax.random.key(0), chunk_size=size)
