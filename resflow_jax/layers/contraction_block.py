"""`ContractionBlock`: what all blocks made of one contraction g have in common."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from resflow_jax.functional.checks import check_like, check_open_interval
from resflow_jax.layers.bijector import Bijector, Shape
from resflow_jax.layers.block_certificate import certify_contraction, tighten_contraction
from resflow_jax.layers.conditions import ConditionShape
from resflow_jax.layers.contraction import Contraction, TrustedContraction

Array = jax.Array


class ContractionBlock(Bijector):
    """Interface of a block made of a contraction g. A block defines the map, its log-det, its inverse and its bounds.

    Attributes:
      contraction: g.
    """

    blocks = 1
    takes_noise = True

    def _bounds_of_map(self, bound: float) -> tuple[float, float]:
        """(Lip(f), Lip(f^-1)) for Lip(g) <= bound; infinite where they have no bound."""
        raise NotImplementedError

    def __init__(
        self,
        contraction: nnx.Module,
        *,
        lipschitz: float | None = None,
        event_shape: Shape | None = None,
        condition_shape: ConditionShape = None,
    ):
        if isinstance(contraction, Contraction):
            given = {"lipschitz": lipschitz, "event_shape": event_shape, "condition_shape": condition_shape}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"{name}: expected None together with a Contraction, which knows its own, got {value!r}"
                    )
            own = getattr(contraction, "lipschitz", None)
            check_open_interval(f"{type(contraction).__name__}.lipschitz", own, 0, 1)
        else:
            contraction = TrustedContraction(contraction, lipschitz, event_shape, condition_shape)
        self.contraction = contraction
        self.event_shape = contraction.event_shape
        self.condition_shape = contraction.condition_shape

    def g(self, x: Array, condition: Array | None = None) -> Array:
        """The contraction g(x), or g(x; c), [B, ...] for x [B, ...]; one evaluation.

        Raises:
          ValueError: if it changes the shape or the dtype of x.
        """
        g_x = self.contraction(x) if condition is None else self.contraction(x, condition)
        check_like("g", g_x, x)
        return g_x

    def _estimated(self, log_det_of: Callable[..., Any], x: Array, key: Any, estimator: Any, condition: Any) -> Any:
        """log_det_of(g, params, x, **options), a function like `residual`, of the contraction; with diagnostics."""
        graphdef, state = nnx.split(self.contraction)
        return log_det_of(
            self.contraction.apply,
            state,
            x,
            condition=self.contraction.condition_features(condition),
            key=key,
            estimator=jax.tree.map(lambda rows: rows[0], estimator),
            lipschitz=self.contraction.lipschitz if self.contraction.is_contraction else None,
            prepare=lambda state: nnx.merge(graphdef, state).weights(),
            chunk_size=self.contraction.chunk_size,
            return_diagnostics=True,
        )

    def _point_of_g(self, x: Array, condition: Array | None) -> Array:
        """Where the block evaluates g; it is called before running statistics inside of g move."""
        return x

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        self.contraction.move_statistics(self._point_of_g(x, condition), condition, rate=1.0)
        return self(x, condition)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        self.contraction.move_statistics(self._point_of_g(x, condition), condition)
        return self(x, condition)

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        try:
            block = certify_contraction(self.contraction, self._bounds_of_map)
        except ValueError as error:
            raise ValueError(f"block {len(blocks)}: {error}") from error
        blocks.append(block)
        return block.lipschitz, block.inverse_lipschitz

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.certified_bounds([])

    def tighten(self) -> None:
        tighten_contraction(self.contraction)
