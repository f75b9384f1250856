"""`Roulette.subsample`: further terms for some examples; averaged over which ones, the same estimate."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

from resflow_jax.functional import neumann
from resflow_jax.functional.activations import ACTIVATIONS
from resflow_jax.functional.batch_axes import batch_axes
from resflow_jax.functional.estimators import Roulette, Truncated
from resflow_jax.functional.length_laws import Defensive, Geometric
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.monotone import monotone
from resflow_jax.functional.solvers import FixedPoint
from resflow_jax.functional.term_sums import Part, part_size
from tests.functional.contractions import conv_net, dense_net

KEY = jax.random.key(4)
SERIES = {
    "power series": {"exact_terms": 2, "minres_steps": 0, "trace_probes": 1},
    "minimal residuals": {"exact_terms": 1, "probes": 2, "trace_probes": 2},
    "no exact terms": {"exact_terms": 0, "minres_steps": 2, "probe": "hadamard"},
}


def everything(function, net, estimator, size=None, part=None, patch=None):
    """Log-dets, y and the gradients of a loss of both as one vector; with a given part in the place of a drawn one."""
    g, params, x = net

    def loss(params, x):
        options = {"key": KEY, "estimator": estimator, "chunk_size": size, "lipschitz": 0.7}
        y, log_det = function(g, params, x, **options)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(jnp.arange(1.0, 1 + len(x))) * log_det), (y, log_det)

    def all_of():
        return ravel_pytree(jax.grad(loss, (0, 1), has_aux=True)(params, x))[0]

    def all_of_part(part):
        with patch.context() as context:  # what it sets holds traced arrays
            context.setattr(neumann, "draw_part", lambda *_: Part(estimator.subsample, part))
            return all_of()

    return jax.jit(all_of)() if part is None else jax.jit(jax.vmap(all_of_part))(part)


@cache
def without(make, series):
    """A net and its estimate without subsampling and chunks, on the platform that asks first."""
    net = make(0.7, batch=8)
    return net, everything(residual, net, Roulette(Geometric(0.3), **SERIES[series]))


@pytest.mark.parametrize(
    ("make", "series", "size", "platform"),
    [
        (dense_net, "power series", None, "cpu"),
        (dense_net, "power series", 1, "gpu"),
        (dense_net, "minimal residuals", 1, "cpu"),
        (dense_net, "minimal residuals", None, "gpu"),
        (dense_net, "no exact terms", None, "cpu"),
        (dense_net, "no exact terms", 1, "gpu"),
        (conv_net, "minimal residuals", 2, "cpu"),
        (conv_net, "minimal residuals", 2, "gpu"),
    ],
)
def test_the_mean_over_parts_is_the_estimate_without(monkeypatch, make, series, size, platform):
    """Averaged over the r parts, value and gradient are those of the same key without subsampling, to 1e-10."""
    monkeypatch.setattr(neumann, "target_platform", lambda: platform)
    net, plain = without(make, series)
    estimator = Roulette(Geometric(0.3), subsample=4, **SERIES[series])
    found = everything(residual, net, estimator, size, jnp.arange(4, dtype=jnp.int32), monkeypatch)
    np.testing.assert_allclose(found.mean(axis=0), plain, rtol=1e-10, atol=1e-10)
    assert np.abs(found[0] - plain).max() > 1e-4


def test_the_mean_over_parts_of_a_monotone_map(monkeypatch):
    """The same for log|det((I - J)(I + J)^-1)|."""
    net, options = dense_net(0.7, batch=6), {"exact_terms": 1, "probes": 2, "trace_probes": 1}
    function = partial(monotone, solver=FixedPoint(tolerance=1e-13))
    plain = everything(function, net, Roulette(Geometric(0.3), **options))
    estimator = Roulette(Geometric(0.3), subsample=3, **options)
    found = everything(function, net, estimator, None, jnp.arange(3, dtype=jnp.int32), monkeypatch)
    np.testing.assert_allclose(found.mean(axis=0), plain, rtol=1e-9, atol=1e-9)


def test_parts():
    """Every r-th row, from a row that is drawn: all rows are equally likely."""
    x = jnp.arange(24.0).reshape(12, 2)
    part = Part(3, jnp.int32(1))
    np.testing.assert_array_equal(part.of(x), x[1::3])
    placed = part.placed(part.of(x))
    np.testing.assert_array_equal(placed[1::3], x[1::3])
    assert not placed[0::3].any() and not placed[2::3].any()
    draw = jax.vmap(lambda key: neumann.draw_part(Roulette(subsample=3), key, 12).first)
    counts = np.bincount(draw(jax.random.split(KEY, 3000)), minlength=3)
    assert counts.size == 3 and np.sum((counts - 1000) ** 2 / 1000) < 14


@pytest.mark.parametrize(("batch", "size"), [(8, 4), (6, 3), (7, 1), (1, 1), (10, 2), (4, 4), (2, 2)])
def test_sizes(batch, size):
    """The largest divisor of the batch that is at most `subsample`."""
    assert part_size(Roulette(subsample=4), batch) == size


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 2),
        ({"exact_terms": 2}, 2),
        ({"exact_terms": 1}, 1),
        ({"minres_steps": 2}, 2),
        ({"minres_steps": 1}, 1),
        ({"minres_steps": 0}, 1),
        ({"subsample": 1}, 1),
        ({"exact_terms": 0, "subsample": 3}, 3),
        ({"gradient": "autodiff"}, 1),
    ],
)
def test_the_size_that_is_chosen(options, size):
    """By default r is 2 after two exact minimal-residual steps, and otherwise 1; of an odd batch all go on."""
    assert part_size(Roulette(**options), 6) == size
    assert part_size(Roulette(**options), 5) == part_size(Truncated(3), 6) == 1


@pytest.mark.parametrize("divided", [False, True], ids=["one device", "shard_map"])
def test_a_map_of_whole_batches(divided):
    """If g takes the whole batch alone, the default takes all of it, as with subsample=1; a chosen r is an error."""
    shifts, x = jnp.linspace(0.0, 1.0, 4)[:, None], jnp.ones((8, 3))

    def gradient(x, shift, estimator):
        def log_det(x):  # g closes over an array with a row for each example
            g = lambda p, x: 0.3 * jnp.tanh(x + shift)  # noqa: E731
            return residual(g, None, x, key=KEY, estimator=estimator)[1].sum()

        return jax.grad(log_det)(x)

    def found(estimator):
        if not divided:
            return jax.jit(lambda: gradient(x[:4], shifts, estimator))()
        mesh, spec = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2]), jax.P("data")
        mapped = lambda x, shift: gradient(x, shift[0], estimator)  # noqa: E731
        of_devices = jax.shard_map(mapped, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        return jax.jit(of_devices)(x, jnp.stack([shifts, 2 * shifts]))

    default = found(Roulette())
    np.testing.assert_array_equal(default, found(Roulette(subsample=1)))
    assert np.abs(default).min() > 1e-4
    with pytest.raises(ValueError, match=r"takes 2 examples at once, not 4 .* subsample=1"):
        found(Roulette(subsample=2))


def _for_four_alone(p, x):
    assert len(x) == 4
    return 0.3 * jnp.tanh(p * x)


SHIFTS = jnp.linspace(0.0, 1.0, 4)[:, None]
OF_ROWS = {
    "plain": lambda p, x: 0.3 * jnp.tanh(p * x),
    "one noise for all": lambda p, x: 0.3 * jnp.tanh(p * x + jax.random.normal(KEY, (1, 3))),
    "positions in an event": lambda p, x: 0.3 * jnp.tanh(p * x + jnp.arange(3.0)[None]),
    "sorted events": lambda p, x: 0.3 * jnp.take_along_axis(x, jnp.argsort(x, axis=1), 1),
    "fills": lambda p, x: 0.3 * jnp.tanh(p * x + jnp.zeros_like(x)),
    "fills of an inner program": lambda p, x: 0.3 * jnp.tanh(x * jax.jit(lambda p: jnp.full(x.shape, p))(p)),
    "a loop over rows": lambda p, x: jax.lax.map(lambda row: 0.3 * jnp.tanh(p * row), x),
    "lipswish": lambda p, x: 0.3 * ACTIVATIONS["lipswish"]({"beta": p}, x),
    "clipswish": lambda p, x: 0.3 * ACTIVATIONS["clipswish"]({"beta": p}, x)[:, 1:4],
    "leakylipswish": lambda p, x: 0.3 * ACTIVATIONS["leakylipswish"]({"alpha": p, "beta": p}, x),
    "cpila": lambda p, x: 0.3 * ACTIVATIONS["cpila"]({}, p * x)[:, 1:4],
}
OF_BATCHES = {
    "noise for each": lambda p, x: 0.3 * jnp.tanh(p * x + jax.random.normal(KEY, x.shape)),
    "noise in an inner program": jax.jit(lambda p, x: 0.3 * jnp.tanh(p * x + jax.random.normal(KEY, x.shape))),
    "positions in the batch": lambda p, x: 0.3 * jnp.tanh(p * x + jnp.arange(float(len(x)))[:, None]),
    "rows by position": lambda p, x: 0.3 * jnp.tanh(p * x + SHIFTS[: len(x)]),
    "another factor": lambda p, x: jnp.tanh(p * x) / len(x),
    "positions of an inner program": lambda p, x: (
        0.3 * jnp.tanh(x * jax.jit(lambda p: p * jnp.arange(float(len(x)))[:, None])(p))
    ),
    "another array in an inner program": jax.jit(lambda p, x: 0.3 * jnp.tanh(p * x + np.full((1, 3), 1 / len(x)))),
    "another array": lambda p, x: 0.3 * jnp.tanh(p * x + np.full((1, 3), 1 / len(x))),
    "other operations": lambda p, x: 0.3 * (jnp.tanh(p * x) if len(x) == 4 else jnp.sin(p * x)),
    "one operation more": lambda p, x: 0.3 * jnp.tanh(p * x) if len(x) == 4 else 0.2 * (0.3 * jnp.tanh(p * x)),
    "an error of any kind": _for_four_alone,
    "a count of rows": lambda p, x: 0.1 * jnp.tanh(p * x) * jnp.cumsum(jnp.ones(len(x)))[:, None],
    "a count in a scan": lambda p, x: jax.lax.scan(lambda n, row: (n + 1, 0.1 * n * jnp.tanh(p * row)), 0.0, x)[1],
    "a row that is marked": lambda p, x: 0.3 * jnp.tanh(p * x) * jnp.zeros((len(x), 1)).at[0].set(1),
    "a copy for each row": lambda p, x: 0.3 * jnp.tanh(p * x + jnp.concatenate([SHIFTS[:1]] * len(x))),
    "a mean of ones": lambda p, x: jnp.tanh(p * x) / jnp.sum(jnp.ones(len(x))),
    "the first row": lambda p, x: 0.3 * jnp.tanh(p * x).at[0].multiply(0.5),
    "joined rows": lambda p, x: 0.3 * jnp.tanh(p * x * jnp.concatenate([jnp.zeros((1, 3)), jnp.ones((len(x) - 1, 3))])),
}


@pytest.mark.parametrize("name", [*OF_ROWS, *OF_BATCHES])
def test_only_functions_of_rows_are_taken_in_parts(name):
    """What depends on the number of rows or on their places keeps the whole batch, and its value and gradient."""
    g, x = (OF_ROWS | OF_BATCHES)[name], jax.random.normal(KEY, (4, 3))

    def estimate(p, estimator):
        options = {"key": KEY, "estimator": estimator, "return_diagnostics": True}
        y, log_det, found = residual(g, p, x, **options)
        return log_det.sum(), (y, found.length, x + g(p, x))

    @jax.jit
    def both(p):
        if name in OF_ROWS:
            return estimate(p, Roulette(Geometric(0.9)))[1], None
        gradient = jax.grad(estimate, has_aux=True)
        (found, aux), (expected, _) = (gradient(p, Roulette(Geometric(0.9), subsample=r)) for r in (None, 1))
        return aux, (found, expected)

    (y, length, expected), gradients = both(0.5)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    assert (length % 1 == 0.5) == (name in OF_ROWS)
    if name in OF_BATCHES:
        np.testing.assert_allclose(*gradients, rtol=1e-12)


@pytest.mark.parametrize(
    ("series", "cases"),
    [
        ("power series", [(1, "cpu"), (4, "gpu")]),
        ("minimal residuals", [(4, "cpu"), (1, "gpu")]),
        ("no exact terms", [(1, "cpu"), (None, "gpu")]),
    ],
)
def test_chunks(monkeypatch, series, cases):
    """Chunks of any size, also below r, give the same on any platform, with the same diagnostics."""
    (g, params, x), estimator = dense_net(0.7, batch=8), Roulette(Geometric(0.3), subsample=4, **SERIES[series])

    def all_of(size, platform):
        options = {"key": KEY, "estimator": estimator, "chunk_size": size, "return_diagnostics": True}
        with monkeypatch.context() as context:
            context.setattr(neumann, "target_platform", lambda: platform)
            return jax.jit(lambda x: residual(g, params, x, **options))(x)

    expected = all_of(None, "cpu")
    for size, platform in cases:
        found = all_of(size, platform)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), found, expected)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_conditions_without_elements(monkeypatch, platform):
    """An array [B, 0] beside others in a condition is cut into parts and chunks like them."""
    monkeypatch.setattr(neumann, "target_platform", lambda: platform)
    condition, estimator = {"a": jnp.ones((8, 3)), "none": jnp.zeros((8, 0))}, Roulette(Geometric(0.3), 1, subsample=4)
    g = lambda p, x, c: 0.3 * jnp.tanh(x + c["a"] + c["none"].sum())  # noqa: E731
    found = residual(g, None, jnp.ones((8, 3)), condition=condition, key=KEY, estimator=estimator, chunk_size=4)[1]
    assert found.shape == (8,)


def test_arrays_of_a_device():
    """Inside shard_map g may close over an array that differs between devices, where x and key do not."""
    mesh, spec = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2]), jax.P("data")
    shifts, x, estimator = jnp.arange(2.0), jnp.ones((8, 3)), Roulette(Geometric(0.3), 1, subsample=4)

    def log_det(shift):
        return residual(lambda p, x: 0.3 * jnp.tanh(x + shift), None, x, key=KEY, estimator=estimator)[1]

    divided = jax.shard_map(lambda shift: log_det(shift[0])[None], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(divided)(shifts), jax.jit(jax.vmap(log_det))(shifts), rtol=1e-12)


def test_length():
    """The diagnostics have the mean number of products of an example."""
    g, params, x = dense_net(0.7, batch=8)
    options = {"key": KEY, "return_diagnostics": True}
    lengths = [
        residual(g, params, x, estimator=Roulette(Geometric(0.1), 2, subsample=r, trace_probes=3), **options)[2].length
        for r in (1, 4)
    ]
    assert lengths[0] > 6 and lengths[1] == 5 + (lengths[0] - 5) / 4


def test_one_example_needs_all_terms():
    """With one example, as under vmap over examples, nothing is left out."""
    g, params, x = dense_net(0.7, batch=4)
    keys = jax.random.split(KEY, 4)

    def log_det(x, key, r):
        return residual(g, params, x[None], key=key, estimator=Roulette(Geometric(0.3), 1, subsample=r))[1][0]

    found, expected = (jax.jit(jax.vmap(partial(log_det, r=r)))(x, keys) for r in (4, 1))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("divided", ["named axes", "shard_map"])
def test_divided_batches(divided):
    """The estimate is that of the whole batch, if its parts have the same r."""
    g, params, x = dense_net(0.7, batch=8)
    estimator = Roulette(Defensive(0.3), 1, subsample=2, probe="hadamard")

    def log_det(x):
        return residual(g, params, x, key=KEY, estimator=estimator, lipschitz=0.7)[1]

    def named(x):
        with batch_axes("devices"):
            return log_det(x)

    if divided == "named axes":
        found = jax.jit(jax.vmap(named, axis_name="devices"))(x.reshape(2, 4, *x.shape[1:])).reshape(8)
    else:
        mesh, spec = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2]), jax.P("data")
        found = jax.jit(jax.shard_map(log_det, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_allclose(found, jax.jit(log_det)(x), rtol=1e-12)


def test_less_noise_of_a_mean():
    """For one linear map the mean of a batch has a small part of the variance, at the same cost."""
    matrix = 0.9 * jnp.diag(jnp.linspace(-1, 1, 4)) + 0.05
    x = jnp.zeros((8, 4))

    def moments(estimator):
        def draw(key):
            _, log_det, found = residual(
                lambda w, x: x @ w, matrix, x, key=key, estimator=estimator, lipschitz=0.96, return_diagnostics=True
            )
            return log_det.mean(), found.length

        values, lengths = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 2000))
        return float(jnp.var(values)), float(lengths.mean())

    plain, cost = moments(Roulette(Defensive(), 0, probe="rademacher"))
    spread, spread_cost = moments(Roulette(Defensive(0.25), 1, subsample=4, probe="hadamard"))
    assert spread_cost < 1.1 * cost and spread < plain / 5
