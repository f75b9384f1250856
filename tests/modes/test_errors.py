"""An impossible value of any public argument raises a ValueError that starts with the argument's name.

No case compiles anything, since arguments are checked first.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.checks import as_float_array, as_float_batch
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.losses import dequantized_bits_per_dim, negative_log_likelihood
from tests.modes.calls import IMAGES, KEY, X, images, vectors

NAN = float("nan")
ARRAYS = {
    "None": None,
    "a string": "abc",
    "a number": 1.0,
    "a list": X.tolist(),
    "integers": np.ones((4, 3), int),
    "booleans": np.ones((4, 3), bool),
    "complex": X.astype(complex),
    "objects": X.astype(object),
    "another size": X[:, :2],
    "another rank": X[0],
    "no example": X[:0],
    "a masked value": np.ma.array(X, mask=X.max() == X),
    "a key": KEY,
    "a class": np.ndarray,
}
KEYS = {
    "an integer": 0,
    "a string": "key",
    "a function": jax.random.key,
    "numbers": np.zeros((4, 3)),
    "three words": np.zeros(3, np.uint32),
    "keys": jax.random.split(KEY, 2),
}
COUNTS = {"float": 2.0, "negative": -1, "zero": 0, "string": "2", "array": np.array([2]), "bool": True, "nan": NAN}
ESTIMATORS = {"a class": rf.Exact, "a string": "exact", "a law": rf.Poisson()}
SOLVERS = {"a class": rf.Anderson, "a string": "anderson", "None": None, "an estimator": rf.Exact()}
FLAGS = {"string": "no", "None": None}
GROUPS = {"None": None, "a dict": {}, "a string": "222f", "a number": 2, "another": rf.Padding(), "a class": rf.Norms}
NUMBERS = {"string": "a", "array": np.ones(2), "nan": NAN}
DENSE, KERNEL = rf.DenseMap(3, 2), np.ones((3, 2))


def g(params, x):
    return 0.5 * x


def twice(v):
    return 2 * v


def cases():
    """(argument, id, call)."""

    def every(argument, choices, call, without=()):
        for name, value in choices.items():
            if name not in without:
                yield argument, f"{name} to {call.__name__}", lambda value=value: call(value)

    def of_flow(method, argument, choices, *args, **kwargs):
        """Values of a positional argument (the first that args leave None) or of a keyword."""

        def call(value):
            flow = nnx.merge(*vectors())
            if argument in kwargs:
                return getattr(flow, method)(*args, **{**kwargs, argument: value})
            return getattr(flow, method)(*(value if arg is Ellipsis else arg for arg in args), **kwargs)

        call.__name__ = method
        return every(argument, choices, call)

    for method in ("forward", "log_prob"):
        yield from of_flow(method, "x", ARRAYS, ..., key=KEY)
        yield from of_flow(method, "key", {**KEYS, "None": None}, X, key=None)
        yield from of_flow(method, "estimator", ESTIMATORS, X, key=KEY, estimator=None)
    for method in ("__call__", "initialize", "update_statistics"):
        yield from of_flow(method, "x", ARRAYS, ...)
    yield from of_flow("inverse", "z", ARRAYS, ...)
    yield from of_flow("inverse", "solver", SOLVERS, X, solver=None)
    yield from of_flow("inverse_and_log_prob", "z", ARRAYS, ..., key=KEY)
    yield from of_flow("inverse_and_log_prob", "key", {**KEYS, "None": None}, X, key=None)
    yield from of_flow("inverse_and_log_prob", "solver", SOLVERS, X, key=KEY, solver=None)
    yield from of_flow("inverse_and_log_prob", "estimator", ESTIMATORS, X, key=KEY, estimator=None)
    for method in ("sample", "sample_and_log_prob"):
        yield from of_flow(method, "shape", {**COUNTS, "None": None, "a zero": (2, 0)}, KEY, ...)
        yield from of_flow(method, "key", {**KEYS, "None": None}, ..., 2)
        yield from of_flow(method, "solver", SOLVERS, KEY, 2, solver=None)
    for name in ("tolerance", "residual_tolerance"):
        yield from of_flow("update_norms", name, {"zero": 0, "nan": NAN, "string": "a"}, **{name: None})
    yield from of_flow("update_norms", "max_iterations", {"zero": 0, "string": "a"}, max_iterations=None)

    config = rf.VectorFlowConfig(dim=3)
    rngs = {"an integer": 0, "None": None, "a key": KEY, "the class": nnx.Rngs, "other streams": nnx.Rngs(dropout=0)}
    yield from every("rngs", rngs, lambda rngs: rf.ResidualFlow(config, rngs=rngs))
    configs = {"None": None, "a class": rf.VectorFlowConfig, "a dict": {}}
    yield from every("config", configs, lambda config: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))

    some = ("another size", "another rank")
    yield from every("x", ARRAYS, lambda x: rf.residual(g, None, x, key=KEY), some)
    yield from every("y", ARRAYS, lambda y: rf.residual_inverse(g, None, y), (*some, "no example"))
    yield from every("key", {**KEYS, "None": None}, lambda key: rf.residual(g, None, X, key=key))
    yield from every("estimator", ESTIMATORS, lambda e: rf.residual(g, None, X, key=KEY, estimator=e))
    yield from every("solver", SOLVERS, lambda solver: rf.residual_inverse(g, None, X, solver=solver))
    functions = {
        "None": None,
        "another shape": lambda params, x: x[:, :1],
        "another dtype": lambda params, x: x.astype(jnp.bfloat16),
        "a pair": lambda params, x: (x, x),
        "nothing": lambda params, x: None,
    }
    yield from every("g", functions, lambda g: rf.residual(g, None, X, key=KEY))
    yield from every("g", functions, lambda g: rf.residual_inverse(g, None, X))
    yield from every("prepare", {"a number": 3}, lambda p: rf.residual(g, None, X, key=KEY, prepare=p))
    bad = {**NUMBERS, "zero": 0, "one": 1.0}
    yield from every("lipschitz", bad, lambda bound: rf.residual(g, None, X, key=KEY, lipschitz=bound))
    yield from every("chunk_size", COUNTS, lambda size: rf.residual(g, None, X, key=KEY, chunk_size=size))

    kernels = {
        "None": None,
        "a list": KERNEL.tolist(),
        "integers": KERNEL.astype(int),
        "another shape": KERNEL.T,
        "complex": KERNEL.astype(complex),
        "masked": np.ma.array(KERNEL, mask=KERNEL == 1),
    }
    maps = {"None": None, "a class": rf.DenseMap, "a string": "dense"}
    for bound in (rf.spectral_norm_bound, rf.gram_iteration_bound):
        yield from every("kernel", kernels, lambda kernel, bound=bound: bound(DENSE, kernel))
        yield from every("linear_map", maps, lambda linear_map, bound=bound: bound(linear_map, KERNEL))
    orders = {**NUMBERS, "None": None, "zero": 0}
    yield from every("domain", orders, lambda p: rf.induced_norm_bound(DENSE, KERNEL, p, 2.0))
    yield from every("codomain", orders, lambda q: rf.induced_norm_bound(DENSE, KERNEL, 2.0, q))
    yield from every("p", orders, rf.ACTIVATIONS["relu"].lipschitz_in)
    vectors_ = {"None": None, "a list": [1.0, 2.0], "integers": np.ones(3, int), "complex": np.ones(3, complex)}
    yield from every("v", vectors_, lambda v: rf.power_iteration(twice, v))
    starts = {**vectors_, "no start": np.ones((0, 3))}
    yield from every("starts", starts, lambda starts: rf.best_start(twice, starts))
    yield from every("matvec", {"None": None}, lambda f: rf.power_iteration(f, np.ones(3)))
    yield from every("rmatvec", {"shape": lambda u: u[:2]}, lambda f: rf.power_iteration(twice, np.ones(3), rmatvec=f))
    norms = {
        "None": None,
        "a list": [0.5, 0.2],
        "integers": np.ones(3, int),
        "rank 3": np.ones((2, 2, 2)),
        "empty": np.ones(0),
        "nan": np.full(3, NAN),
        "masked": np.ma.array(np.ones(3), mask=[1, 0, 0]),
    }
    yield from every("term_norms", norms, rf.fit_lengths)
    for name in ("batch_size", "fixed_cost", "share", "lipschitz"):
        bad = {**NUMBERS, "negative": -1}
        yield from every(name, bad, lambda value, name=name: rf.fit_lengths(np.ones(3), **{name: value}))

    def evaluate(argument):
        def call(value):
            options = {"images": IMAGES, "key": KEY, "levels": 4, argument: value}
            flow = options.pop("flow", None) if argument == "flow" else nnx.merge(*images())
            return rf.evaluate_bits_per_dim(flow, **options)

        return call

    pictures = {
        "None": None,
        "a list": IMAGES.tolist(),
        "floats": IMAGES / 4,
        "one image": IMAGES[0],
        "no image": IMAGES[:0],
        "another size": np.zeros((3, 4, 4, 1), np.uint8),
        "too bright": IMAGES + np.uint8(9),
        "masked": np.ma.array(IMAGES, mask=IMAGES == 0),
    }
    yield from every("images", pictures, evaluate("images"))
    yield from every("key", {**KEYS, "None": None}, evaluate("key"))
    yield from every("estimator", ESTIMATORS, evaluate("estimator"))
    for name in ("draws", "batch_size", "levels"):
        yield from every(name, {**COUNTS, "None": None}, evaluate(name))
    yield from every("mesh", {"a number": 3}, evaluate("mesh"))
    flows = {"None": None, "the class": rf.ResidualFlow, "a string": "flow"}
    for call in (evaluate("flow"), rf.certify, lambda flow: rf.save_torch_checkpoint(flow, "never-written.pth")):
        yield from every("flow", flows, call)
    yield from every("x", ARRAYS, lambda x: vector_log_prob(nnx.merge(*vectors()), x, KEY), ("another size",))

    trainer = rf.training.Trainer(None, negative_log_likelihood(), optax.sgd(1.0), 0.9)

    def state(argument):
        def call(value):
            options = {"flow": nnx.merge(*vectors()), "estimator": rf.Roulette(), **{argument: value}}
            fields = {name: options.pop(name) for name in trainer._fields if name in options}
            return trainer._replace(**fields).create_state(**options)

        return call

    yield from every("flow", flows, state("flow"))
    yield from every("estimator", {**ESTIMATORS, "None": None}, state("estimator"))
    yield from every("accumulate", COUNTS, state("accumulate"))
    yield from every("ema_decay", {"one": 1, "negative": -0.5, "string": "a", "None": None}, state("ema_decay"))
    yield from every("optimizer", {"None": None}, state("optimizer"))
    yield from every("loss", {"None": None}, state("loss"))
    yield from every("levels", COUNTS, dequantized_bits_per_dim)

    pure = rf.interop.stateless.stateless(config)
    yield from every("key", {**KEYS, "None": None}, pure.init)
    yield from every("variables", {"None": None, "a list": []}, lambda v: pure.apply(v, "log_prob", X))
    yield from every("method", {"None": None, "unknown": "fly"}, lambda method: pure.apply({}, method, X))
    yield from every("path", {"None": None, "a number": 3}, rf.load_torch_checkpoint)

    for cls, required, choices in (
        (rf.DenseMap, {"features_in": 3, "features_out": 2}, {"features_in": COUNTS, "features_out": COUNTS}),
        (
            rf.ConvMap,
            {"size": (2, 2), "channels_in": 1, "channels_out": 1},
            {
                "size": {"a number": 2, "no side": (), "four sides": (2, 2, 2, 2), "zero": (0, 2)},
                "channels_in": COUNTS,
                "kernel_size": COUNTS,
            },
        ),
        (
            rf.VectorFlowConfig,
            {"dim": 3},
            {
                "dim": COUNTS,
                "blocks": COUNTS,
                "hidden": {"a number": 4, "strings": ("a",), "zero": (0,), "None": None},
                "activation": {"None": None, "list": ["relu"], "object": rf.ACTIVATIONS["relu"], "array": np.ones(2)},
                "coefficient": {**NUMBERS, "zero": 0, "one": 1},
                "condition_dim": {"zero": 0, "negative": -1, "float": 2.0, "string": "a", "bool": True},
                **{name: GROUPS for name in ("data", "between", "norms", "densenet")},
                "matmul_dtype": {"a dtype": jnp.bfloat16, "unknown": "float16"},
            },
        ),
        (
            rf.Padding,
            {},
            {
                "padding.channels": {"negative": -1, "float": 1.0, "None": None},
                "padding.noise": {"None": None, "unknown": "x"},
                "padding.scale": {**NUMBERS, "zero": 0, "infinite": np.inf},
                "padding.shift": {**NUMBERS, "None": None},
            },
        ),
        (
            rf.BetweenBlocks,
            {},
            {
                **{f"between.{name}": FLAGS for name in ("actnorm", "feature_actnorm", "first_actnorm", "batchnorm")},
                "between.invertible_linear": FLAGS,
                "between.centering": {"unknown": "all", "a number": 1},
            },
        ),
        (
            rf.Norms,
            {},
            {
                "norms.orders": {"a number": 2, "strings": ("a",), "unknown": "xyz", "one": "2"},
                "norms.learned": FLAGS,
                "norms.ties": {"None": None, "unknown": "open"},
            },
        ),
        (
            rf.DenseTail,
            {},
            {
                "tail.blocks": {"negative": -1, "float": 1.0, "None": None},
                **{f"tail.{name}": COUNTS for name in ("hidden", "layers", "densenet_first", "densenet_growth")},
                "tail.norms": {"a number": 2, "strings": ("a",), "unknown": "xyz", "two": "22"},
            },
        ),
        (rf.DenseNetBlocks, {}, {"densenet.depth": {"negative": -1, "float": 1.0}, "densenet.growth": COUNTS}),
        (rf.Scales, {}, {f"scales.{name}": FLAGS for name in ("squeeze_first", "factor_out")}),
        (
            rf.ImageTransform,
            {},
            {"data.logit_alpha": {**NUMBERS, "zero": 0, "half": 0.5}, "data.padding": {"a number": 2, "None": None}}
            | {"data.spline_bins": {"negative": -1, "float": 4.0, "one": 1, "many": 501}},
        ),
        (TorchImageConfig, {"shape": (4, 4, 1)}, {"fully_connected": FLAGS, "padding_first": FLAGS}),
        (
            rf.ImageFlowConfig,
            {"shape": (4, 4, 1)},
            {
                "shape": {"a number": 4, "two": (4, 4), "zero": (4, 4, 0), "None": None},
                "blocks": {"a number": 1, "none": (), "strings": ("a",)},
                "kernels": {"even": (2,), "a number": 3, "none": ()},
                **{name: GROUPS for name in ("data", "between", "norms", "tail", "densenet", "scales")},
            },
        ),
        (
            rf.Roulette,
            {},
            {
                "length": {"None": None, "a class": rf.Poisson, "a string": "poisson"},
                "exact_terms": {"negative": -1, "string": "a", "float": 1.0, "bool": True},
                "samples": COUNTS,
                "probe": {"None": None, "unknown": "x"},
                "probes": COUNTS,
                "gradient": {"None": None, "unknown": "x"},
                "minres_steps": {"negative": -1, "string": "a"},
            },
        ),
        (rf.Truncated, {}, {"terms": COUNTS}),
        (rf.Exact, {}, {"chunk_size": COUNTS}),
        (rf.Geometric, {}, {"p": {**NUMBERS, "zero": 0, "one": 1}}),
        (rf.Poisson, {}, {"rate": {**NUMBERS, "zero": 0, "infinite": np.inf}}),
        (rf.Defensive, {}, {"p": NUMBERS, "share": NUMBERS, "lipschitz": NUMBERS}),
        (rf.Anderson, {}, {"memory": COUNTS, "tolerance": {"zero": 0, "string": "a"}}),
        (rf.Broyden, {}, {"memory": COUNTS, "on_failure": {"None": None, "unknown": "x"}}),
    ):
        for argument, values in choices.items():
            field = argument.rpartition(".")[2]
            make = lambda value, c=cls, r=required, a=field: c(**{**r, a: value})  # noqa: E731
            make.__name__ = f"{cls.__name__} {argument}"
            yield from every(argument, values, make)


CASES = list(cases())


@pytest.mark.parametrize(("argument", "call"), [case[::2] for case in CASES], ids=[" ".join(c[:2]) for c in CASES])
def test_the_error_names_the_argument(argument, call):
    """The error also says what was expected and what came."""
    with pytest.raises(ValueError, match=rf"^{argument}(\[0\])?: .*expected") as found:
        call()
    assert "got" in str(found.value)


@pytest.mark.parametrize(
    ("x", "remedy"),
    [
        (X.tolist(), r"jnp.asarray\(x\)"),
        (np.ones((4, 3), int), r"x.astype\(jnp.float32\)"),
        (IMAGES, r"dequantise images"),
    ],
)
def test_the_error_says_what_to_do(x, remedy):
    with pytest.raises(ValueError, match=rf"^x: expected a float array .*, got .*; .*{remedy}"):
        as_float_batch("x", x)


@pytest.mark.parametrize("convert", [as_float_batch, as_float_array])
def test_arrays_of_numpy(convert):
    """Any byte order, also masked arrays without a masked value, views and variables: the same numbers as ever."""
    expected = np.float32(X)
    for x in (
        X.astype(">f4"),
        np.asfortranarray(X, "f4"),
        np.ma.array(expected, mask=False),
        np.repeat(expected, 2, axis=1)[:, ::2],
        nnx.Param(jnp.asarray(expected)),
        jnp.asarray(expected),
    ):
        converted = convert("x", x)
        assert isinstance(converted, jax.Array) and converted.dtype == np.float32
        np.testing.assert_array_equal(converted, expected)
    assert convert("x", X.astype(">f8")).dtype == np.float64
    assert convert("x", X.astype(np.longdouble)).dtype == np.float64
    assert jax.jit(lambda x: convert("x", x))(expected).dtype == np.float32
    assert convert("x", jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


def test_float64_without_64_bit_types():
    """It is cast, as JAX does with it, and values beyond float32 become infinite."""
    with jax.enable_x64(False):
        converted = as_float_batch("x", np.array([[0.1], [1e300]]))
    assert converted.dtype == np.float32
    np.testing.assert_array_equal(converted, np.float32([[0.1], [np.inf]]))


def test_a_changed_array_does_not_matter():
    """What NumPy's array holds later does not reach a program that has been given it."""
    x = X.copy()
    converted = as_float_batch("x", x)
    x[...] = 0
    np.testing.assert_array_equal(converted, X)


@pytest.mark.parametrize("x", [X.astype(">f8"), np.ma.array(X, mask=False)])
def test_converted_arrays_reach_the_flow(x):
    """Its result is that of the plain array."""
    flow = nnx.merge(*vectors())
    np.testing.assert_array_equal(flow(x), flow(X))


@pytest.mark.parametrize(("dtype", "accuracy"), [(jnp.bfloat16, 0.08), (jnp.float16, 0.01)])
@pytest.mark.parametrize("estimator", [rf.Exact(), rf.Roulette(probe="orthogonal", probes=3)], ids=str)
def test_16_bit_floats(estimator, dtype, accuracy):
    """log|det 1.5 I| = 3 log 1.5 to the dtype's accuracy, in that dtype."""
    _, log_det = rf.residual(g, None, jnp.asarray(X, dtype), key=KEY, estimator=estimator)
    assert log_det.dtype == dtype
    np.testing.assert_allclose(log_det.astype(np.float32), 3 * np.log(1.5), rtol=accuracy)
