"""Series for w = (I + M)^-1 v and v^T log(I + M) v that cost one product with M a term.

A series has start(v) -> state and step(k, v, state, product) -> (state, term): term k = 1, 2, ...
of w - v and of the value, both of which vanish behind v for M = 0. Vectors are arrays
[B, ...], and every example is treated by itself. M is the transposed Jacobian.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.broadcasting import per_example

Array = jax.Array
Product = Callable[[Array], Array]


class Term(NamedTuple):
    """One term of w, [B, ...], and of the value, [B]."""

    w: Array
    value: Array


@dataclass(frozen=True)
class PowerSeries:
    """w = sum_k (-M)^k v,   v^T log(I + M) v = -sum_{k>=1} v^T (-M)^k v / k.

    Terms fall like |M|^k (Chen et al. 2019, arXiv 1906.02735, equations 6 and 8).
    """

    def start(self, v: Array) -> Array:
        return v

    def step(self, k: Array, v: Array, power: Array, product: Product) -> tuple[Array, Term]:
        power = -product(power)
        return power, Term(power, -dot(v, power) / jnp.asarray(k, v.dtype))


class _Krylov(NamedTuple):
    """Residual, direction and its product [B, ...]; the value's recurrence [B, Q]."""

    r: Array
    p: Array
    mp: Array
    zeta: Array
    sigma: Array
    kappa: Array
    lookahead: Array


@dataclass(frozen=True)
class MinimalResidual:
    """Minimal-residual steps for (I + M) w = v, and the value that the same products give.

    With A = I + M, from w_0 = 0, r_0 = v, step n = 0, 1, ... takes one product, A r_n:

        p_n = r_n + b_n p_{n-1},  b_n = max(0, -<A r_n, A p_{n-1}> / |A p_{n-1}|^2),
        w_{n+1} = w_n + a_n p_n,  r_{n+1} = r_n - a_n A p_n,  a_n = <r_n, A p_n> / |A p_n|^2

    (Orthomin(1): Vinsome 1976; Eisenstat, Elman & Schultz 1983, doi 10.1137/0720023; the conjugate
    residual method where M is symmetric). Since r_n is at right angles to A p_{n-1}, the residual after a
    step is no longer than after the best step along r_n alone, and |r_{n+1}| <= |M r_n|: no step is worse
    than one of the power series. For symmetric M it is the best in the whole Krylov space; else the
    two-term recurrence, and b_n cut at 0, give that up for constant memory and for the value below.
    Because w_n + r_n needs no further product, term k is the difference of w_k + r_k and
    w_{k-1} + r_{k-1}.

    The value uses log A = int_0^inf 1/(1+s) - (A + s)^-1 ds. The residual polynomials R_n of
    the systems with A + s are those of A, divided by R_n(-s) (as in multi-shift conjugate gradients:
    Jegerlehner 1996, arXiv hep-lat/9612014), so that v^T (A + s)^-1 v follows from the scalars
    a_n, b_n, v^T p_n, v^T r_n alone, for all nodes s of a quadrature at once. b_n >= 0 keeps R_n(-s) >= 1.

    Attributes:
      steps: products after which a_n = 1, b_n = 0, the power series of what is left; None for all steps.
    """

    steps: int | None = None

    def start(self, v: Array) -> _Krylov:
        zero = jnp.zeros_like(v)
        nodes = _quadrature(v.dtype)[0][None]
        ones = jnp.ones((v.shape[0], nodes.size), v.dtype)
        return _Krylov(v, zero, zero, ones, 0 * ones, 0 * ones, dot(v, v)[..., None] / (1 + nodes))

    def step(self, k: Array, v: Array, state: _Krylov, product: Product) -> tuple[_Krylov, Term]:
        r, p, mp = state.r, state.p, state.mp
        mr = product(r)
        ap = p + mp
        ar, floor = r + mr, (8 * float(jnp.finfo(v.dtype).eps)) ** 2 * dot(v, v)
        b = jnp.maximum(0, _ratio(-dot(ar, ap), dot(ap, ap), 0, floor))
        if self.steps is not None:
            b = jnp.where(k <= self.steps, b, 0)
        p, mp = r + per_example(b, r) * p, mr + per_example(b, r) * mp
        ap = p + mp
        a = _ratio(dot(r, ap), dot(ap, ap), 1, floor)
        if self.steps is not None:
            a = jnp.where(k <= self.steps, a, 1)
        term = -per_example(a, r) * mp  # w_k + r_k - (w_{k-1} + r_{k-1})
        r = r - per_example(a, r) * p + term

        nodes, weights = (part[None] for part in _quadrature(v.dtype))
        a, b = a[..., None], b[..., None]
        sigma, kappa = 1 + b * state.sigma, b * state.kappa  # P_n(-s) / R_n(-s); the cross term / R_n(-s)
        q = 1 / (1 + a * nodes * sigma)  # R_n(-s) / R_{n+1}(-s)
        v_p = dot(v, p)[..., None]
        taken = a * state.zeta * q * (v_p + nodes * kappa)
        zeta = state.zeta * q  # 1 / R_{n+1}(-s)
        lookahead = dot(v, r)[..., None] * zeta / (1 + nodes)
        value = -jnp.sum((taken + lookahead - state.lookahead) * weights, axis=-1)
        state = _Krylov(r, p, mp, zeta, sigma * q, q * (kappa - a * sigma * v_p), lookahead)
        return state, Term(term, value)


def dot(a: Array, b: Array) -> Array:
    """Inner product over the event, [B]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def _ratio(numerator: Array, denominator: Array, default: float, floor: Array) -> Array:
    """numerator / denominator, or the default where the denominator is at most `floor`; all derivatives are finite.

    A residual that is nothing but rounding, as after D steps in D dimensions, has derivatives many times its own size.
    """
    fine = denominator > lax.stop_gradient(floor)
    return jnp.where(fine, numerator / jnp.where(fine, denominator, 1), default)


@lru_cache(maxsize=4)
def _quadrature(dtype) -> tuple[np.ndarray, np.ndarray]:
    """Nodes s and weights on (0, inf): Gauss-Legendre in x = s / (s + c).

    c = 0.05 is about the geometric mean of 1 - L and 1 + L for L = 0.999: the poles -s in the spectrum of
    A then lie as far from [0, 1] in x on either side. log of a spectrum in [1 - L, 1 + L] is right to
    1e-13 for L = 0.999 and 1e-4 for 0.9999.
    """
    c = 0.05
    x, weights = np.polynomial.legendre.leggauss(64)
    x, weights = (x + 1) / 2, weights / 2
    return (c * x / (1 - x)).astype(dtype), (c / (1 - x) ** 2 * weights).astype(dtype)
