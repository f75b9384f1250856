"""Base distributions of z, the image of the data under a flow's bijector."""

from resflow_jax.models.bases.base import Base, StandardNormal, standard_normal_log_prob
from resflow_jax.models.bases.mixture import MixtureOfNormals
from resflow_jax.models.bases.normal import DiagonalNormal
from resflow_jax.models.bases.objects import ObjectBase, as_base

__all__ = [
    "Base",
    "DiagonalNormal",
    "MixtureOfNormals",
    "ObjectBase",
    "StandardNormal",
    "as_base",
    "standard_normal_log_prob",
]
