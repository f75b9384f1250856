"""`certify`: upper bounds on the Lipschitz constants of a flow and of its inverse."""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.texts import constructor, count, upper
from resflow_jax.layers.bijector import Bijector
from resflow_jax.layers.block_certificate import BlockCertificate
from resflow_jax.models.flow import Flow

_SHOWN = 6  # blocks in the text of a certificate


@dataclass(frozen=True)
class Certificate:
    """Upper bounds on the Lipschitz constants of a flow f and of its residual blocks, as `certify` returns them.

    All numbers are floats without a unit. The bounds are those of the flow at the time of the call.

    Attributes:
      blocks: a `BlockCertificate` for every residual block, in the order of the flow.
      lipschitz: bound on Lip(f) of the whole flow, in the 2-norm, for images in [0, 1].
      inverse_lipschitz: bound on Lip(f^-1) of the whole flow; infinite unless certified, and if a layer has no bound.
      unbounded: (class, reason) of every layer that has no Lipschitz bound for any parameters, such as a coupling
        layer. Such layers are invertible by construction, but their Lipschitz constants are not bounded.

    Source: Behrmann et al. (2019, arXiv 1811.00995), theorem 1 and lemma 2.

    Example:
      >>> flow = rf.Flow(rf.ResidualBlock(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lipschitz=0.5, event_shape=(2,)))
      >>> certificate = rf.certify(flow)
      >>> certificate.bounds.tolist(), certificate.inverse_lipschitz, certificate.is_certified
      ([0.5], 2.0, False)
    """

    blocks: tuple[BlockCertificate, ...]
    lipschitz: float
    inverse_lipschitz: float
    unbounded: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        try:
            return "\n".join(self._lines())
        except Exception:  # fields may hold something other than numbers, for example inside jax.tree.map
            return constructor(self)

    def _lines(self) -> list[str]:
        """The lines of the text."""
        number, proved = len(self.blocks), [block.bound for block in self.blocks if block.is_proved]
        beyond = [str(n) for n, block in enumerate(self.blocks) if not block.bound < 1]
        verdict = "every block is invertible" if self.is_certified else "NOT certified"
        verdict = verdict if number else "nothing to certify"
        lines = [f"Certificate of {count(number, 'residual block')}: {verdict}"]
        if any(block.layers for block in self.blocks):
            target = max(block.target_bound for block in self.blocks if block.is_proved)
            bounds = ", ".join(map(upper, proved[:_SHOWN])) + (", ..." if len(proved) > _SHOWN else "")
            lines.append(f"  Lip(g) <= {upper(max(proved))} (target {upper(target)}); of the blocks: {bounds}")
        if beyond:
            lines.append(f"  no contraction by the bound: {_some(beyond)}")
        if self.unproved:
            lines.append(f"  stated by the user, not proved: {_some([*map(str, self.unproved)])}")
        lines += [f"  no Lipschitz bound for {text}" for text in self.unbounded_texts()]
        return [*lines, f"  Lip(f) <= {upper(self.lipschitz)}, Lip(f^-1) <= {upper(self.inverse_lipschitz)}"]

    @property
    def bounds(self) -> np.ndarray:
        """Upper bound on Lip(g) of every block, float64 [blocks]; for blocks in `unproved` the user states it."""
        return np.array([block.bound for block in self.blocks])

    @property
    def is_certified(self) -> bool:
        """Whether every block is proved to be invertible."""
        return bool((self.bounds < 1).all()) and not self.unproved

    @property
    def unproved(self) -> tuple[int, ...]:
        """The numbers of the blocks whose bound the user states (see `ResidualBlock`)."""
        return tuple(n for n, block in enumerate(self.blocks) if not block.is_proved)

    @property
    def norms(self) -> np.ndarray:
        """Upper bound on the norm of every linear layer, float64 [layers]."""
        return np.array([layer.norm for block in self.blocks for layer in block.layers])

    def require(self) -> None:
        """Does nothing if the flow is certified.

        Raises:
          ValueError: if a block is not proved to be invertible; the message names the worst block.
        """
        if self.unproved:
            raise ValueError(
                "flow: expected every block proved to be invertible, got a bound that the user states for blocks "
                f"{', '.join(map(str, self.unproved))}: their contractions are modules or subclasses of Contraction "
                "without a `bound`"
            )
        if not self.is_certified:
            worst = int(np.argmax(self.bounds))
            if not self.blocks[worst].layers:
                raise ValueError(
                    f"flow: expected every block certified with a Lipschitz bound below 1, got none for block {worst}"
                )
            norms = ", ".join(f"{layer.norm:.6f}" for layer in self.blocks[worst].layers)
            raise ValueError(
                f"flow: expected every block certified with a Lipschitz bound below 1, got {self.bounds[worst]:.6f} "
                f"for block {worst} (norms of its layers: {norms}); `flow.tighten()` brings them to their target bounds"
            )

    def error_bounds(self, status: InverseStatus) -> np.ndarray:
        """Upper bounds on the error in x after each block's solve, in the 2-norm.

        The bound is |r| / (1 - L) with the residual r in `InverseStatus`, up to rounding. It is infinite for a block
        that is not certified, and for a block inside of an `Invert` whose inverse is itself a solve.

        Args:
          status: from `flow.inverse(z, return_status=True)`, fields [blocks, B].

        Returns:
          float64 [blocks, B], in the unit of the block's input.

        Raises:
          ValueError: for a status with rows of other layers that iterate, such as `MixtureCoupling`.
        """
        if len(status.residual_norm) != len(self.blocks):
            raise ValueError(
                f"status: expected a row for each of the {len(self.blocks)} residual blocks, got "
                f"{len(status.residual_norm)}; other layers that iterate have no bound"
            )
        factors = np.array([block.inverse_lipschitz for block in self.blocks])[:, None]
        bounds = np.full(status.residual_norm.shape, math.inf)
        return np.multiply(factors, np.asarray(status.residual_norm, np.float64), out=bounds, where=factors < math.inf)

    def unbounded_texts(self) -> list[str]:
        """A text for each kind of layer without a bound, such as "2 layers AffineCoupling: the network ..."."""
        return [f"{count(n, 'layer')} {name}: {why}" for (name, why), n in Counter(self.unbounded).items()]

    def as_dict(self) -> dict[str, Any]:
        """The certificate as nested dicts of plain values; infinite numbers stay as they are."""
        return {"is_certified": self.is_certified, **dataclasses.asdict(self)}


