"""Residual flows for JAX: invertible residual networks with unbiased log-densities."""

from resflow_jax.functional.activations import ACTIVATIONS, Activation
from resflow_jax.functional.estimators import Estimator, Exact, Roulette, Truncated
from resflow_jax.functional.fitting import fit_lengths
from resflow_jax.functional.inverse import InverseError, residual_inverse
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.laws import Defensive, Fitted, Geometric, Poisson
from resflow_jax.functional.logdet import Diagnostics, residual
from resflow_jax.functional.norms import PowerIteration, PowerIterationStatus, power_iteration
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint
from resflow_jax.layers.lipschitz import NormState
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.flow import ResidualFlow
from resflow_jax.training.likelihood import Estimate, evaluate_bits_per_dim

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Anderson",
    "Broyden",
    "Defensive",
    "Diagnostics",
    "Estimate",
    "Estimator",
    "Exact",
    "Fitted",
    "FixedPoint",
    "Geometric",
    "ImageFlowConfig",
    "InverseError",
    "InverseStatus",
    "NormState",
    "Poisson",
    "PowerIteration",
    "PowerIterationStatus",
    "ResidualFlow",
    "Roulette",
    "Truncated",
    "VectorFlowConfig",
    "evaluate_bits_per_dim",
    "fit_lengths",
    "power_iteration",
    "residual",
    "residual_inverse",
]
