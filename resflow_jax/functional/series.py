"""Series for w = (I + M)^-1 v and v^T log(I + M) v that cost one product with M a term.

A series has start(v) -> state and step(k, v, state, product) -> (state, term). The terms k = 1, 2, ... add up to w - v
and to the value; for M = 0 all of them are zero. Vectors are arrays [B, ...], and each example is computed
independently. M is the transposed Jacobian.
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
    """One term of the sum for w, [B, ...], and of the sum for the value, [B].

    `image` [B, ...] is the product that the step took; in step 1 it is M v.
    """

    w: Array
    value: Array
    image: Array

    def mean_square(self) -> Array:
        """The mean square of w, as in `Diagnostics.term_norms`."""
        return jnp.mean(jnp.square(self.w))


@dataclass(frozen=True)
class PowerSeries:
    """w = sum_k (-M)^k v,   v^T log(I + M) v = -sum_{k>=1} v^T (-M)^k v / k.

    Terms fall like |M|^k (Chen et al. 2019, arXiv 1906.02735, equations 6 and 8).
    """

    def start(self, v: Array) -> Array:
        return v

    def step(self, k: Array, v: Array, power: Array, product: Product) -> tuple[Array, Term]:
        image = product(power)
        return -image, Term(-image, dot(v, image) / jnp.asarray(k, v.dtype), image)


class _Krylov(NamedTuple):
    """Residual r, direction p and M p, [B, ...]; the state of the value's recurrence at Q quadrature nodes, [B, Q]."""

    r: Array
    p: Array
    mp: Array
    zeta: Array
    sigma: Array
    kappa: Array
    lookahead: Array


@dataclass(frozen=True)
class MinimalResidual:
    """Minimal-residual steps for (I + M) w = v, and the value v^T log(I + M) v from the same products.

    With A = I + M, from w_0 = 0, r_0 = v, step n = 0, 1, ... takes one product, A r_n:

        p_n = r_n + b_n p_{n-1},  b_n = max(0, -<A r_n, A p_{n-1}> / |A p_{n-1}|^2),
        w_{n+1} = w_n + a_n p_n,  r_{n+1} = r_n - a_n A p_n,  a_n = <r_n, A p_n> / |A p_n|^2

    (Orthomin(1): Vinsome 1976; Eisenstat, Elman & Schultz 1983, doi 10.1137/0720023; for symmetric M this is the
    conjugate residual method). r_n is orthogonal to A p_{n-1}. Hence the residual after a step is at most as large as
    after the best step along r_n alone, and |r_{n+1}| <= |M r_n|: no step is worse than a step of the power series.
    For symmetric M the residual is the least in the whole Krylov space. For other M it need not be: the recurrence of
    two terms and the restriction b_n >= 0 need only constant memory, and they make the value below possible.
    Term k is the difference of w_k + r_k and w_{k-1} + r_{k-1}; adding r_n needs no further product.

    The value uses log A = int_0^inf 1/(1+s) - (A + s)^-1 ds. The residual polynomial of the system with A + s is that
    of A, R_n, divided by R_n(-s), as in multi-shift conjugate gradients (Jegerlehner 1996, arXiv hep-lat/9612014). So
    v^T (A + s)^-1 v follows from the scalars a_n, b_n, v^T p_n and v^T r_n, for all nodes s of a quadrature at once.
    Because b_n >= 0, R_n(-s) >= 1.

    Attributes:
      steps: number of minimal-residual steps. Later steps have a_n = 1 and b_n = 0, which is the power series for the
        remaining residual. None takes minimal-residual steps throughout.
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
        b = jnp.maximum(0, ratio(-dot(ar, ap), dot(ap, ap), 0, floor))
        if self.steps is not None:
            b = jnp.where(k <= self.steps, b, 0)
        p, mp = r + per_example(b, r) * p, mr + per_example(b, r) * mp
        ap = p + mp
        a = ratio(dot(r, ap), dot(ap, ap), 1, floor)
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
        return state, Term(term, value, mr)


def dot(a: Array, b: Array) -> Array:
    """Inner product over the event, [B]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def ratio(numerator: Array, denominator: Array, default: float, floor: Array) -> Array:
    """numerator / denominator, or the default where the denominator is at most `floor`; all derivatives are finite.

    A residual that consists of rounding errors, for example after D steps in D dimensions, would have derivatives much
    larger than itself.
    """
    fine = denominator > lax.stop_gradient(floor)
    return jnp.where(fine, numerator / jnp.where(fine, denominator, 1), default)


@lru_cache(maxsize=4)
def _quadrature(dtype) -> tuple[np.ndarray, np.ndarray]:
    """Nodes s and weights of a quadrature on (0, inf): Gauss-Legendre in x = s / (s + c), 64 nodes.

    c = 0.05 is close to the geometric mean of 1 - L and 1 + L for L = 0.999. The poles of the integrand, at -s in the
    spectrum of A, are then equally far from both ends of [0, 1] in x. The logarithm of a spectrum in [1 - L, 1 + L] has
    an error of 1e-13 for L = 0.999 and of 1e-4 for L = 0.9999.
    """
    c = 0.05
    x, weights = np.polynomial.legendre.leggauss(64)
    x, weights = (x + 1) / 2, weights / 2
    return (c * x / (1 - x)).astype(dtype), (c / (1 - x) ** 2 * weights).astype(dtype)
