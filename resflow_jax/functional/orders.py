"""Orders p of the norms between the layers of a block: as given by a user, and learnable.

n layers have n + 1 orders p_0 ... p_n: layer i is measured from p_i to p_{i+1} (Chen et al. 2019,
arXiv 1906.02735, section on induced mixed norms). The block g then has ||g(x) - g(y)||_{p_n} <=
prod_i c_i ||x - y||_{p_0}. This is a contraction if p_n <= p_0; behind p_n > p_0, as in "222f", it
need not be one: norms of D numbers differ by up to D^(1/p_0 - 1/p_n).

A learnable order is a function of a raw real parameter,

    p(r) = 3 - 2 tanh(h(atanh(1/2) - r)),    h(t) = 0.3 t + 0.7 elu(t),

which increases from 1 to 5 and is 2 at r = 0. It is the map of the PyTorch implementation.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.checks import check_count, check_order

Array = jax.Array

_ATANH_HALF = 0.5493061829986572  # rounded to float32, as there: p(0) - 2 is 6e-8
# At order 1 + margin the dual order is 1 / margin, still harmless in float32.
_MARGIN = 1e-3


def parse_norms(norms: str | Sequence[float], layers: int | None = None, name: str = "norms") -> tuple[float, ...]:
    """The orders that a user gave: "222f" -> (2.0, 2.0, 2.0, inf), (2, 2.5, 2) -> (2.0, 2.5, 2.0).

    Args:
      norms: digits from 1 to 9 and "f" for infinity, or a sequence of numbers of at least one.
      layers: if given, layers + 1 orders are expected; otherwise at least two.
      name: of the argument, for errors.

    Raises:
      ValueError: that names the argument and the order which is wrong, or how many were expected.
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
    """The order in (1, 5) of a raw parameter, elementwise: 2 at zero, increasing.

    Kept 1e-3 away from 1 and 5. The derivative there is that of the map without this bound, so that a
    parameter can come back.
    """
    t = _ATANH_HALF - raw
    order = 3 - 2 * jnp.tanh(0.3 * t + 0.7 * jax.nn.elu(t))
    return order + lax.stop_gradient(jnp.clip(order, 1 + _MARGIN, 5 - _MARGIN) - order)
