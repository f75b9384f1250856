"""Checks of values: immediate for NumPy arrays, after the computation for JAX arrays, on one device or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import resflow_jax as rf
from resflow_jax.functional import values
from resflow_jax.functional.values import ANYWHERE, UNIT_INTERVAL, Domain, checked, number_of_overflows, report_nan
from resflow_jax.layers.logit import Logit
from resflow_jax.training.parallel import make_mesh

X = np.linspace(0, 1, 16).reshape(16, 1)
needs_devices = pytest.mark.skipif(jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py")


def with_value(value):
    return np.concatenate([X[:-1], [[value]]])


def spread(x):
    return jax.device_put(x, NamedSharding(make_mesh(), PartitionSpec("data")))


PLACES = [
    pytest.param(jnp.asarray, id="one device"),
    pytest.param(spread, id="eight devices", marks=needs_devices),
]
COLUMN = Domain(np.asarray([0.0]), np.asarray([2.0]), np.asarray(["[0, 2]"]))
BAD = [
    (np.nan, ANYWHERE, "x: expected finite values, got 1 that are not in float32"),
    (-np.inf, UNIT_INTERVAL, "x: expected finite values, got 1 that are not in float32"),
    (1e39, ANYWHERE, "x: expected finite values, got 1 that are not in float32"),  # of float64
    (1.5, UNIT_INTERVAL, r"x: expected values in \[0, 1\], got \[0\.0, 1\.5\]$"),
    (-0.25, UNIT_INTERVAL, r"x: expected values in \[0, 1\], got \[-0\.25, 0\.9"),
    (-0.25, COLUMN, r"x: expected values in \[0, 2\] in column 0, got \[-0\.25, 0\.9[0-9]*\]$"),
    (
        1.2,
        Logit(0.05).domain(np.float32),
        r"x: expected values in \[0, 1\], got .*1\.2.*, beyond it by more than alpha / \(1 - 2 alpha\) = 0\.0556 of",
    ),
]


CONFIGS = {
    "logit": rf.ImageFlowConfig((2, 2, 1), blocks=(1,), hidden_channels=2, kernels=(1, 1), tail=rf.DenseTail(0)),
    "wide logit": rf.ImageFlowConfig(
        (2, 2, 1),
        blocks=(1,),
        hidden_channels=2,
        kernels=(1, 1),
        data=rf.ImageTransform(logit_alpha=0.05),
        tail=rf.DenseTail(0),
    ),
    "no logit": rf.ImageFlowConfig(
        (2, 2, 1),
        blocks=(1,),
        hidden_channels=2,
        kernels=(1, 1),
        data=rf.ImageTransform(logit_alpha=None),
        tail=rf.DenseTail(0),
    ),
}


@pytest.mark.parametrize(("value", "domain", "message"), BAD)
def test_numpy_arrays_are_checked_at_once(value, domain, message):
    with pytest.raises(ValueError, match=message), checked("x", with_value(value), np.dtype("float32"), domain):
        raise AssertionError("the computation is not begun")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("value", "domain", "message"), BAD)
def test_jax_arrays_are_judged_at_the_end(value, domain, message, place):
    steps = []
    with pytest.raises(ValueError, match=message), checked("x", place(with_value(value)), np.dtype("float32"), domain):
        steps.append("computed")
    assert steps
    with pytest.raises(ValueError, match=message), checked("x", place(with_value(value)), np.dtype("float32"), domain):
        raise FloatingPointError("of the computation")


@pytest.mark.parametrize("place", [pytest.param(np.asarray, id="host"), *PLACES])
def test_good_values(place):
    """Good values raise nothing: also none, values a little outside [0, 1] with a logit, and any finite ones."""
    for x, domain in (
        (X, UNIT_INTERVAL),
        (X[:0], UNIT_INTERVAL),
        (with_value(1.05), Logit(0.05).domain(np.float32)),
        (with_value(-3e38), ANYWHERE),
    ):
        with checked("x", place(x), np.dtype("float32"), domain):
            pass
        with pytest.raises(KeyError), checked("x", place(x), np.dtype("float32"), domain):
            raise KeyError


@needs_devices
def test_nothing_is_fetched_before_the_end(monkeypatch):
    """The check brings three numbers to the host, also for an array on several devices or several processes."""
    fetched = []
    device_get = jax.device_get

    def counted(tree):
        fetched.extend(np.shape(leaf) for leaf in jax.tree.leaves(tree))
        return device_get(tree)

    monkeypatch.setattr(values.jax, "device_get", counted)
    with checked("x", spread(X), np.dtype("float64"), UNIT_INTERVAL):
        assert not fetched
    assert fetched == [()] * 3


def test_traced_arrays_have_no_values():
    """Traced values are not checked; under grad, an array that is not differentiated is checked."""

    def twice(x, factor=2.0):
        with checked("x", x, x.dtype, UNIT_INTERVAL):
            return factor * jnp.sum(x)

    np.testing.assert_allclose(jax.jit(twice)(2 * X), 4 * X.sum())
    np.testing.assert_allclose(jax.vmap(twice)(2 * X), 4 * X[:, 0])
    np.testing.assert_allclose(jax.grad(lambda factor: twice(jnp.asarray(X), factor))(1.0), X.sum())
    with pytest.raises(ValueError, match="x: expected values in"):
        jax.grad(lambda factor: twice(jnp.asarray(2 * X), factor))(1.0)


@pytest.mark.parametrize("place", PLACES)
def test_arrays_that_a_program_closes_over(place):
    """They are concrete, and checked while the program is traced."""
    good, bad = place(X), place(with_value(1.5))

    def twice(x, factor):
        with checked("x", x, np.dtype("float64"), UNIT_INTERVAL):
            return factor * jnp.sum(x)

    factors = jnp.arange(3.0)
    np.testing.assert_allclose(jax.lax.map(lambda factor: twice(good, factor), factors), factors * X.sum())
    np.testing.assert_allclose(jax.jit(lambda factor: twice(good, factor))(2.0), 2 * X.sum())
    with pytest.raises(ValueError, match="x: expected values in"):
        jax.jit(lambda factor: twice(bad, factor))(2.0)


def test_variables_of_flax():
    """Their value is checked, and not where it is traced."""

    class Model(nnx.Module):
        def __init__(self, x):
            self.x = nnx.Param(x)

        def __call__(self):
            with checked("x", self.x, np.dtype("float64"), UNIT_INTERVAL):
                return jnp.sum(self.x[...] ** 2)

    np.testing.assert_allclose(nnx.grad(lambda model: model())(Model(jnp.asarray(X))).x[...], 2 * X)
    with pytest.raises(ValueError, match="x: expected values in"):
        Model(jnp.asarray(2 * X))()


def test_under_debug_nans_the_argument_is_named():
    """Where JAX itself raises in the computation the argument is named; good values pass."""
    flow = rf.ResidualFlow(CONFIGS["wide logit"], rngs=nnx.Rngs(0))
    good = np.full((8, 2, 2, 1), 0.5)
    bad = good.copy()
    bad[0, 0, 0, 0] = np.nan
    for place in (jnp.asarray, spread) if jax.device_count() == 8 else (jnp.asarray,):
        good_here, bad_here = place(good), place(bad)
        with jax.debug_nans(True):
            with checked("x", good_here, bad.dtype, UNIT_INTERVAL):
                pass
            with (
                pytest.raises(ValueError, match="x: expected finite values, got 1"),
                checked("x", bad_here, bad.dtype, UNIT_INTERVAL),
            ):
                pass
    bad_here = jnp.asarray(bad)
    with jax.debug_nans(True), pytest.raises(ValueError, match="x: expected finite values, got 1"):
        flow(bad_here)


@pytest.mark.parametrize(("name", "dtype"), [("logit", "float32"), ("no logit", "float32"), ("wide logit", "float64")])
def test_a_flow_takes_what_its_inverse_returns(name, dtype):
    """log_prob, eager and compiled, is finite, with finite gradients, of images that lie beyond [0, 1]."""
    with jax.enable_x64(dtype == "float64"):
        flow = rf.ResidualFlow(CONFIGS[name], rngs=nnx.Rngs(0))
        flow.initialize(jax.random.bernoulli(jax.random.key(0), 0.5, (64, 2, 2, 1)).astype(dtype))
        x = flow.inverse(jnp.concatenate([30 * jax.random.normal(jax.random.key(1), (40, 4)), jnp.full((1, 4), 1e4)]))
        assert x.dtype == dtype and (x < 0).any() and (x > 1).any()
        graphdef, state = nnx.split(flow)

        def log_prob(state, x):
            return nnx.merge(graphdef, state).log_prob(x, estimator=rf.Exact())

        assert jnp.isfinite(flow.log_prob(x, estimator=rf.Exact())).all()
        total = jax.value_and_grad(lambda *args: log_prob(*args).sum(), (0, 1), allow_int=True)
        value, gradients = jax.jit(total)(state, x)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients) if leaf.dtype == dtype)
        assert jnp.isfinite(flow(x)).all()
        assert jnp.isfinite(flow.sample(jax.random.key(2), 8)).all()


@needs_devices
def test_a_flow_takes_arrays_of_many_devices():
    """The values are those of one device; a wrong one is named."""
    flow = rf.ResidualFlow(CONFIGS["wide logit"], rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (16, 2, 2, 1))
    mesh = make_mesh()
    spread_flow = nnx.clone(flow)
    everywhere = NamedSharding(mesh, PartitionSpec())
    nnx.update(spread_flow, jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere), nnx.state(spread_flow)))
    found = spread_flow.log_prob(spread(x), estimator=rf.Exact())
    np.testing.assert_allclose(found, flow.log_prob(x, estimator=rf.Exact()), rtol=1e-12)
    with pytest.raises(ValueError, match="x: expected finite values, got 2 that are not in float64"):
        spread_flow.log_prob(spread(x.at[3:5, 0, 0, 0].set(jnp.nan)), estimator=rf.Exact())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_flow_refuses(name):
    """Images beyond what its inverse can return; without a logit only at initialisation, which takes data."""
    flow = rf.ResidualFlow(CONFIGS[name], rngs=nnx.Rngs(0))
    x = jnp.full((2, 2, 2, 1), 0.5)
    for wrong in (255 * x, x - 1, x.at[0, 0, 0, 0].set(1.06 if "wide" in name else 1 + 1e-5)):
        with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\], got \["):
            flow.initialize(wrong)
        if name == "no logit":
            assert jnp.isfinite(flow.log_prob(wrong, estimator=rf.Exact())).all()
        else:
            with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\], got \["):
                flow.log_prob(wrong, estimator=rf.Exact())


@pytest.mark.parametrize("place", PLACES)
def test_results_are_counted_by_examples(place):
    """In a tree of arrays; NaN warns, infinity does not; traced results are not looked at."""
    first, second = np.zeros((8, 2, 3)), np.ones(8)
    first[0, 1, 2] = first[0, 0, 0] = second[3] = np.nan
    second[1] = -np.inf
    results = place(first), place(second)
    assert (
        number_of_overflows(results) == 2
        and number_of_overflows(results[::-1]) == 3
        and number_of_overflows(jnp.zeros((0, 2))) == 0
    )
    with pytest.warns(RuntimeWarning, match=r"^call: 2 of 8 examples are NaN$"):
        report_nan("call", results)
    report_nan("call", results[1][:3])
    jax.jit(lambda results: report_nan("call", results))(results)
