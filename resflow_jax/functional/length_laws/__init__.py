"""Distributions of the random length of a Russian-roulette series: the protocol, the library's own, and fitting."""

from resflow_jax.functional.length_laws.closed_form import Defensive, Geometric, Poisson
from resflow_jax.functional.length_laws.fitted import Fitted
from resflow_jax.functional.length_laws.fitting import fit_lengths
from resflow_jax.functional.length_laws.protocol import (
    LengthLaw,
    check_law,
    check_values,
    check_variance,
    law_within,
)

# The union names the library's laws next to the protocol, so that command lines have an option for each setting.
Law = Geometric | Poisson | Defensive | Fitted | LengthLaw

__all__ = [
    "Defensive",
    "Fitted",
    "Geometric",
    "Law",
    "LengthLaw",
    "Poisson",
    "check_law",
    "check_values",
    "check_variance",
    "fit_lengths",
    "law_within",
]
