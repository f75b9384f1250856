"""Guards that raise an error where a derivative would be wrong or impossible. The message names the remedy.

    token = reverse_only(tree)     0; an operation that takes the token has no forward-mode derivative (jvp, jacfwd)
    x = forward_only(x)            x; it has no reverse-mode derivative (grad, vjp)

Neither costs anything in the compiled program. An estimate with a custom gradient takes a token of its inputs, and
marks the results of the custom rule as `forward_only`. Then grad and jvp of grad work, and jvp and grad of grad raise.
The token leaves the inputs as they are, so a program need not copy them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from resflow_jax.functional.primitives.jax_internals import Primitive, ad, batching, mlir

Array = jax.Array

_REMEDY = 'use estimator=Exact(), or gradient="autodiff", which have derivatives of any order in any mode'


def reverse_only(tree: Any) -> Array:
    """A token with value 0: forward-mode derivatives with respect to any float of the tree raise a TypeError."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return _token_p.bind(*floats)


def forward_only(tree: Any) -> Any:
    """The same tree; reverse-mode derivatives of its floats raise a ValueError."""
    return jax.tree.map(lambda leaf: _forward_only_p.bind(leaf) if _is_float(leaf) else leaf, tree)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def _refuse_forward(*_, **__):
    raise TypeError(
        "estimator: forward-mode derivatives (jvp, jacfwd) expected another estimator, got one with "
        f'gradient="neumann"; {_REMEDY}. Forward over reverse, jax.jvp of jax.grad, works with a Neumann gradient too'
    )


def _refuse_reverse(*_):
    raise ValueError(
        "estimator: reverse-mode derivatives of second order (grad of grad) expected another estimator, got one with "
        f'gradient="neumann"; {_REMEDY}, or Roulette(second_order=True), whose derivatives end at the second. '
        "Forward over reverse, jax.jvp of jax.grad, works with a Neumann gradient too"
    )


def _zero(*_):
    return jnp.zeros((), jnp.float32)


_TOKEN = jax.core.ShapedArray((), jnp.float32)

_token_p = Primitive("reverse_only")
_token_p.def_impl(_zero)
_token_p.def_abstract_eval(lambda *_: _TOKEN)
mlir.register_lowering(_token_p, mlir.lower_fun(_zero, multiple_results=False))
batching.primitive_batchers[_token_p] = lambda args, axes: (_token_p.bind(*args), None)

# The tangent of a token can be transposed, with no cotangents, but not evaluated.
_tangent_p = Primitive("reverse_only_tangent")
_tangent_p.def_impl(_refuse_forward)
_tangent_p.def_abstract_eval(lambda *_: _TOKEN)
mlir.register_lowering(_tangent_p, _refuse_forward)
batching.primitive_batchers[_tangent_p] = _refuse_forward  # only jacfwd batches tangents; grad never does
ad.primitive_transposes[_tangent_p] = lambda cotangent, *tangents: [None] * len(tangents)


def _jvp(primals, tangents):
    tangents = [tangent for tangent in tangents if not isinstance(tangent, ad.Zero)]
    # Only the innermost derivative sees the guard: jvp of grad may differentiate what grad has guarded.
    return _zero(), _tangent_p.bind(*tangents) if tangents else ad.Zero(_TOKEN)


ad.primitive_jvps[_token_p] = _jvp

_forward_only_p = Primitive("forward_only")
_forward_only_p.def_impl(lambda x: x)
_forward_only_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_forward_only_p, lambda context, x: [x])
batching.primitive_batchers[_forward_only_p] = lambda args, axes: (_forward_only_p.bind(*args), axes[0])
ad.deflinear2(_forward_only_p, _refuse_reverse)
