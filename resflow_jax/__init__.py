"""Residual flows for JAX: invertible residual networks with unbiased log-densities."""

from resflow_jax import interop, plot, training
from resflow_jax.functional.activations import ACTIVATIONS, Activation
from resflow_jax.functional.batch_axes import batch_axes
from resflow_jax.functional.contraction_check import ContractionCheck, check_contraction
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.estimators import CustomEstimator, Estimator, Exact, Roulette, Truncated
from resflow_jax.functional.inverse import InverseError, residual_inverse
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.length_laws import Defensive, Fitted, Geometric, LengthLaw, Poisson, fit_lengths
from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.monotone import monotone, monotone_inverse
from resflow_jax.functional.norm_bounds import gram_iteration_bound, induced_norm_bound, spectral_norm_bound
from resflow_jax.functional.norms import spectral_norm
from resflow_jax.functional.power_iteration import PowerIteration, PowerIterationStatus, best_start, power_iteration
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint, Solver
from resflow_jax.interop.torch.checkpoints import load_torch_checkpoint, save_torch_checkpoint
from resflow_jax.io.files import load, save
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.layers.autoregressive import MaskedAutoregressive
from resflow_jax.layers.bijector import Bijector, Constant
from resflow_jax.layers.block_certificate import BlockCertificate, LayerCertificate
from resflow_jax.layers.bounded import Bounded
from resflow_jax.layers.composition import Chain, Invert
from resflow_jax.layers.continuous import ContinuousBlock, VelocityField
from resflow_jax.layers.contraction import Contraction
from resflow_jax.layers.couplings.affine import AdditiveCoupling, AffineCoupling
from resflow_jax.layers.couplings.conditioners import CNNConditioner, MLPConditioner, ResNetConditioner
from resflow_jax.layers.couplings.coupling import Coupling
from resflow_jax.layers.couplings.mixture import MixtureCoupling
from resflow_jax.layers.couplings.spline import SplineCoupling
from resflow_jax.layers.diagonal_affine import Affine
from resflow_jax.layers.implicit import ImplicitBlock
from resflow_jax.layers.linear import InvertibleLinear
from resflow_jax.layers.lipschitz import NormState
from resflow_jax.layers.lipschitz_layers import LipschitzConv, LipschitzDense
from resflow_jax.layers.logit import Logit
from resflow_jax.layers.monotone import MonotoneBlock
from resflow_jax.layers.multi_scale import MultiScale
from resflow_jax.layers.networks import DenseNet, LipschitzCNN, LipschitzMLP
from resflow_jax.layers.normalization import MovingBatchNorm, MovingCentering, Normalization
from resflow_jax.layers.padding import ChannelPadding, ZeroPadding
from resflow_jax.layers.positive import Exp, Softplus
from resflow_jax.layers.residual import ResidualBlock, ResidualStack
from resflow_jax.layers.reversible import make_reversible
from resflow_jax.layers.shapes import Flatten, Permutation, Reshape, Squeeze
from resflow_jax.layers.spline import Spline
from resflow_jax.layers.unconstrained import StridedBlock, UnconstrainedBlock
from resflow_jax.models.autoregressive_flow import AutoregressiveFlow, AutoregressiveFlowConfig
from resflow_jax.models.bases import Base, DiagonalNormal, MixtureOfNormals, StandardNormal
from resflow_jax.models.certificate import Certificate, certify
from resflow_jax.models.classifier import Classifier
from resflow_jax.models.classifier_config import ClassifierConfig
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig
from resflow_jax.models.continuous_flow import ContinuousFlow, ContinuousFlowConfig
from resflow_jax.models.coupling_config import CouplingFlowConfig, CouplingScales
from resflow_jax.models.coupling_flow import CouplingFlow
from resflow_jax.models.dequantization import VariationalDequantization
from resflow_jax.models.flow import Flow
from resflow_jax.models.groups import (
    BetweenBlocks,
    DenseNetBlocks,
    DenseTail,
    Dequantization,
    ImageTransform,
    Norms,
    Padding,
    Scales,
    VectorTransform,
)
from resflow_jax.models.heads import PooledHead
from resflow_jax.models.residual_flow import ResidualFlow
from resflow_jax.models.resnet import ResNetClassifier
from resflow_jax.models.robustness import certified_radius
from resflow_jax.models.typicality import Anomaly, Typicality, anomaly_score
from resflow_jax.training.course import FitDivergedError, FitProgress, FitResult
from resflow_jax.training.evaluation import Estimate, evaluate_bits_per_dim
from resflow_jax.training.fit import fit
from resflow_jax.training.history import History
from resflow_jax.training.xla_flags import use_cpu_flags

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "ActNorm",
    "Activation",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Anderson",
    "Anomaly",
    "AutoregressiveFlow",
    "AutoregressiveFlowConfig",
    "Base",
    "BetweenBlocks",
    "Bijector",
    "BlockCertificate",
    "Bounded",
    "Broyden",
    "CNNConditioner",
    "Certificate",
    "Chain",
    "ChannelPadding",
    "Classifier",
    "ClassifierConfig",
    "Constant",
    "ContinuousBlock",
    "ContinuousFlow",
    "ContinuousFlowConfig",
    "Contraction",
    "ContractionCheck",
    "ConvMap",
    "Coupling",
    "CouplingFlow",
    "CouplingFlowConfig",
    "CouplingScales",
    "CustomEstimator",
    "Defensive",
    "DenseMap",
    "DenseNet",
    "DenseNetBlocks",
    "DenseTail",
    "Dequantization",
    "Diagnostics",
    "DiagonalNormal",
    "Estimate",
    "Estimator",
    "Exact",
    "Exp",
    "FitDivergedError",
    "FitProgress",
    "FitResult",
    "Fitted",
    "FixedPoint",
    "Flatten",
    "Flow",
    "Geometric",
    "History",
    "ImageFlowConfig",
    "ImageTransform",
    "ImplicitBlock",
    "InverseError",
    "InverseStatus",
    "Invert",
    "InvertibleLinear",
    "LayerCertificate",
    "LengthLaw",
    "LipschitzCNN",
    "LipschitzConv",
    "LipschitzDense",
    "LipschitzMLP",
    "Logit",
    "MLPConditioner",
    "MaskedAutoregressive",
    "MixtureCoupling",
    "MixtureOfNormals",
    "MonotoneBlock",
    "MovingBatchNorm",
    "MovingCentering",
    "MultiScale",
    "NormState",
    "Normalization",
    "Norms",
    "Padding",
    "Permutation",
    "Poisson",
    "PooledHead",
    "PowerIteration",
    "PowerIterationStatus",
    "ResNetClassifier",
    "ResNetConditioner",
    "Reshape",
    "ResidualBlock",
    "ResidualFlow",
    "ResidualStack",
    "Roulette",
    "Scales",
    "Softplus",
    "Solver",
    "Spline",
    "SplineCoupling",
    "Squeeze",
    "StandardNormal",
    "StridedBlock",
    "Truncated",
    "Typicality",
    "UnconstrainedBlock",
    "VariationalDequantization",
    "VectorFlowConfig",
    "VectorTransform",
    "VelocityField",
    "ZeroPadding",
    "anomaly_score",
    "batch_axes",
    "best_start",
    "certified_radius",
    "certify",
    "check_contraction",
    "evaluate_bits_per_dim",
    "fit",
    "fit_lengths",
    "gram_iteration_bound",
    "induced_norm_bound",
    "interop",
    "load",
    "load_torch_checkpoint",
    "make_reversible",
    "monotone",
    "monotone_inverse",
    "plot",
    "power_iteration",
    "residual",
    "residual_inverse",
    "save",
    "save_torch_checkpoint",
    "spectral_norm",
    "spectral_norm_bound",
    "training",
    "use_cpu_flags",
]
