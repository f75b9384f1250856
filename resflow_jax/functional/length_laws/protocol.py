"""The interface of a distribution ("law") of the random length N of a Russian-roulette series, and its checks.

The library has four such distributions: `Defensive`, `Geometric`, `Poisson` and `Fitted`. Users can write others. The
library's own draw lengths from 64 random bits in every float dtype, so a length of probability below 2^-64 is never
drawn.

If the terms of the estimate decay like L^k, where L is the Lipschitz constant of g, then its variance is finite if

    sum_k L^(2k) / P(N >= k) < infinity,

that is, if the tail of N falls more slowly than L^(2k) (Rhee & Glynn 2015, theorem 1). A geometric distribution
satisfies this for 1 - p > L^2. The tail of a Poisson distribution falls faster than any geometric series, so it never
does.
"""

import warnings
from typing import Any, Protocol

import jax

Array = jax.Array

# The assumed Lipschitz constant of a g without a known one: that of one layer with the default coefficient.
UNKNOWN_LIPSCHITZ = 0.98


class LengthLaw(Protocol):
    """Interface of a length distribution ("law"), for `Roulette(length=...)`: any object with these methods.

    No base class is needed. If the object's class is a pytree (a NamedTuple, or registered by
    `jax.tree_util.register_dataclass`), the object is traced: its arrays may change from call to call without
    recompiling. Any other object is a constant of the compiled program and must not change; objects that are equal and
    hashable are the same constant.

    Required: `sample`, `survival` and `tail_ratio`. Optional:

      within(lipschitz) -> law: the law to use for a g with this Lipschitz constant (None if it is unknown).
      upper_bound() -> law: a law without traced arrays whose P(N >= k) is at least as large. gradient="autodiff" takes
        the longest series from it.
      from_bits(bits) -> lengths [...] from independent random words, uint32 [2, ...], in a class that defines `sample`
        too. A single length is then drawn from the two words of a key, which compiles faster.
      check(): raises ValueError if the parameters of the law are wrong. It is called before the law is used.

    The estimate is unbiased if `survival` is exactly the survival function of `sample`. See the head of this module for
    the condition of finite variance.

    Example:
      >>> class InverseSquare:   # P(N >= k) = 1 / k^2, of mean 1.64; its variance is finite for every L < 1
      ...     def sample(self, key, shape):
      ...         return jnp.floor((1 - jax.random.uniform(key, shape)) ** -0.5).astype(int)
      ...     def survival(self, k):
      ...         return 1 / k.astype(float) ** 2
      ...     def tail_ratio(self):
      ...         return 1.0
      >>> g, key = lambda w, x: w * x, jax.random.key(0)
      >>> y, log_det = rf.residual(g, 0.5, jnp.ones((4, 2)), key=key, estimator=rf.Roulette(InverseSquare()))
      >>> log_det.shape
      (4,)
    """

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws independent lengths N >= 0 with a PRNG key: integers of `shape`. It must work under jit and vmap."""

    def survival(self, k: Array) -> Array:
        """P(N >= k), positive floats of the shape of the integers k >= 1. If they are wrong, the estimate is biased."""

    def tail_ratio(self) -> float:
        """The limit of P(N >= k + 1) / P(N >= k), for the check of the variance; 1 if the tail is a power of k."""


def check_law(name: str, law: Any) -> None:
    """Raises ValueError unless the law has the methods of `LengthLaw`; the message names the missing ones."""
    missing = [method for method in _METHODS if not callable(getattr(law, method, None))]
    if isinstance(law, type):
        raise ValueError(f"{name}: expected an instance, got the class {law.__name__}; write {law.__name__}(...)")
    if missing:
        raise ValueError(
            f"{name}: expected Defensive, Geometric, Poisson or Fitted, or an object with the methods "
            f"{', '.join(_METHODS)}; got {law!r} without {', '.join(missing)}"
        )


_METHODS = ("sample", "survival", "tail_ratio")


def check_values(law: LengthLaw) -> None:
    """Calls the law's own `check`, if it has one."""
    if callable(check := getattr(law, "check", None)):
        check()


def law_within(law: LengthLaw, lipschitz: float | None) -> LengthLaw:
    """The law to use for a g with this Lipschitz constant. Warns if the variance may be infinite for such a g."""
    if callable(getattr(law, "within", None)):
        law = law.within(lipschitz)
    if lipschitz is not None:
        check_variance(law, lipschitz)
    return law


def check_variance(law: LengthLaw, lipschitz: float) -> None:
    """Gives a RuntimeWarning if the variance may be infinite for some g with Lip(g) <= lipschitz."""
    ratio = law.tail_ratio()
    if not isinstance(ratio, jax.core.Tracer) and not ratio > lipschitz**2:
        warnings.warn(
            f"length: {law} can give the estimate infinite variance if Lip(g) is up to {lipschitz:.4g}. "
            f"P(N >= k) falls like {float(ratio):.4g}^k; it must fall more slowly than {lipschitz**2:.4g}^k. "
            "The tail of Defensive() does",
            RuntimeWarning,
            stacklevel=2,
        )
