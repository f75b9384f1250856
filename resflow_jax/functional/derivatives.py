"""Marks on arrays for which one direction of differentiation would be wrong or impossible: it raises, with the remedy.

    reverse_only(x)   x; its tangent can be transposed (grad, vjp), and not be computed forward (jvp, jacfwd)
    forward_only(x)   x; its tangent can be computed forward, and not be transposed

Both are the identity, at no cost in the compiled program. An estimate with a gradient rule of its own marks what goes
into the rule as `reverse_only`, and what the rule computes as `forward_only`: then grad works, jvp of grad works, and
jvp and grad of grad raise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_REMEDY = 'use estimator=Exact(), or gradient="autodiff", which have derivatives of any order in any mode'


def reverse_only(tree: Any) -> Any:
    """The same tree; forward-mode derivatives of its floats raise a TypeError."""
    return jax.tree.map(lambda leaf: _reverse_only_p.bind(leaf) if _is_float(leaf) else leaf, tree)


def forward_only(tree: Any) -> Any:
    """The same tree; reverse-mode derivatives of its floats raise a ValueError."""
    return jax.tree.map(lambda leaf: _forward_only_p.bind(leaf) if _is_float(leaf) else leaf, tree)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, lambda context, x: [x])
    batching.primitive_batchers[primitive] = lambda args, axes: (primitive.bind(*args), axes[0])
    return primitive


def _refuse_forward(*_):
    raise TypeError(
        "gradient: forward-mode derivatives (jvp, jacfwd) expected another estimator than one with "
        f'gradient="neumann"; {_REMEDY}. Forward over reverse, as jax.jvp of jax.grad, works with every estimator'
    )


def _refuse_reverse(*_):
    raise ValueError(
        "gradient: reverse-mode derivatives of second order (grad of grad) expected another estimator than one with "
        f'gradient="neumann"; {_REMEDY}. Forward over reverse, as jax.jvp of jax.grad, works with every estimator'
    )


_reverse_only_p = _identity("reverse_only")
_reverse_only_tangent_p = _identity("reverse_only_tangent")
_forward_only_p = _identity("forward_only")

# The tangent of what is marked is an operation that can be transposed alone.
ad.primitive_jvps[_reverse_only_p] = lambda primals, tangents: (
    primals[0],
    tangents[0] if isinstance(tangents[0], ad.Zero) else _reverse_only_tangent_p.bind(tangents[0]),
)
_reverse_only_tangent_p.def_impl(_refuse_forward)
mlir.register_lowering(_reverse_only_tangent_p, _refuse_forward)
batching.primitive_batchers[_reverse_only_tangent_p] = _refuse_forward  # of jacfwd: what is transposed never is batched
ad.deflinear2(_reverse_only_tangent_p, lambda cotangent, x: [cotangent])
ad.deflinear2(_forward_only_p, _refuse_reverse)
