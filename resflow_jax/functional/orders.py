"""Orders p of the vector norms between the layers of a residual block: parsing, and learnable orders.

n layers have n + 1 orders p_0 ... p_n: layer i has its induced norm from p_i to p_{i+1} bounded by c_i (Chen et al.
2019, arXiv 1906.02735, section on induced mixed norms). Then ||g(x) - g(y)||_{p_n} <= prod_i c_i ||x - y||_{p_0}. For
p_n <= p_0 this makes g a contraction, if prod_i c_i < 1. For p_n > p_0, as in "222f", it need not: the two norms of a
vector of D numbers differ by a factor of up to D^(1/p_0 - 1/p_n).

A learnable order is a function of a raw real parameter,

    p(r) = 3 - 2 tanh(h(atanh(1/2) - r)),    h(t) = 0.3 t + 0.7 elu(t),

which increases from 1 to 5 and is 2 at r = 0. The authors' PyTorch implementation has the same map.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.checks import check_count, check_order

Array = jax.Array

_ATANH_HALF = 0.5493061829986572  # rounded to float32 as in the PyTorch implementation: p(0) - 2 is 6e-8
# The conjugate of order 1 + margin is about 1 / margin = 1000; powers of that order are still accurate in float32.
_MARGIN = 1e-3


def parse_norms(norms: str | Sequence[float], layers: int | None = None, name: str = "norms") -> tuple[float, ...]:
    """Parses orders: "222f" -> (2.0, 2.0, 2.0, inf), (2, 2.5, 2) -> (2.0, 2.5, 2.0).

    Args:
      norms: digits from 1 to 9 and "f" for infinity, or a sequence of numbers in [1, inf].
      layers: number of layers; layers + 1 orders are expected. None expects at least two orders.
      name: name of the argument, for errors.

    Raises:
      ValueError: for an invalid order, which it names, or a wrong number of orders.
    """
    if isinstance(norms, str):
        unknown = sorted(set(norms) - set("123456789f"))
        if unknown:
            raise ValueError(f"{name}: expected digits from 1 to 9 and 'f' (infinity), got {unknown[0]!r} in {norms!r}")
        orders = tuple(math.inf if letter == "f" else float(letter) for letter in norms)
    elif isinstance(norms, Sequence):
        for n, order in enumerate(norms):
            check_order(f"{name}[{n}]", order)
        orders = tuple(map(float, norms))
    else:
        raise ValueError(f"{name}: expected a string such as '222f' or a sequence of numbers, got {norms!r}")
    if layers is None:
        check_count(f"{name}: the number of orders", len(orders), 2)
    elif len(orders) != layers + 1:
        raise ValueError(f"{name}: expected {layers + 1} orders for {layers} layers, got {len(orders)} in {norms!r}")
    return orders


def learnable_order(raw: Array) -> Array:
    """Maps raw parameters to orders in (1, 5), elementwise; increasing, 2 at zero.

    The result is clipped to [1 + 1e-3, 5 - 1e-3], but the derivative is that of the map without the clip, so that a
    parameter can return from there.
    """
    t = _ATANH_HALF - raw
    order = 3 - 2 * jnp.tanh(0.3 * t + 0.7 * jax.nn.elu(t))
    return order + lax.stop_gradient(jnp.clip(order, 1 + _MARGIN, 5 - _MARGIN) - order)