def _some(names: list[str]) -> str:
    """A text that lists the first of these block numbers, and counts the others."""
    return (
        f"block{'' if len(names) == 1 else 's'} "
        + ", ".join(names[:_SHOWN])
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    )


def certify(flow: Flow) -> Certificate:
    """Upper bounds on the Lipschitz constants of a flow with its present parameters.

    The norms of dense layers and 1x1 convolutions come from their singular values, those of other convolutions from the
    circular convolution that contains them or, if that is small, from the exact matrix; see `functional.norm_bounds`. A
    block of mixed norms is bounded in its own norms and in the 2-norm, and the smaller bound is used. The bounds hold
    for the normalised kernels, in exact arithmetic.

    Args:
      flow: the flow, which is not changed. After training, call `flow.converge_norms()` and `flow.tighten()` first.

    Returns:
      A `Certificate`. For a block with a user's module it uses the stated `lipschitz`, and lists the block as
      `unproved`. Coupling layers and other layers that have no bound are listed as `unbounded`, a stack of them once.

    Randomness: none. Cost: singular value decompositions of all kernels, in float64 on the host; no evaluation of g.
    Not traceable.

    Raises:
      ValueError: if `flow` is not a `Flow`, if a kernel is not finite, and for a layer with residual blocks inside that
        does not define `certified_bounds`.

    Source: Behrmann et al. (2019, arXiv 1811.00995), theorem 1 and lemma 2; Chen et al. (2019, arXiv 1906.02735),
    section 3.3, for mixed norms.

    Example:
      >>> flow = rf.Flow(rf.ResidualBlock(rf.LipschitzMLP(2, (2,), rngs=nnx.Rngs(0))))
      >>> flow.tighten()
      >>> certificate = rf.certify(flow)
      >>> certificate.is_certified, bool(certificate.bounds[0] <= flow.bijector.contraction.lipschitz)
      (True, True)
    """
    if not isinstance(flow, Flow):
        raise ValueError(f"flow: expected a Flow, got {type(flow).__name__}")
    _check_reports(flow)
    blocks: list[BlockCertificate] = []
    lipschitz, inverse = flow.bijector.certified_bounds(blocks)
    layers = [layer for _, layer in nnx.iter_modules(flow.bijector) if getattr(layer, "no_bound", None)]
    unbounded = tuple((type(layer).__name__, layer.no_bound) for layer in layers)
    return Certificate(tuple(blocks), lipschitz, inverse, unbounded)


def _check_reports(flow: Flow) -> None:
    """Raises ValueError if a layer has residual blocks inside that no `certified_bounds` would report."""
    for _, layer in nnx.iter_modules(flow.bijector):
        if not isinstance(layer, Bijector) or layer.no_bound is not None:
            continue
        has_blocks = any(isinstance(part, Bijector) and part.blocks for _, part in nnx.iter_modules(layer))
        if has_blocks and type(layer).certified_bounds is Bijector.certified_bounds:
            raise ValueError(
                f"flow: expected layers that report the residual blocks inside, got {type(layer).__name__} without a "
                "method certified_bounds of its own"
            )
