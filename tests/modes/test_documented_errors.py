"""Every error that a public docstring names is raised, with a message that names the argument.

`documented.ROWS` has calls that compile next to nothing, `ELSEWHERE` the tests of errors that need more.
"""

import ast
import inspect
import re

import pytest

import resflow_jax as rf
from resflow_jax import plot
from resflow_jax.interop import bases, distrax, flowjax, numpyro, sampling, stateless
from resflow_jax.interop.torch import config as torch_config
from resflow_jax.interop.torch import flow as torch_flow
from resflow_jax.layers.lipschitz import deferred_norms
from tests.modes.documented import ROWS
from tests.paths import TESTS

MODULES = {
    "rf": rf,
    "training": rf.training,
    "plot": plot,
    "interop.bases": bases,
    "interop.distrax": distrax,
    "interop.flowjax": flowjax,
    "interop.numpyro": numpyro,
    "interop.sampling": sampling,
    "interop.stateless": stateless,
    "interop.torch.config": torch_config,
    "interop.torch.flow": torch_flow,
}
# name of what has the docstring: the tests of its errors, file and function
ELSEWHERE = {
    "rf.AdditiveCoupling": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.AffineCoupling": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.AutoregressiveFlow": "models/test_recipes.py::test_bad_settings",
    "rf.AutoregressiveFlowConfig": "models/test_recipes.py::test_bad_settings",
    "rf.CNNConditioner": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.ContinuousBlock": "layers/test_continuous.py::test_bad_arguments",
    "rf.ContinuousFlow": "models/test_recipes.py::test_bad_settings",
    "rf.ContinuousFlowConfig": "models/test_recipes.py::test_bad_settings",
    "rf.Coupling": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.CouplingFlow": "models/test_recipes.py::test_bad_settings",
    "rf.CouplingFlowConfig": "models/test_recipes.py::test_bad_settings",
    "rf.CouplingScales": "models/test_recipes.py::test_bad_settings",
    "rf.Dequantization": "models/test_recipes.py::test_bad_settings",
    "rf.MLPConditioner": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.MaskedAutoregressive": "layers/test_autoregressive.py::test_bad_arguments",
    "rf.MixtureCoupling": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.ResNetConditioner": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.SplineCoupling": "layers/couplings/test_couplings.py::test_bad_arguments",
    "rf.VariationalDequantization": "models/test_dequantization.py::test_bad_arguments",
    "rf.VelocityField": "layers/test_continuous.py::test_bad_arguments",
    "training.pmap_train_step": "training/test_slices.py::test_other_strategies",
    "rf.Certificate.error_bounds": "models/test_recipes.py::test_certificates_beside_residual_blocks",
    "rf.BetweenBlocks": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.ClassifierConfig": "models/test_classifier_config.py::test_bad_settings",
    "rf.DenseNetBlocks": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.DenseTail": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.ImageFlowConfig": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.ImageTransform": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.Norms": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.Padding": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.Scales": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.VectorFlowConfig": "modes/test_errors.py::test_the_error_names_the_argument",
    "rf.VectorTransform": "models/test_config.py",
    "rf.Bijector.tighten": "layers/test_block_certificate.py::test_tighten_ends",
    "rf.Bijector.inverse": "layers/test_composition.py",
    "rf.Certificate.require": "models/test_certificate.py",
    "rf.Contraction": "layers/test_user_contractions.py",
    "rf.Flow.inverse": "models/test_flow.py::test_inverse_reports_what_did_not_converge",
    "rf.Typicality.fit": "models/test_typicality.py::test_errors",
    "rf.batch_axes": "training/test_axes.py",
    "rf.check_contraction": "functional/test_contraction_check.py::test_bad_maps",
    "rf.fit": "training/test_fit.py",
    "rf.make_reversible": "layers/test_reversible.py::test_bad_arguments",
    "rf.load": "io/test_bad_files.py::test_bad_files",
    "rf.load_torch_checkpoint": "interop/torch/test_checkpoints.py",
    "rf.residual_inverse": "functional/test_inverse_status.py::test_raising",
    "rf.save": "io/test_files.py::test_a_place_that_cannot_be_written",
    "rf.save_torch_checkpoint": "interop/torch/test_checkpoints.py",
    "rf.use_cpu_flags": "training/test_xla_flags.py",
    "plot.samples": "test_plot.py",
    "plot.density": "test_plot.py",
    "plot.curves": "test_plot.py",
    "training.Placement": "training/test_parallel.py",
    "training.Trainer.create_state": "modes/test_errors.py::test_the_error_names_the_argument",
    "training.fit_estimator": "training/test_step.py::test_lengths_are_fitted_to_what_was_seen",
    "training.jit_train_step": "training/test_parallel.py",
    "training.shard_map_train_step": "training/test_parallel.py",
    "interop.torch.flow.TorchFlow.forward_and_log_prob": "models/test_answers.py::test_no_classifier",
    "interop.torch.config.config_from_args": "interop/torch/test_checkpoints.py",
    "interop.torch.config.args_from_config": "interop/torch/test_checkpoints.py",
}
CASES = [(name, message) for name, rows in ROWS.items() for message in rows]


def documented():
    """Names of all public functions, classes and methods with a section Raises."""
    found, seen = set(), set()

    def visit(name, value):
        value = getattr(value, "__func__", getattr(value, "fget", None) or value)
        if id(value) in seen or not callable(value):
            return
        seen.add(id(value))
        if re.search(r"^\s*Raises:$", value.__doc__ or "", re.MULTILINE):
            found.add(name.removesuffix(".__init__"))
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if not method.startswith("_") or method in ("__init__", "__call__"):
                    visit(f"{name}.{method}", function)

    for module, contents in MODULES.items():
        for name in contents.__all__ if hasattr(contents, "__all__") else vars(contents):
            value = getattr(contents, name)
            if not name.startswith("_") and (
                hasattr(contents, "__all__") or getattr(value, "__module__", None) == contents.__name__
            ):
                visit(f"{module}.{name}", value)
    return found


def test_every_documented_error_has_a_test():
    """A new section Raises needs a row, or the name of a test."""
    assert not documented() - {*ROWS, *ELSEWHERE}


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_the_tests_elsewhere_are_there(place):
    """The function that is named, or any that catches errors."""
    file, _, name = place.partition("::")
    functions = [node for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    catching = [function.name for function in functions if "pytest.raises" in ast.unparse(function)]
    assert name in catching if name else catching


@pytest.mark.parametrize(("name", "message"), CASES, ids=[" ".join(case) for case in CASES])
def test_documented_errors(name, message):
    """In eager calls with defaults; the argument stands first."""
    with deferred_norms(), pytest.raises(ValueError, match=f"^{message}"):
        ROWS[name][message]()
