"""Series for the log-det of a Cayley transform, (I - J)(I + J)^-1: w = (I - M^2)^-1 v and v^T atanh(M) v.

    log det(I - J) - log det(I + J) = -2 tr atanh(J)          = -2 sum_{k odd} tr(J^k) / k
    its gradient                    = -2 tr((I - J^2)^-1 dJ)  = -2 sum_{k even} tr(J^k dJ)

M is the transposed Jacobian. The factor -2 is applied to the sums (`term_sums.Plan.scale`). The interface is that of
`functional.series`: terms k = 1, 2, ... take one product with M each, and add up to w - v and to the value.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.series import Product, dot, ratio

Array = jax.Array


class Term(NamedTuple):
    """A term as in `functional.series`, with the squared norm [B] of the residual after it.

    Lengths are fitted from the residual, because powers of one parity are in w, and those of the other in the value.
    """

    w: Array
    value: Array
    image: Array
    residual: Array

    def mean_square(self) -> Array:
        """The mean square of the residual, as in `Diagnostics.term_norms`."""
        return jnp.mean(self.residual) / self.w[0].size


@dataclass(frozen=True)
class ParityPowerSeries:
    """w = sum_{k even} M^k v,   v^T atanh(M) v = sum_{k odd} v^T M^k v / k.

    Terms fall like |M|^k (Ahn et al. 2022, arXiv 2210.08176, with Chen et al. 2019, arXiv 1906.02735).
    """

    def start(self, v: Array) -> Array:
        return v

    def step(self, k: Array, v: Array, power: Array, product: Product) -> tuple[Array, Term]:
        power = product(power)
        is_odd = k % 2 == 1
        value = jnp.where(is_odd, dot(v, power) / jnp.asarray(k, v.dtype), 0)
        return power, Term(jnp.where(is_odd, 0, power), value, power, dot(power, power))


class _Krylov(NamedTuple):
    """q, the one before it, and the last directions for t = 1 and t = -1, [B, ...]; scalars at every t, [B, T]."""

    q: Array
    p: Array
    forward: Array
    backward: Array
    zeta: Array
    h: Array
    taken: Array


@dataclass(frozen=True)
class TwoSidedKrylov:
    """(I - M) x = v and (I + M) x = v together, from one Krylov space: w is the mean of both solutions.

    The systems (I - t M) x = v for all t in [-1, 1] have residuals along one vector, q_n = Q_n(M) v, if
    Q_0 = 1 and Q_{n+1}(m) = (m - rho) Q_n(m) - beta Q_{n-1}(m):

        r_n(t) = Q_n(M) v / Q_n(1/t),     x_{n+1}(t) = x_n(t) + d_n(t),
        d_n = zeta_n / h_n q_n + beta t^2 / (h_n h_{n-1}) d_{n-1},    zeta_{n+1} = zeta_n t / h_n,    zeta_0 = 1,
        h_n = 1 - t rho - beta t^2 / h_{n-1}       (= t Q_{n+1}(1/t) / Q_n(1/t);   r_n(t) = zeta_n(t) q_n)

    which follows from the identity of Christoffel and Darboux. A step takes one product, M q_n. It chooses rho and beta
    so that |r(1)|^2 + |r(-1)|^2 becomes least, among the pair that makes |q_{n+1}| least, the best rho with beta = 0,
    the best beta with rho = 0, and zeros. Only pairs with all h_n(t) > 0 count, for which |r(t)| is largest at t = 1 or
    at t = -1. Zeros are a step of the power series. So no step is worse than one of the power series: the sum of
    squares falls at least by the factor L^2. For symmetric M, the first pair throughout is the conjugate-gradient
    method for both signs (for shifted systems see Jegerlehner 1996, arXiv hep-lat/9612014). Term k is the difference of
    the means over both signs of x_k + r_k and of x_{k-1} + r_{k-1}; adding r needs no further product.

    The value uses atanh(M) = int_0^1 ((I - t M)^-1 - (I + t M)^-1) / (2 t) dt, and v^T x(t) follows from scalars at the
    nodes t of a quadrature. q_n is scaled so that the larger of zeta_n(1) and zeta_n(-1) is one in size.

    Attributes:
      steps: number of such steps; later ones are steps of the power series for the remaining residuals. None has no
        end.
    """

    steps: int | None = None

    def start(self, v: Array) -> _Krylov:
        zero = jnp.zeros_like(v)
        ones = jnp.ones((v.shape[0], _nodes(v.dtype)[0].size), v.dtype)
        return _Krylov(v, zero, zero, zero, ones, ones, 0 * ones)

    def step(self, k: Array, v: Array, state: _Krylov, product: Product) -> tuple[_Krylov, Term]:
        q, p = state.q, state.p
        mq = product(q)
        t, weights = (part[None] for part in _nodes(v.dtype))
        rho, beta = self._choice(k, v, state, mq)
        h = 1 - t * rho[:, None] - beta[:, None] * t**2 / state.h
        of_q, of_before = state.zeta / h, beta[:, None] * t**2 / (h * state.h)
        forward = per_example(of_q[:, 0], q) * q + per_example(of_before[:, 0], q) * state.forward
        backward = per_example(of_q[:, 1], q) * q + per_example(of_before[:, 1], q) * state.backward
        scale = lax.stop_gradient(jnp.max(jnp.abs(of_q[:, :2]), axis=1))
        after = per_example(scale, q) * (mq - per_example(rho, q) * q - per_example(beta, q) * p)
        zeta = of_q * t / scale[:, None]

        both = (forward + backward) + per_example(zeta[:, 0] + zeta[:, 1], q) * after
        term = (both - per_example(state.zeta[:, 0] + state.zeta[:, 1], q) * q) / 2
        v_q, v_after = dot(v, q)[:, None], dot(v, after)[:, None]
        taken = of_q * v_q + of_before * state.taken
        value = jnp.sum((taken + zeta * v_after - state.zeta * v_q) * weights, axis=1)
        residual = jnp.mean(jnp.square(zeta[:, :2]), axis=1) * dot(after, after)
        state = _Krylov(after, per_example(scale, q) * q, forward, backward, zeta, h, taken)
        return state, Term(term, value, mq, residual)

    def _choice(self, k: Array, v: Array, state: _Krylov, mq: Array) -> tuple[Array, Array]:
        """rho and beta of this step, [B] each."""
        q, p = state.q, state.p
        floor = lax.stop_gradient((8 * float(jnp.finfo(v.dtype).eps)) ** 2 * dot(v, v))
        qq, pp, qp, q_mq, p_mq = dot(q, q), dot(p, p), dot(q, p), dot(q, mq), dot(p, mq)
        det, det_floor, zero = qq * pp - qp * qp, 1e-6 * qq * pp, jnp.zeros_like(qq)
        rhos = [ratio(pp * q_mq - qp * p_mq, det, 0, det_floor), ratio(q_mq, qq, 0, floor), zero, zero]
        betas = [ratio(qq * p_mq - qp * q_mq, det, 0, det_floor), zero, ratio(p_mq, pp, 0, floor), zero]
        sizes = lax.stop_gradient(jnp.stack([_size(state, mq, *pair) for pair in zip(rhos, betas, strict=True)]))
        best = jnp.where(qq > floor, jnp.argmin(sizes, axis=0), 3)
        if self.steps is not None:
            best = jnp.where(k <= self.steps, best, 3)
        return _of_choice(best, rhos), _of_choice(best, betas)


def _size(state: _Krylov, mq: Array, rho: Array, beta: Array) -> Array:
    """|r(1)|^2 + |r(-1)|^2 after a step with rho and beta, [B]; infinite for a pair that is not allowed."""
    t, q = _nodes(mq.dtype)[0][None], state.q
    h = 1 - t * rho[:, None] - beta[:, None] * t**2 / state.h
    positive = jnp.all(h > 0, axis=1)
    zeta = jnp.abs(state.zeta * t) / jnp.where(positive[:, None], h, 1)
    ends = zeta[:, :2]
    allowed = positive & (jnp.max(zeta, axis=1) <= 1.001 * jnp.max(ends, axis=1))
    after = mq - per_example(rho, q) * q - per_example(beta, q) * state.p
    return jnp.where(allowed, jnp.sum(jnp.square(ends), axis=1) * dot(after, after), jnp.inf)


def _of_choice(number: Array, values: list[Array]) -> Array:
    """values[number] of every example, [B]."""
    return jnp.take_along_axis(jnp.stack(values), number[None], axis=0)[0]


@lru_cache(maxsize=4)
def _nodes(dtype) -> tuple[np.ndarray, np.ndarray]:
    """The values of t: 1, -1, and the nodes t and -t of a quadrature on (0, 1); and their weights, [T] each.

    The weights of 1 and -1 are zero, the others are those of f -> int_0^1 (f(t) - f(-t)) / (2 t) dt. It is
    Gauss-Legendre in x with t = 1 - c x / (1 + c - x), 64 nodes. For eigenvalues m in [-L, L] the poles 1/m are outside
    of (-1/L, 1/L). With c = 0.045, near sqrt(2 (1/L - 1)) for L = 0.999, both ends of [0, 1] in x are equally far from
    them.
    """
    c = 0.045
    x, weights = np.polynomial.legendre.leggauss(64)
    x, weights = (x + 1) / 2, weights / 2
    t = 1 - c * x / (1 + c - x)
    weights = weights * c * (1 + c) / (1 + c - x) ** 2 / (2 * t)
    nodes = np.concatenate([[1, -1], t, -t]), np.concatenate([[0, 0], weights, -weights])
    return nodes[0].astype(dtype), nodes[1].astype(dtype)
