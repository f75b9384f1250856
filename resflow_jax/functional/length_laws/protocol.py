"""Laws of the random length N of a Russian-roulette series: sample, P(N >= k), and whether they are safe.

`LengthLaw` says what a law is. The library has four; a user's own object with these methods is another.

Lengths are drawn from 64 random bits, in every float dtype: those of a probability below 2^-64 never come up.

An estimate whose terms decay like L^k, L the Lipschitz constant of g, has finite variance for
certain only if

    sum_k L^(2k) / P(N >= k) < infinity,

that is if the tail of N falls more slowly than L^(2k) (Rhee & Glynn 2015, theorem 1). A geometric
law needs 1 - p > L^2; the tail of a Poisson law falls faster than any geometric series.
"""

import warnings
from typing import Any, Protocol

import jax

Array = jax.Array


class LengthLaw(Protocol):
    """What `Roulette(length=...)` takes: any object with these three methods; no base class is needed.

    An object whose class is a pytree, as of `jax.tree_util.register_dataclass` or a NamedTuple, is traced: its leaves
    may be arrays that change from call to call. Any other object is a constant of the compiled program, and must not
    change. Objects of the same value are one constant if they can be hashed.

    Three more methods are optional.

      within(lipschitz) -> law: the law for a g of that Lipschitz constant, or of an unknown one for None.
      upper_bound() -> law: one with P(N >= k) at least as large, of no traced arrays; gradient="autodiff" asks it how
        long a series can be, where the arrays of the law itself are traced.
      check(): raises ValueError if the values of the law are wrong. It is called before a law is used.
    """

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws lengths N >= 0, integers of `shape`, with a PRNG key; in jit and vmap too."""

    def survival(self, k: Array) -> Array:
        """P(N >= k) > 0, floats of the shape of the integers k >= 1. The estimate is biased if these are not right."""

    def tail_ratio(self) -> float:
        """lim P(N >= k + 1) / P(N >= k), for the warning of infinite variance: 1 for a tail of powers of k."""


def check_law(name: str, law: Any) -> None:
    """Raises ValueError unless the law has the methods of `LengthLaw`; the message says which are missing."""
    missing = [method for method in _METHODS if not callable(getattr(law, method, None))]
    if isinstance(law, type):
        raise ValueError(f"{name}: expected a law of lengths, got the class {law.__name__}; make one of it")
    if missing:
        raise ValueError(
            f"{name}: expected Defensive, Geometric, Poisson or Fitted, or an object with the methods "
            f"{', '.join(_METHODS)}; got {law!r} without {', '.join(missing)}"
        )


_METHODS = ("sample", "survival", "tail_ratio")


def check_values(law: LengthLaw) -> None:
    """Asks a law that can check itself to do so."""
    if callable(check := getattr(law, "check", None)):
        check()


def law_within(law: LengthLaw, lipschitz: float | None) -> LengthLaw:
    """The law for a g of that Lipschitz constant, with a warning where it is not safe for it."""
    if callable(getattr(law, "within", None)):
        law = law.within(lipschitz)
    if lipschitz is not None:
        check_variance(law, lipschitz)
    return law


def check_variance(law: LengthLaw, lipschitz: float) -> None:
    """A RuntimeWarning if the variance may be infinite for some g with Lip(g) <= lipschitz."""
    ratio = law.tail_ratio()
    if not isinstance(ratio, jax.core.Tracer) and not ratio > lipschitz**2:
        warnings.warn(
            f"length: {law} gives the estimate infinite variance for some g of Lipschitz constant up to "
            f"{lipschitz:.4g}: its tail falls like {float(ratio):.4g}^k, and {lipschitz**2:.4g}^k or slower is "
            "safe; Defensive() is",
            RuntimeWarning,
            stacklevel=2,
        )
