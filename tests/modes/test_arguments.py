"""Every argument of every public name: an object of no use raises an error that starts with the argument's name.

`arguments.calls` has a valid call of each. A new public name needs one there, or a reason here.
"""

import inspect
import re

import numpy as np
import pytest

import resflow_jax as rf
from resflow_jax import plot, training
from resflow_jax.layers.lipschitz import deferred_norms
from tests.modes.arguments import calls

# What flows call with arguments that they have checked, and what authors of layers, bases, laws and solvers define.
INNER = {
    *("transform", "invert", "invert_and_log_det", "output_shape", "input_shape", "part_shapes", "domain", "codomain"),
    *("estimate", "solve", "solve_and_estimate", "certified_bounds", "lipschitz_bounds", "values", "inverse_values"),
    *("initialize", "update_statistics", "passed", "g", "propose", "split", "tolerance_for", "with_limits", "move"),
    *("restack", "condition_features", "weights", "apply", "move_statistics", "bound", "constrain", "check_channels"),
    *("matvec", "rmatvec", "inner", "column_norms", "row_norms", "survival", "from_bits", "check", "within"),
    *(
        "shardings",
        "place",
        "to_checkpoint",
        "to_host",
        "place_batch",
        "current_flow",
        "averaged_flow",
        "advance_norms",
    ),
    *("step", "gradient", "update", "error_bound", "of", "as_shown", "image_grid", "build", "theta"),
}
# Results, which users read and do not make, and interfaces.
NOT_MADE = {
    *("Anomaly", "BlockCertificate", "Certificate", "ContractionCheck", "Diagnostics", "Estimate", "FitDivergedError"),
    *("FitProgress", "FitResult", "History", "InverseError", "InverseStatus", "LayerCertificate", "PowerIteration"),
    *("PowerIterationStatus", "TrainState", "Typicality", "Base", "Bijector", "Contraction", "CustomEstimator"),
    *("LengthLaw", "Solver", "Constant", "NormState", "Exp", "Softplus", "Trainer", "Coupling"),
}
LAWS = {"rf.Defensive.sample", "rf.Fitted.sample", "rf.Geometric.sample", "rf.Poisson.sample", "rf.LengthLaw.sample"}
OTHERS = {
    "plot.box_around": "plot.density calls it",
    "plot.grid_midpoints": "plot.density calls it",
    "plot.density_on_grid": "plot.density calls it",
    "rf.Certificate.error_bounds": "it takes a status, which is a result",
    "rf.VariationalDequantization.log_prob": "losses call it with images that they have checked",
    "rf.VariationalDequantization.sample": "losses call it with images that they have checked",
    "rf.batch_axes": "its names are checked where they are used: training/test_axes.py",
    "rf.use_cpu_flags": "it takes nothing: training/test_xla_flags.py",
    "rf.Base.log_prob": "of the interface",
    "rf.Base.sample": "of the interface",
}
# Arguments that take anything: trees of parameters, and what other settings make unused.
ANYTHING = {
    *("params", "tree", "ax"),
    *(
        "rf.Affine rngs",
        "rf.DiagonalNormal rngs",
        "rf.DenseNet padding",
        "rf.Fitted table",
        "rf.Geometric.within lipschitz",
        "rf.Poisson.within lipschitz",
        "plot.samples columns",
        "rf.Flow.update_norms restart",
    ),
    *("rf.LipschitzConv domain", "rf.LipschitzConv codomain", "rf.LipschitzDense domain", "rf.LipschitzDense codomain"),
    *("rf.StandardNormal.log_prob condition", "rf.StandardNormal.sample condition"),
    *("rf.DiagonalNormal.log_prob condition", "rf.DiagonalNormal.sample condition"),
    *("rf.MixtureOfNormals.log_prob condition", "rf.MixtureOfNormals.log_joint condition"),
    *("rf.MixtureOfNormals.sample condition", "training.fit_estimator batch_size"),
}
# Errors that name another argument, beside which this one is not allowed.
BESIDE = {
    "rf.check_contraction condition": "g",
    "rf.residual condition": "g",
    "rf.monotone condition": "g",
    "rf.monotone_inverse condition": "g",
    "rf.residual_inverse condition": "g",
    "rf.fit optimizer": "learning_rate",
}


class Thing:
    """No value of any argument."""


def public():
    """The names of all public functions, classes and methods that take arguments."""
    found, seen = set(), set()

    def visit(name, value):
        if inspect.isclass(value):
            if value.__name__ not in NOT_MADE:
                found.add(name)
            for method in vars(value):
                function = inspect.getattr_static(value, method)
                function = getattr(function, "__func__", function)
                is_own = inspect.isfunction(function) and function.__module__.startswith("resflow_jax")
                if method.startswith("_") or method in INNER or not is_own or id(function) in seen:
                    continue
                seen.add(id(function))
                if len(inspect.signature(function).parameters) > 1 and f"{name}.{method}" not in LAWS:
                    found.add(f"{name}.{method}")
        elif inspect.isfunction(value) and value.__name__ not in INNER:
            found.add(name)

    for part, module, names in (
        ("rf", rf, rf.__all__),
        ("training", training, training.__all__),
        ("plot", plot, [name for name in vars(plot) if getattr(vars(plot)[name], "__module__", "") == plot.__name__]),
    ):
        for name in names:
            if not name.startswith("_"):
                visit(f"{part}.{name}", getattr(module, name))
    return found


def test_every_public_name_has_a_call():
    assert not public() - {*calls(), *OTHERS}


def parameters(function):
    of = function.__init__ if inspect.isclass(function) else function
    return {
        name
        for name, parameter in inspect.signature(of).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


@pytest.mark.parametrize("name", calls())
def test_every_argument_has_a_value(name):
    function, arguments = calls()[name]
    assert set(arguments) == parameters(function)


CASES = [
    (name, argument)
    for name, (_, arguments) in calls().items()
    for argument in arguments
    if argument not in ANYTHING and f"{name} {argument}" not in ANYTHING
]


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[" ".join(case) for case in CASES])
def test_an_object_of_no_use(name, argument):
    """The error names the argument, what was expected, and the type of what came."""
    function, arguments = calls()[name]
    named = BESIDE.get(f"{name} {argument}", argument)
    with deferred_norms(), pytest.raises((ValueError, TypeError)) as error:
        function(**{**arguments, argument: Thing()})
    message = str(error.value)
    assert re.match(rf"([a-z]+\.)?{named}(\[0\])?:? .*expected|([a-z]+\.)?{named}: ", message), message


VALUES = {
    "NaN": float("nan"),
    "a negative number": -1,
    "a number beyond 64 bits": 10**30,
    "a list": [1, "a"],
    "a dict": {},
    "an empty array": np.zeros(0),
    "complex numbers": np.ones((8, 3), complex),
    "text": "abc",
}
MADE = [case for case in CASES if inspect.isclass(calls()[case[0]][0])]


@pytest.mark.parametrize("value", VALUES)
def test_values_of_settings(value):
    """Whatever a class is made with, the error names one of its arguments, or there is none."""
    unclear = {}
    for name, argument in MADE:
        cls, arguments = calls()[name]
        try:
            with deferred_norms():
                cls(**{**arguments, argument: VALUES[value]})
        except (ValueError, TypeError) as error:
            if not re.match(r"[\w.]+(\[\d+\])?( \(\w+\))?: .*(expected|got)", str(error)):
                unclear[name, argument] = str(error)
    assert not unclear
