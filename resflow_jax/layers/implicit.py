"""The implicit block, y + g_y(y) = x + g_x(x): a residual block, then the inverse of another."""

from collections.abc import Callable
from typing import Any

from resflow_jax.functional.checks import check_type
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.texts import constructor
from resflow_jax.layers.composition import Chain, Invert
from resflow_jax.layers.contraction import Contraction
from resflow_jax.layers.residual import ResidualBlock


class ImplicitBlock(Chain):
    """Implicit block with two contractions: y solves y + g_y(y; c) = x + g_x(x; c).

        f = r_y^-1 o r_x,   r_x(x) = x + g_x(x; c),   r_y(y) = y + g_y(y; c)
        log_det = log|det(I + dg_x/dx)| - log|det(I + dg_y/dy)|

    It is the chain [ResidualBlock(g_x), Invert(ResidualBlock(g_y))] under one name. Lip(f) reaches
    (1 + L_x) / (1 - L_y), Lip(f^-1) reaches (1 + L_y) / (1 - L_x). It counts as two residual blocks: diagnostics,
    statuses and certificates have a row for each.

    Args:
      g_x: a `Contraction`. For other modules build the chain of `ResidualBlock(module, lipschitz=...)` yourself.
      g_y: a `Contraction` for events of the same shape.
      solver: solver for y when the map is applied; `Anderson(on_failure="raise")` by default, see `Invert`.

    Randomness: a key is split between the two log-dets; each is unbiased with `Roulette`, exact with `Exact`.

    Cost: one evaluation of g_x and a solve with g_y; the inverse is one evaluation of g_y and a solve with g_x. The
    log-det adds the vector-Jacobian products of the estimator for both. A gradient adds one solve, with vjps of g_y.
    Memory with the Neumann gradient is that of two residual blocks.

    Raises:
      ValueError: for other modules, for contractions of events of different shapes, and if `solver` is not a `Solver`.

    Source: Lu et al. (2021, arXiv 2103.09527).

    Example:
      >>> g_x, g_y = (rf.LipschitzMLP(2, (4,), rngs=nnx.Rngs(n)) for n in range(2))
      >>> block = rf.ImplicitBlock(g_x, g_y)
      >>> x = jnp.ones((3, 2))
      >>> y, log_det = block.forward(x, estimator=rf.Exact())
      >>> np.allclose(y + g_y(y), x + g_x(x), atol=1e-4), np.allclose(block.inverse(y), x, atol=1e-4)
      (True, True)
    """

    def __init__(self, g_x: Contraction, g_y: Contraction, *, solver: Solver | None = None):
        check_type("g_x", g_x, Contraction)
        check_type("g_y", g_y, Contraction)
        super().__init__([ResidualBlock(g_x), Invert(ResidualBlock(g_y), solver)])

    @property
    def g_x(self) -> Contraction:
        """The contraction of x."""
        return self.bijectors[0].contraction

    @property
    def g_y(self) -> Contraction:
        """The contraction of y."""
        return self.bijectors[1].bijector.contraction

    @property
    def solver(self) -> Solver:
        """The solver of y."""
        return self.bijectors[1].solver

    def _repr_parts(self, shape: Any) -> None:
        return None

    def _repr_text(self, text: Callable[[Any], str]) -> str:
        is_default = self.solver == Anderson(on_failure="raise")
        return constructor(self, text, solver=None if is_default else text(self.solver))
