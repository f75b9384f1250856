"""`certify`: upper bounds on the Lipschitz constants of a flow and of its inverse."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.texts import constructor, count, upper
from resflow_jax.layers.block_certificate import BlockCertificate
from resflow_jax.models.flow import Flow

_SHOWN = 6  # blocks in the text of a certificate


@dataclass(frozen=True)
class Certificate:
    """Upper bounds on the Lipschitz constants of a flow.

    Attributes:
      blocks: of every residual block, in the order of the flow, with its layers.
      lipschitz: bound on Lip(f) of the whole flow, in the 2-norm, for images in [0, 1].
      inverse_lipschitz: bound on Lip(f^-1) of the whole flow; infinite unless certified.
    """

    blocks: tuple[BlockCertificate, ...]
    lipschitz: float
    inverse_lipschitz: float

    def __repr__(self) -> str:
        try:
            return "\n".join(self._lines())
        except Exception:  # something else stands in the place of the numbers, as while a tree is mapped
            return constructor(self)

    def _lines(self) -> list[str]:
        """What is shown of it."""
        number, proved = len(self.blocks), [block.bound for block in self.blocks if block.is_proved]
        beyond = [str(n) for n, block in enumerate(self.blocks) if not block.bound < 1]
        verdict = "every block is invertible" if self.is_certified else "NOT certified"
        lines = [f"Certificate of {count(number, 'residual block')}: {verdict}"]
        if proved:
            target = max(block.target_bound for block in self.blocks if block.is_proved)
            bounds = ", ".join(map(upper, proved[:_SHOWN])) + (", ..." if len(proved) > _SHOWN else "")
            lines.append(f"  Lip(g) <= {upper(max(proved))} (target {upper(target)}); of the blocks: {bounds}")
        if beyond:
            lines.append(f"  no contraction by the bound: {_some(beyond)}")
        if self.unproved:
            lines.append(f"  on the user's word: {_some([*map(str, self.unproved)])}")
        return [*lines, f"  Lip(f) <= {upper(self.lipschitz)}, Lip(f^-1) <= {upper(self.inverse_lipschitz)}"]

    @property
    def bounds(self) -> np.ndarray:
        """Upper bound on Lip(g) of every block, [blocks]; the user's word for those in `unproved`."""
        return np.array([block.bound for block in self.blocks])

    @property
    def is_certified(self) -> bool:
        """Whether every block is proved to be invertible."""
        return bool((self.bounds < 1).all()) and not self.unproved

    @property
    def unproved(self) -> tuple[int, ...]:
        """The numbers of the blocks whose bound is the user's word (see `ResidualBlock`)."""
        return tuple(n for n, block in enumerate(self.blocks) if not block.is_proved)

    @property
    def norms(self) -> np.ndarray:
        """Upper bound on the norm of every linear layer, [layers]."""
        return np.array([layer.norm for block in self.blocks for layer in block.layers])

    def require(self) -> None:
        """Raises ValueError, naming the worst block, unless the flow is certified."""
        if self.unproved:
            raise ValueError(
                f"flow: expected every block proved to be invertible, got blocks {', '.join(map(str, self.unproved))} "
                "on the user's word: their contractions are modules or subclasses of Contraction without a `bound`"
            )
        if not self.is_certified:
            worst = int(np.argmax(self.bounds))
            norms = ", ".join(f"{layer.norm:.6f}" for layer in self.blocks[worst].layers)
            raise ValueError(
                f"flow: expected every block certified with a Lipschitz bound below 1, got {self.bounds[worst]:.6f} "
                f"for block {worst} (norms of its layers: {norms}); `flow.tighten()` brings them to their target bounds"
            )

    def error_bounds(self, status: InverseStatus) -> np.ndarray:
        """Bound on the error in x that each block's solve leaves, in the 2-norm, [blocks, B].

        |r| / (1 - L) with the residual r of `InverseStatus`, up to rounding; infinite for a block that is not
        certified.

        Args:
          status: of `flow.inverse(z, return_status=True)`.
        """
        factors = np.array([block.inverse_lipschitz for block in self.blocks])[:, None]
        bounds = np.full(status.residual_norm.shape, math.inf)
        return np.multiply(factors, np.asarray(status.residual_norm, np.float64), out=bounds, where=factors < math.inf)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; infinite ones as they are."""
        return {"is_certified": self.is_certified, **dataclasses.asdict(self)}


def _some(names: list[str]) -> str:
    """The first blocks of these numbers."""
    return (
        f"block{'' if len(names) == 1 else 's'} "
        + ", ".join(names[:_SHOWN])
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    )


def certify(flow: Flow) -> Certificate:
    """Upper bounds on the Lipschitz constants of a flow as it stands, in float64 on the host.

    Dense layers and 1x1 convolutions by their singular values, other convolutions by the circular
    convolution that contains them or, where that is small, exactly; see `functional.norm_bounds`. A block
    of mixed norms is bounded in these and in the 2-norm, and the smaller bound counts. The bounds hold
    for the kernels as they are applied, in exact arithmetic.

    Not traceable. Raises ValueError if `flow` is not a `Flow`.
    """
    if not isinstance(flow, Flow):
        raise ValueError(f"flow: expected a Flow, got {type(flow).__name__}")
    blocks: list[BlockCertificate] = []
    lipschitz, inverse = flow.bijector.certified_bounds(blocks)
    return Certificate(tuple(blocks), lipschitz, inverse)
